"""The command path on a busy engine: from publishing until the engine has taken it, which is when it is in force.

Called by `host`. The client is a process of its own (`client`), as operators and controllers are. Beside it:
step time with and without commands, and with the bus in its process, in a thread, and without any.
"""

import asyncio
import os
import sys
import time
from bisect import bisect_left, bisect_right
from itertools import pairwise
from typing import Any

import msgspec

from bench.gpu.engine import ask
from bench.gpu.load import Request, backlog, prompt, steps
from bench.gpu.plan import Sizes
from bench.gpu.wire import BATCH, name

CLIENT_S = 60.0
BUSES = ("process", "thread", "")
ROUNDS = 4
TURNS = tuple((bus, turn) for turn in range(ROUNDS) for bus in (BUSES if turn % 2 else BUSES[::-1]))


async def command(llm: Any, wire: Any, sizes: Sizes, *, slots: int) -> dict[str, Any]:
    """Commands to one of `slots` running requests, while the others come and go."""
    many = slots == sizes.slots[1]
    window_s = sizes.windows_s[many]
    await ask(llm, "resize", {"active": slots, "spare": sizes.spare, "policy": "fcfs"})
    await wire.classes()
    target = Request(llm, name(BATCH), prompt(1, 64), sizes.max_model_len - 128).start()
    await target.until(1)
    async with backlog(llm, slots - 1, sizes.shapes[many], staggered=slots):
        try:
            await asyncio.sleep(sizes.ramp_s[many])
            quiet = await _steps(llm, window_s / 2)
            begin = time.perf_counter()
            found = await _client(wire, target.name, sizes.commands)
            lines = await ask(llm, "meter")
            busy = steps(lines, begin, time.perf_counter())
            ahead = await ask(llm, "unix_offset")
            bus = {}
            for kind, turn in TURNS:
                await ask(llm, "connect", kind)
                while kind and not await ask(llm, "connected"):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
                await asyncio.sleep(0.5)
                bus[f"{kind or 'none'} {turn}"] = await _steps(llm, window_s / 3)
            await ask(llm, "connect", BUSES[0])
            await wire.ready()
        finally:
            assert target.task is not None
            target.task.cancel()
            await asyncio.gather(target.task, return_exceptions=True)
    spans = [(sent, taken - ahead) for sent, taken, _ in found]
    return {
        "slots": slots, "in_force_s": [taken - sent for sent, taken in spans],
        "replied_s": [replied - sent for sent, _, replied in found],
        "beyond_a_step_s": beyond_a_step([line[0] for line in lines], spans),
        "steps": quiet, "steps_with_commands": busy, "bus": bus,
    }  # fmt: skip


def beyond_a_step(ends: list[float], spans: list[tuple[float, float]]) -> list[float]:
    """How much longer each command took than the longest step that it met on its way; s.

    Args:
        ends: when steps ended, in order.
        spans: when each command was sent and taken.
    """
    found = []
    for sent, taken in spans:
        first, last = bisect_right(ends, sent), bisect_left(ends, taken)
        met = ends[max(0, first - 1) : last + 1]
        found.append(taken - sent - max((after - before for before, after in pairwise(met)), default=0.0))
    return found


async def _steps(llm: Any, seconds: float) -> dict[str, float]:
    await ask(llm, "meter")
    begin = time.perf_counter()
    await asyncio.sleep(seconds)
    return steps(await ask(llm, "meter"), begin, time.perf_counter())


async def _client(wire: Any, request: str, count: int) -> list[tuple[float, float, float]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.gpu", "client", request, "--worker", *wire.workers, "--count", str(count),
        stdout=asyncio.subprocess.PIPE, env=dict(os.environ),
    )  # fmt: skip
    try:
        async with asyncio.timeout(CLIENT_S):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise RuntimeError(f"the client ended with {process.returncode}")
    return msgspec.json.decode(out, type=list[tuple[float, float, float]])
