"""Opening and closing a NATS client, with the habits of nats-py that one must know in one place.

* A client never reconnects by itself: its buffers would outlive the connection and deliver what is stale, and
  some errors close it for good. A fresh client each time has neither problem; `loop.py` retries.
* A callback that raises kills the client's read loop in silence: ours cannot raise.
* Whoever asks chooses where the answer goes, and `Msg.respond` (service discovery) takes any subject: ours does not.
* `close` can wait for ever for a frozen server to take the last bytes: ours gives up.

Called by `loop.py` and `edge/status.py`.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from typing import Final

from nats.aio.client import Client
from nats.aio.msg import Msg

from coxswain.common.connection import Connection
from coxswain.common.nats_client import NatsClient
from coxswain.service.bus.intake import answerable

BACKOFF_S: Final = (0.1, 5.0)
"""First and longest pause between connections; doubled each time, and jittered against herds."""
CONNECT_TIMEOUT_S: Final = 2
CLOSE_S: Final = 1.0
"""How long a client may take to close before it is left behind."""


class _Asked(Msg):
    async def respond(self, data: bytes) -> None:
        if self.reply and answerable(self.reply):
            await super().respond(data)


class Backoff:
    """The pauses between one connection and the next: they grow, unless a connection lasted."""

    def __init__(self) -> None:
        self._failures = 0
        self._since = time.monotonic()

    async def pause(self) -> None:
        """A connection ended, or there was none."""
        if time.monotonic() - self._since > BACKOFF_S[1]:
            self._failures = 0
        pause_s = min(BACKOFF_S[0] * 2**self._failures, BACKOFF_S[1])
        await asyncio.sleep(random.uniform(0.5, 1.0) * pause_s)  # noqa: S311
        self._failures = min(self._failures + 1, 16)
        self._since = time.monotonic()


async def connect(
    connection: Connection,
    *,
    name: str,
    on_error: Callable[[Exception], None],
    on_closed: Callable[[], None],
) -> NatsClient:
    """A connected client; each address is tried, in random order.

    Args:
        connection: where, and who we are.
        name: what `nats server report connections` shows.
        on_error: told of every error that has no other way to be known; must not raise.
        on_closed: told when the connection is lost and closed; must not raise.

    Raises:
        Exception: whatever kept it from connecting: the network, TLS, files, credentials.
    """

    async def error_cb(error: Exception) -> None:
        on_error(error)

    async def closed_cb() -> None:
        on_closed()

    client = NatsClient()
    client.msg_class = _Asked
    try:
        await client.connect(
            **connection.options(),
            name=name,
            tls=connection.tls(),
            no_echo=True,
            error_cb=error_cb,
            closed_cb=closed_cb,
            connect_timeout=CONNECT_TIMEOUT_S,
            pending_size=0,
            allow_reconnect=False,
            max_reconnect_attempts=1,  # of one attempt to connect; 0 would mean for ever
            reconnect_time_wait=0,
        )
    except BaseException:
        await close(client)
        raise
    return client


async def close(client: Client) -> None:
    """Close a client, or leave it behind after `CLOSE_S`."""
    closing = asyncio.ensure_future(client.close())
    await asyncio.wait((closing,), timeout=CLOSE_S)
    if not closing.done():
        closing.cancel()
        return
    with contextlib.suppress(Exception):  # it is closed, whatever it says
        closing.result()
