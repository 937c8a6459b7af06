"""Clients under load: each sends one streaming completion after the other and knows every token that must come.

The simulated device says what the prompt's hash says, so a disturbed stream is compared with an undisturbed one without
running it. Closed loop: `rest` lets what is under way end and begins nothing new.
"""

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import httpx
import msgspec

from coxswain.service.simulated.tokens import Vocabulary, seed_of
from tests.faults.fleet import TENANT_HEADER, Fleet, Worker
from tests.support.serving import Stream

TENANTS: Final = ("acme", "globex")
CLIENTS: Final = 3
"""Of each tenant, on each worker."""
STORM: Final = "storm"
"""The tenant of those that leave in the middle."""
REST_S: Final = 60.0
AGAIN_S: Final = 0.2


@dataclass(eq=False)
class Asked:
    """One request, as its client saw it."""

    worker: str
    life: int
    """Of the worker, when it was sent."""
    tenant: str
    expected: list[int]
    stream: Stream
    left: bool = False
    """Whether its client went away."""
    error: str = ""
    """What became of it, if it did not end well: the server's status, or how the connection was lost."""
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0

    @property
    def verdict(self) -> str:
        """`ok`, `left`, `failed` (its client was told so), `empty` (an answer without a word), or what is wrong."""
        said, ends = self.stream.tokens, sum(piece.finish is not None for piece in self.stream.pieces)
        if said != self.expected[: len(said)]:
            return f"other tokens than undisturbed: {said} for {self.expected}"
        if self.left or self.error:
            return "left" if self.left else "failed"
        if not said and not ends:
            return "empty"
        if said != self.expected or ends != 1 or self.stream.finish != "length":
            return f"{len(said)} of {len(self.expected)} tokens, {ends} ends, finish {self.stream.finish}"
        return "ok"

    def gaps(self) -> Iterator[tuple[float, float]]:
        """Every wait of the client for a token: (when it ended, how long it was), `time.perf_counter` seconds."""
        last = self.stream.began
        for piece in self.stream.pieces:
            yield piece.at, piece.at - last
            last = piece.at


class Load:
    """All clients of a fleet.

    Args:
        fleet: whom they ask.
        seed: of prompts and lengths.
    """

    def __init__(self, fleet: Fleet, seed: int = 0) -> None:
        self.asked: list[Asked] = []
        """Every request since `forget`, in the order in which they were sent."""
        self.live: set[Asked] = set()
        self._fleet = fleet
        self._dice = random.Random(seed)
        config = msgspec.json.decode((fleet.model / "config.json").read_bytes())
        self._words = range(5, config["vocab_size"])
        self._vocabulary = Vocabulary(config["vocab_size"], frozenset({config["eos_token_id"]}))
        self._going = asyncio.Event()
        # A connection is used once: servers close idle ones, perhaps just as the next request goes out.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = {
            worker.name: httpx.AsyncClient(base_url=worker.http, timeout=None, limits=limits, trust_env=False)
            for worker in fleet.workers.values()
        }
        self._clients = [
            asyncio.create_task(self._client(worker, tenant))
            for worker in fleet.workers.values()
            for tenant in TENANTS
            for _ in range(CLIENTS)
        ]

    def go(self) -> None:
        """Ask, and go on asking."""
        self._going.set()

    async def rest(self) -> None:
        """Ask nothing more, and wait until everything has ended."""
        self._going.clear()
        async with asyncio.timeout(REST_S):
            while self.live:  # noqa: ASYNC110 - whoever ends need not say so
                await asyncio.sleep(0.05)

    def forget(self) -> None:
        """Forget what has ended."""
        self.asked = [one for one in self.asked if one in self.live]

    def begin(self, worker: Worker, tenant: str, tokens: int) -> Asked:
        """Send one request."""
        prompt = self._dice.choices(self._words, k=self._dice.randrange(4, 60))
        expected = [self._vocabulary.token(seed_of(prompt), len(prompt) + place) for place in range(tokens)]
        body = {
            "model": "tiny", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True,
            "return_token_ids": True,
        }  # fmt: skip
        stream = Stream(self._http[worker.name], None, body, {TENANT_HEADER: tenant})
        asked = Asked(worker.name, worker.life, tenant, expected, stream)
        self.asked.append(asked)
        self.live.add(asked)
        return asked

    async def end(self, asked: Asked) -> None:
        """Wait until it has ended, somehow."""
        try:
            await asked.stream.task
        except (httpx.HTTPError, RuntimeError, msgspec.MsgspecError, AssertionError) as error:
            asked.error = f"{type(error).__name__} {error}"[:200]
        finally:
            asked.ended = time.monotonic()
            self.live.discard(asked)

    async def leave(self, asked: Asked) -> None:
        """Go away from it."""
        asked.left = True
        asked.stream.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.end(asked)

    async def close(self) -> None:
        """End all clients."""
        for client in self._clients:
            client.cancel()
        for asked in tuple(self.live):
            asked.stream.task.cancel()
        await asyncio.gather(*self._clients, *(one.stream.task for one in self.live), return_exceptions=True)
        for http in self._http.values():
            await http.aclose()

    async def _client(self, worker: Worker, tenant: str) -> None:
        while True:
            await self._going.wait()
            asked = self.begin(worker, tenant, self._dice.randrange(5, 40))
            await self.end(asked)
            if asked.error:
                await asyncio.sleep(AGAIN_S)
