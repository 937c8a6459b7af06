"""What keeping the KV of a held request saves: time from `continue` to its next token, kept against recomputed.

Called by `host`. One request with a long context is held and continued again and again, alone on the engine
and beside others that decode.
"""

import asyncio
import time
from typing import Any

from bench.gpu.engine import ask
from bench.gpu.load import Request, backlog, prompt
from bench.gpu.plan import Shape, Sizes
from bench.gpu.wire import BATCH, name

REST_S = 0.15
"""Between hold and continue: longer than any step, so that what was in flight has arrived."""


async def continuing(llm: Any, wire: Any, sizes: Sizes, *, context: int) -> dict[str, Any]:
    """Hold and continue a request of `context` prompt tokens: kept and dropped, alone and beside others."""
    await ask(llm, "resize", {"active": sizes.slots[0], "spare": sizes.spare, "policy": "fcfs"})
    await wire.classes()
    found: dict[str, Any] = {"context": context}
    for beside in (0, sizes.beside):
        # Long outputs, all begun before: steady decodes and no other prefill.
        others = Shape(128, sizes.max_model_len - 256)
        async with backlog(llm, beside, others, staggered=0):
            await asyncio.sleep(1.0 if beside else 0)
            for kv in ("keep", "drop"):
                found[f"{kv}, beside {beside}"] = await _cycles(llm, wire, sizes, context, kv)
    return found


async def _cycles(llm: Any, wire: Any, sizes: Sizes, context: int, kv: str) -> dict[str, Any]:
    text = prompt(context, context)
    request = Request(llm, name(BATCH), text, sizes.max_model_len - context - 8).start()
    await request.until(4)
    before = (await wire.status()).recomputed_tokens_total
    spent = []
    for _ in range(sizes.cycles):
        await wire("preempt", [request.name], kv=kv)
        await asyncio.sleep(REST_S)
        seen = len(request.tokens)
        began = time.perf_counter()
        waiting = asyncio.create_task(request.until(seen + 1))
        await wire("continue", [request.name])
        await waiting
        spent.append(request.times[seen] - began)
        await request.until(seen + 4)
    after = (await wire.status()).recomputed_tokens_total
    assert request.task is not None
    request.task.cancel()
    await asyncio.gather(request.task, return_exceptions=True)
    return {"next_token_s": spent, "recomputed_tokens": after - before, "cycles": sizes.cycles}
