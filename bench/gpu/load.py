"""Requests to an engine, and what is measured on them: one request, a backlog that never ends, step statistics.

Called by the parts. Times are `perf_counter` seconds, which the engine's process shares.
"""

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from bench.gpu.engine import at_rest
from bench.gpu.plan import Shape
from bench.gpu.wire import BATCH, name

FIRST, LAST = 100, 30_000
"""Token ids that prompts are made of."""


def prompt(seed: int, length: int) -> list[int]:
    """A prompt that no other seed has."""
    return random.Random(seed).choices(range(FIRST, LAST), k=length)


class Request:
    """One request: its tokens as they arrive, and when each did.

    Args:
        llm: the engine.
        prompt_: token ids, or what a streaming session says, as an iterator of `StreamingInput`.
        tokens: exactly so many come out.
        priority: vLLM's own, which stock schedules by.
        stream: False gets all tokens at the end, which spares the front end most of its work.
        due: when it should have been sent; its latency counts from there. Default: now.
        params: sampling parameters beside those of a greedy request.
        options: what else `generate` takes.
    """

    def __init__(
        self, llm: Any, id_: str, prompt_: Any, tokens: int, *, priority: int = 0, stream: bool = True,
        due: float | None = None, params: dict[str, Any] | None = None, options: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.name = id_
        self.tokens: list[int] = []
        """What it said; of several children (`n`) the first."""
        self.lines: dict[int, list[int]] = {0: self.tokens}
        """What every child said."""
        self.times: list[float] = []
        self.began = time.perf_counter() if due is None else due
        self.over = False
        self._news = asyncio.Event()
        self._arguments = (llm, prompt_, tokens, {"priority": priority, **(options or {})}, stream)
        self._params = params or {}
        self.task: asyncio.Task[None] | None = None

    def start(self) -> "Request":
        """Send it, in a task of its own."""
        self.task = asyncio.create_task(self.read())
        return self

    async def read(self) -> None:
        """Send it and read it to the end; cancelling aborts it."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        llm, prompt_, tokens, options, stream = self._arguments
        fields = {"temperature": 0.0, "ignore_eos": True, **self._params}
        params = SamplingParams(
            max_tokens=tokens, detokenize=False, **fields,
            output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        try:
            text = TokensPrompt(prompt_token_ids=prompt_) if isinstance(prompt_, list) else prompt_
            async for output in llm.generate(text, params, self.name, **options):
                for part in output.outputs:
                    new = part.token_ids
                    self.times.extend([time.perf_counter()] * len(new))
                    self.lines.setdefault(part.index, []).extend(new)
                self._news.set()
        finally:
            self.over = True
            self._news.set()

    @property
    def said(self) -> int:
        """Tokens so far, of all children."""
        return sum(map(len, self.lines.values()))

    async def until(self, count: int) -> None:
        """Wait until so many tokens are here; raises what the request died of."""
        while len(self.tokens) < count and not self.over:
            self._news.clear()
            await self._news.wait()
        if self.over and self.task is not None:
            await self.task


class Backlog:
    """A batch: `count` requests outstanding at all times, each end followed by the next.

    The first `staggered` ones are shorter, by even steps, so that ends are spread from the beginning as they
    are after a long time.
    """

    def __init__(
        self, llm: Any, count: int, shape: Shape, *, staggered: int, priority: int = 0, streamed: int = 0
    ) -> None:
        self._llm = llm
        self._shape = shape
        self._staggered = staggered
        self._priority = priority
        self.streams: list[Request] = []
        """Requests of the first `streamed` places, which are read token by token."""
        self._tasks = [asyncio.create_task(self._place(index, index < streamed)) for index in range(count)]

    async def _place(self, index: int, stream: bool) -> None:
        tokens = self._shape.tokens
        turn = 0
        while True:
            now = (
                max(1, tokens * (index + 1) // self._staggered)
                if not turn and index < self._staggered
                else tokens
            )
            text = prompt(turn * 100_000 + index, self._shape.prompt)
            request = Request(self._llm, name(BATCH), text, now, priority=self._priority, stream=stream)
            if stream:
                self.streams.append(request)
            await request.read()
            turn += 1

    def check(self) -> None:
        """Raise what any of it died of."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    async def stop(self) -> None:
        """Abort all of it and wait until the engine is at rest."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await at_rest(self._llm)


@asynccontextmanager
async def backlog(llm: Any, count: int, shape: Shape, **options: Any) -> AsyncIterator[Backlog]:
    """A backlog for the length of a block."""
    batch = Backlog(llm, count, shape, **options)
    try:
        yield batch
        batch.check()
    finally:
        await batch.stop()


Line = tuple[float, int, int, int, int]


def steps(lines: list[Line], begin: float, end: float) -> dict[str, float]:
    """What a meter's lines say of the time between two moments."""
    inside = [line for line in lines if begin <= line[0] <= end]
    gaps = sorted((b[0] - a[0]) * 1e3 for a, b in itertools.pairwise(inside))
    if not gaps:
        return {"steps": len(inside), "output_tokens": sum(line[3] for line in inside)}
    # A step that only decodes takes the same time whatever comes and goes: what a small difference shows in.
    decode = [(b[0] - a[0]) * 1e3 for a, b in itertools.pairwise(inside) if a[2] == a[1] and b[2] == b[1]]
    return {
        "steps": len(inside),
        "decode_steps": len(decode),
        "decode_step_ms": statistics.median(decode) if decode else 0.0,
        "output_tokens": sum(line[3] for line in inside),
        "scheduled_tokens": sum(line[2] for line in inside),
        "requests_per_step": statistics.median(line[1] for line in inside),
        "held_most": max(line[4] for line in inside),
        "step_ms": statistics.median(gaps),
        "step_p99_ms": gaps[int(len(gaps) * 0.99)],
    }
