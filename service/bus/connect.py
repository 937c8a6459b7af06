"""Opening and closing a NATS client, with the habits of nats-py that one must know in one place.

* A client never reconnects by itself: its buffers would outlive the connection and deliver what is stale, and
  some errors close it for good. A fresh client each time has neither problem; `loop.py` retries.
* A callback that raises kills the client's read loop in silence: ours cannot raise.
* `close` can wait for ever for a frozen server to take the last bytes: ours gives up.

Called by `loop.py`.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Final

from nats.aio.client import Client
from nats.errors import Error as NatsError

from coxswain.schemas.connection import Connection


class _Client(Client):
    """nats-py's client, which never goes on in the clear where TLS was asked for."""

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if self.options.get("tls") and not info.get("tls_required"):
            raise NatsError("the server offers no TLS, and COX_NATS_CA or _CERT asks for it")
        await super()._process_info(info, initial_connection)


CONNECT_TIMEOUT_S: Final = 2
CLOSE_S: Final = 1.0
"""How long a client may take to close before it is left behind."""


async def connect(
    connection: Connection,
    *,
    name: str,
    on_error: Callable[[Exception], None],
    on_closed: Callable[[], None],
) -> Client:
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

    client = _Client()
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
