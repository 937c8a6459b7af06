"""Interactive requests beside a batch that fills the engine: who waits how long, and what the batch still gets.

Called by `host`. The same arrivals in every variant; a variant is how the engine is told to treat them.
"""

import asyncio
import random
import time
from typing import Any

from msgspec.structs import replace

from bench.gpu.engine import ask
from bench.gpu.load import Line, Request, backlog, prompt, steps
from bench.gpu.plan import STEERED, Sizes
from bench.gpu.wire import INTERACTIVE, name

LINGER_S = 0.5
"""How long the batch's step budget outlasts the last interactive request: some ten times their mean distance."""

STAGES = (
    "to the engine", "until scheduled", "launched", "the step before", "the next launched", "its step", "to the client",
)  # fmt: skip
"""Of a time to first token. A step waits for the one before it; the next is launched before its output is looked at."""

BLOCK_S = 0.5
"""Batch tokens are counted in blocks of this length."""


def due_times(sizes: Sizes) -> list[float]:
    """When interactive requests arrive, in seconds from the beginning: Poisson, the same in every variant."""
    source = random.Random(11)
    now, times = 0.0, []
    for _ in range(sizes.arrivals):
        now += source.expovariate(sizes.rate)
        times.append(now)
    return times


async def arrive(llm: Any, sizes: Sizes) -> list[Request]:
    """Send them when they are due, whatever became of the ones before (open loop)."""
    begin = time.perf_counter()
    sent = []
    for index, at in enumerate(due_times(sizes)):
        await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
        text = prompt(7_000_000 + index, sizes.interactive.prompt)
        request = Request(llm, name(INTERACTIVE), text, sizes.interactive.tokens, due=begin + at)
        sent.append(request.start())
    return sent


async def colocation(
    llm: Any, wire: Any, sizes: Sizes, *, variant: str, batch: bool = True, interactive: bool = True,
    policy: str = "fcfs", cut_in: str = "off", spare: int = 0, budget: int | None = None,
    steady: bool = False, aside: bool = False, sparse: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One variant: time to first token of every interactive request, batch tokens/s while they arrive.

    Args:
        llm: the engine.
        wire: commands to it; None for stock.
        sizes: of the run.
        variant: its name in the tables.
        batch: whether the batch is there.
        interactive: whether the interactive requests are.
        policy: stock's.
        cut_in: of the interactive class, ours.
        spare: slots for holds, ours.
        budget: the batch's prefill tokens per step, ours.
        aside: whether the batch leaves the step in which an interactive request begins to it, ours.
        steady: whether the batch's ends are spread evenly, as after a long time; else it begins at once and
            goes on in waves, and slots become free together.
        sparse: whether interactive requests are few.
    """
    if sparse:
        sizes = replace(sizes, rate=sizes.sparse_rate, arrivals=sizes.sparse_arrivals)
    slots = sizes.slots[0]
    await ask(llm, "resize", {"active": slots, "spare": spare, "policy": policy})
    before = None
    if wire is not None:
        wire.ignored.clear()
        await wire.classes(cut_in=cut_in, budget=budget, linger_s=LINGER_S, aside=aside)
        before = await wire.status()
    count = sizes.outstanding if batch else 0
    # Lower runs first; under fcfs nobody looks at it.
    async with backlog(
        llm, count, sizes.shapes[0], staggered=slots * steady, priority=int(policy == "priority")
    ):
        await asyncio.sleep(sizes.ramp_s[0] if batch else 0)
        found = await _window(llm, sizes, interactive=interactive)
        if wire is not None:
            after = await wire.status()
            found["preempted"] = after.preempted_total - before.preempted_total
            found["recomputed_tokens"] = after.recomputed_tokens_total - before.recomputed_tokens_total
            found["ignored"] = sorted(wire.ignored)
    if batch and found["batch_tokens_per_s"] < 1:
        raise RuntimeError(f"the batch stood still: {found['steps']}")
    return {"variant": variant, "side": STEERED if wire is not None else "stock", "cut_in": cut_in, "spare": spare,
            "budget": budget, "policy": policy, "steady": steady, "aside": aside, "rate": sizes.rate,
            **found}  # fmt: skip


async def _window(llm: Any, sizes: Sizes, *, interactive: bool) -> dict[str, Any]:
    await ask(llm, "meter")
    await ask(llm, "stages")
    begin = time.perf_counter()
    sent = await arrive(llm, sizes) if interactive else []
    if not interactive:
        await asyncio.sleep(due_times(sizes)[-1])
    end = time.perf_counter()
    lines = await ask(llm, "meter")
    tasks = [request.task for request in sent]
    if tasks:
        done, late = await asyncio.wait(tasks, timeout=sizes.drain_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for task in done:
            task.result()
    stages = await ask(llm, "stages")
    measured = steps(lines, begin, end)
    arrived = [at for request in sent for at in request.times]
    theirs = sum(begin <= at <= end for at in arrived)
    return {
        "window_s": end - begin,
        "ttft_s": [request.times[0] - request.began for request in sent if request.times],
        "stages_s": _stages(sent, stages),
        "inter_token_s": _gaps(sent),
        "unanswered": sum(not request.times for request in sent),
        "batch_tokens_per_s": (measured["output_tokens"] - theirs) / (end - begin),
        "batch_tokens_by_block": _blocks(lines, arrived, begin, end),
        "interactive_tokens_per_s": theirs / (end - begin),
        "steps": measured,
    }


def _blocks(lines: list[Line], arrived: list[float], begin: float, end: float) -> list[int]:
    """Batch tokens in each whole block of time: what an interval of the rate is drawn from."""
    blocks = [0] * int((end - begin) / BLOCK_S)
    tokens = [*((line[0], line[3]) for line in lines), *((at, -1) for at in arrived)]
    for at, count in tokens:
        place = int((at - begin) / BLOCK_S)
        if 0 <= place < len(blocks):
            blocks[place] += count
    return blocks


def _stages(sent: list[Request], seen: dict[str, list[float]]) -> dict[str, list[float]]:
    """What times to first token are made of: the way to the engine, what its one thread does, the way back."""
    engine = {name.rpartition("-")[0]: times for name, times in seen.items()}
    passed = [
        (request.began, *engine[request.name], request.times[0])
        for request in sent
        if request.times and len(engine.get(request.name, ())) == len(STAGES) - 1
    ]
    return {
        stage: [times[place + 1] - times[place] for times in passed] for place, stage in enumerate(STAGES)
    }


def _gaps(sent: list[Request]) -> list[float]:
    """Per request: the mean time between its tokens."""
    return [
        (request.times[-1] - request.times[0]) / (len(request.tokens) - 1)
        for request in sent
        if len(request.tokens) > 1
    ]
