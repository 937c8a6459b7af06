"""Clients of the worker's HTTP endpoint: streamed completions, and when each token came.

The plain OpenAI API over httpx, as any client would use it. Called by the acts.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

import httpx
import msgspec

from coxswain.control.demo.load import Ask
from coxswain.control.demo.processes import DemoError

MODEL: Final = "tiny"
"""The name that the worker serves its model under."""


class Usage(msgspec.Struct, frozen=True):
    """Tokens so far."""

    completion_tokens: int = 0


class Choice(msgspec.Struct, frozen=True):
    """A piece of the text."""

    text: str = ""
    finish_reason: str | None = None


class Chunk(msgspec.Struct, frozen=True):
    """One event of a streamed completion."""

    choices: tuple[Choice, ...] = ()
    usage: Usage | None = None


_decode = msgspec.json.Decoder(Chunk).decode


@dataclass(eq=False)
class Stream:
    """One streamed completion as its client sees it; it grows while it runs. Times are monotonic seconds."""

    tenant: str
    ask: Ask
    request: str = ""
    """The X-Request-Id of the response: the name that commands take. Empty until the headers are there."""
    text: str = ""
    tokens: int = 0
    sent_at: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """When something came, and how many tokens there were then."""
    reason: str | None = None
    """Why it ended (`length`, `abort`); None until then."""
    ended_at: float | None = None

    @property
    def ttft_s(self) -> float | None:
        """Request sent to first token received, or None so far."""
        return self.arrivals[0][0] - self.sent_at if self.arrivals else None

    def take(self, chunk: Chunk, now: float) -> None:
        """Add a piece."""
        if chunk.usage is not None and chunk.usage.completion_tokens > self.tokens:
            self.tokens = chunk.usage.completion_tokens
            self.arrivals.append((now, self.tokens))
        for choice in chunk.choices:
            self.text += choice.text
            self.reason = choice.finish_reason or self.reason


class Endpoint:
    """The worker's HTTP endpoint and one API key per tenant. Use `async with`."""

    def __init__(self, url: str, keys: Mapping[str, str]) -> None:
        self.url = url
        self.keys = keys
        # A request may wait or be held for as long as somebody wants. A connection is used once: the server
        # closes idle ones after some seconds, perhaps just as the next request goes out.
        self._http = httpx.AsyncClient(
            base_url=url,
            trust_env=False,
            timeout=httpx.Timeout(None, connect=10.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def healthy(self) -> bool:
        """Whether the server answers yet."""
        try:
            return (await self._http.get("/health", timeout=2.0)).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    async def run(self, stream: Stream, on_piece: Callable[[Stream], None] = lambda _: None) -> Stream:
        """Send `stream.ask` and fill `stream` until it ends; `on_piece` is called after every piece.

        Raises:
            DemoError: the server refused it, or the connection was lost.
        """
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": stream.ask.prompt,
            "max_tokens": stream.ask.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        headers = {"Authorization": f"Bearer {self.keys[stream.tenant]}"}
        stream.sent_at = time.monotonic()
        try:
            async with self._http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
                stream.request = response.headers.get("x-request-id", "")
                if response.status_code != httpx.codes.OK:
                    said = (await response.aread()).decode(errors="replace")
                    raise DemoError(f"the worker refused a request with {response.status_code}: {said[:500]}")
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        stream.take(_decode(line[6:]), time.monotonic())
                        on_piece(stream)
        except httpx.HTTPError as error:
            raise DemoError(
                f"the connection to the worker was lost: {type(error).__name__} {error}"
            ) from error
        except msgspec.MsgspecError as error:
            raise DemoError(f"the worker sent something that is no completion: {error}") from error
        stream.ended_at = time.monotonic()
        return stream

    def start(self, group: asyncio.TaskGroup, tenant: str, ask: Ask) -> Stream:
        """Begin a completion as a task of `group`."""
        stream = Stream(tenant, ask)
        group.create_task(self.run(stream))
        return stream
