"""A NATS client that says so when the server does not let us: nats-py tells that to a callback only.

Without it a refused request looks like a worker that does not answer, and a refused subscription like a quiet
fleet. Called by `transport.py`, which opens it.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from coxswain.common.nats_client import NatsClient
from coxswain.control.errors import DeniedError

_VIOLATION: Final = re.compile(
    r'permissions violation for (publish|subscription) to "([^"]*)"', re.IGNORECASE
)
_WORDS: Final = {"publish": "send to", "subscription": "hear"}

FLUSH_S: Final = 2

T = TypeVar("T")


class Link(NatsClient):
    """nats-py's client; `request` and `subscribe` raise `DeniedError` where the server refuses them."""

    def __init__(self) -> None:
        super().__init__()
        self._asking: dict[str, list[asyncio.Future[DeniedError]]] = {}

    @property
    def last_address(self) -> str | None:
        """Of the server that we are connected to, or were, or tried since: what its URL says between slashes."""
        return None if self._current_server is None else self._current_server.uri.netloc

    def hear_error(self, text: str) -> None:
        """Take note of an error that the server sent; must be told of every one."""
        if not (found := _VIOLATION.search(text)):
            return
        what, subject = found.groups()
        error = DeniedError(
            f"NATS refused: this user may not {_WORDS[what.lower()]} {subject}. "
            "Use a key whose role may (COX_NATS_NKEY; roles: docs/security.md).",
        )
        # Lower case: nats-py's parser makes it of what the server said.
        for future in self._asking.get(f"{what} {subject}".lower(), ()):
            if not future.done():
                future.set_result(error)

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        timeout: float = 0.5,  # noqa: ASYNC109 - nats-py's signature
        old_style: bool = False,
        headers: dict[str, Any] | None = None,
    ) -> Msg:
        """As nats-py's.

        Raises:
            DeniedError: we may not publish there.
        """
        return await self.unless_denied(
            subject, lambda: super(Link, self).request(subject, payload, timeout, old_style, headers)
        )

    async def subscribe(self, subject: str, *arguments: Any, **options: Any) -> Subscription:
        """As nats-py's, and waits until the server has it.

        Not for an inbox of our own, which is always ours: JetStream's ordered consumers (KV watches) count what arrives
        from when this returns, and begin again from the first message if something came before.

        Raises:
            DeniedError: we may not hear it.
        """
        if subject.startswith(self._inbox_prefix.decode()):
            return await super().subscribe(subject, *arguments, **options)
        with self._told("subscription", subject) as denied:
            subscription = await super().subscribe(subject, *arguments, **options)
            with suppress(nats.errors.Error):  # lost meanwhile: the next connection subscribes again
                # The answer comes behind a refusal; twice, for nats-py's first PING overtakes what is pending.
                await self.flush(FLUSH_S)
                await self.flush(FLUSH_S)
            if denied.done():
                raise denied.result()
        return subscription

    async def unless_denied(self, subject: str, work: Callable[[], Awaitable[T]]) -> T:
        """What `work`, which publishes to `subject`, returns.

        Raises:
            DeniedError: we may not publish there.
        """
        with self._told("publish", subject) as denied:
            working = asyncio.ensure_future(work())
            both: list[asyncio.Future[Any]] = [working, denied]
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if denied.done() and not working.done():
                    raise denied.result()
                return await working
            finally:
                if not working.done():
                    working.cancel()
                    await asyncio.wait({working})

    @contextmanager
    def _told(self, what: str, subject: str) -> Iterator[asyncio.Future[DeniedError]]:
        key = f"{what} {subject}".lower()
        future: asyncio.Future[DeniedError] = asyncio.get_running_loop().create_future()
        self._asking.setdefault(key, []).append(future)
        try:
            yield future
        finally:
            self._asking[key].remove(future)
            if not self._asking[key]:
                del self._asking[key]
            future.cancel()
