"""What steering costs a busy engine: output tokens/s and the time between tokens, status and events on.

Called by `host`, on stock and steered in turns.
"""

import asyncio
import itertools
import statistics
import time
from typing import Any

from bench.gpu.engine import ask
from bench.gpu.load import backlog, steps
from bench.gpu.plan import Sizes

STREAMED = 16
"""Streams that are read token by token: enough for a median, too few to load the front end."""


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
    if not lines:
        raise RuntimeError("the engine stood still")
    gaps = [
        (after - before) * 1e3
        for stream in batch.streams
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
