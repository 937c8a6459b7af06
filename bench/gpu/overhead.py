"""What steering costs a busy engine: output tokens/s and the time between tokens, status and events on.

Called by `host`, on stock and steered in turns. Under load requests come and end (`overhead`), and how their prompts
fall together differs between windows by more than steering costs; where all of them only decode (`decoding`), every
window is like the other.
"""

import asyncio
import itertools
import statistics
import time
from typing import Any

from bench.gpu.engine import ask, at_rest
from bench.gpu.load import Line, Request, backlog, prompt, steps
from bench.gpu.plan import Sizes
from bench.gpu.wire import BATCH, name

STREAMED = 16
"""Streams that are read token by token: enough for a median, too few to load the front end."""
WARM_TOKENS = 8
"""Said by those that began last when a window of decoding begins."""


async def overhead(llm: Any, wire: Any, sizes: Sizes, *, slots: int) -> dict[str, Any]:
    """`slots` requests at a time, without end, for a window: tokens/s in the engine, inter-token time at clients."""
    many = slots == sizes.slots[1]
    await ask(llm, "resize", {"active": slots, "spare": sizes.spare, "policy": "fcfs"})
    if wire is not None:
        await wire.classes()
    async with backlog(llm, slots, sizes.shapes[many], staggered=slots, streamed=STREAMED) as batch:
        await asyncio.sleep(sizes.ramp_s[many])
        await ask(llm, "meter")
        begin = time.perf_counter()
        await asyncio.sleep(sizes.windows_s[many])
        end = time.perf_counter()
        lines = await ask(llm, "meter")
    return _found(slots, batch.streams, lines, begin, end)


async def decoding(llm: Any, wire: Any, sizes: Sizes, *, slots: int) -> dict[str, Any]:
    """`slots` requests that begin together and decode, with nobody coming or going, for a window."""
    await ask(llm, "resize", {"active": slots, "spare": sizes.spare, "policy": "fcfs"})
    if wire is not None:
        await wire.classes()
    shape = sizes.decoding
    runs = [
        Request(llm, name(BATCH), prompt(index, shape.prompt), shape.tokens, stream=index >= slots - STREAMED)
        for index in range(slots)
    ]
    try:
        for run in runs:
            run.start()
        await asyncio.gather(*(run.until(WARM_TOKENS) for run in runs[-STREAMED:]))
        await ask(llm, "meter")
        begin = time.perf_counter()
        await asyncio.sleep(sizes.decoding_s)
        end = time.perf_counter()
        lines = await ask(llm, "meter")
        if any(run.over for run in runs):
            raise RuntimeError("a request ended within the window")
    finally:
        tasks = [run.task for run in runs if run.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await at_rest(llm)
    found = _found(slots, runs[-STREAMED:], lines, begin, end)
    if found["steps"]["decode_steps"] < found["steps"]["steps"] - 2:
        raise RuntimeError("somebody had a prompt within the window")
    return found


def _found(slots: int, streams: list[Request], lines: list[Line], begin: float, end: float) -> dict[str, Any]:
    if not lines:
        raise RuntimeError("the engine stood still")
    gaps = [
        (after - before) * 1e3
        for stream in streams
        for before, after in itertools.pairwise(stream.times)
        if begin <= before and after <= end
    ]
    measured = steps(lines, begin, end)
    return {
        "slots": slots,
        "output_tokens_per_s": measured["output_tokens"] / (end - begin),
        "inter_token_ms": statistics.median(gaps),
        "inter_tokens": len(gaps),
        "steps": measured,
    }
