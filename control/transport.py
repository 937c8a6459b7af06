"""One way to connect to NATS, for the client and the controller alike.

Lives here: TLS, reconnection with jitter, callbacks that never raise (one that does would silently kill
nats-py's read loop). Nothing is buffered while disconnected: a stale command must never be delivered late.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any

from nats.aio.client import Server
from nats.errors import Error as NatsError

from coxswain.common.connection import Connection, IdentityRefusedError, without_users
from coxswain.control.errors import UnreachableError
from coxswain.control.link import Link

MAX_DELAY_S = 2.0
"""Longest wait between two attempts to reconnect."""

Notice = Callable[[str], None]
"""Told what happened to a connection once there was one: `lost`, `back`, `closed` or the text of an error."""


def next_server(servers: list[Server], last: str | None) -> tuple[Server, float]:
    """Choose where to reconnect and after how many seconds: exponential, with full jitter.

    Args:
        servers: all that there are.
        last: `Link.last_address`, of the one that was lost, or tried in vain; another is chosen if there is one, for a
            frozen server takes each attempt's whole timeout.
    """
    others = [server for server in servers if server.uri.netloc != last]
    server = random.choice(others or servers)  # noqa: S311  (spreads load, guards nothing)
    ceiling = min(MAX_DELAY_S, 0.1 * 2.0 ** min(server.reconnects, 10))
    return server, random.uniform(0.02, ceiling)  # noqa: S311


async def open_link(
    connection: Connection,
    *,
    name: str,
    timeout_s: float,
    notice: Notice = lambda _: None,
) -> Link:
    """Connect, and stay connected for ever after; give up the first attempt once every server refused it.

    Args:
        connection: where NATS is and who we are.
        name: shown in NATS monitoring.
        timeout_s: longest wait for the first connection.
        notice: told of changes of the connection; must not raise or block.

    Raises:
        UnreachableError: what was tried, why it failed, what to do.
    """
    nc = Link()
    failures: list[str] = []
    refused = asyncio.Event()
    open_for_good = False

    async def on_error(error: Exception) -> None:
        if open_for_good:
            nc.hear_error(str(error))
            return notice(str(error))
        failures.append(str(error) or type(error).__name__)
        if len(failures) >= len(connection.urls):
            refused.set()
        return None

    def say(what: str) -> Callable[[], Awaitable[None]]:
        async def callback() -> None:
            if open_for_good:  # closing a client that never was connected counts as a loss to nats-py
                notice(what)

        return callback

    options = _identity(connection) | {
        "name": name,
        "pending_size": 0,
        "max_reconnect_attempts": -1,
        "reconnect_to_server_handler": lambda servers, _info: next_server(servers, nc.last_address),
        "error_cb": on_error,
        "disconnected_cb": say("lost"),
        "reconnected_cb": say("back"),
        "closed_cb": say("closed"),
        "connect_timeout": max(1, round(timeout_s)),
    }
    attempt = asyncio.ensure_future(_connect(nc, options))
    gave_up = asyncio.ensure_future(refused.wait())
    try:
        await asyncio.wait({attempt, gave_up}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if attempt.done() and attempt.exception() is None:
            open_for_good = True
            return nc
    finally:
        for task in (attempt, gave_up):
            task.cancel()
        await asyncio.gather(attempt, gave_up, return_exceptions=True)
        if not open_for_good:
            await nc.close()
    why = str(attempt.exception()) if not attempt.cancelled() and attempt.exception() else ""
    raise UnreachableError(
        f"NATS cannot be reached at {without_users(', '.join(connection.urls))}: "
        f"{why or (failures[-1] if failures else f'no answer within {timeout_s:g} s')}. "
        "Start nats-server, or set COX_NATS_URL (and COX_NATS_CREDS or _NKEY where it asks who you are).",
    )


def _identity(connection: Connection) -> dict[str, Any]:
    try:
        options = connection.options()
        if context := connection.tls():
            options["tls"] = context
            logging.getLogger("asyncio").addFilter(_worth_saying)
    except IdentityRefusedError as error:
        raise UnreachableError(str(error)) from error
    return options


def _worth_saying(record: logging.LogRecord) -> bool:
    """Not what every TLS connection of nats-py's says when it ends, and means nothing."""
    return "eof_received()" not in record.getMessage()


async def _connect(nc: Link, options: dict[str, Any]) -> None:
    try:
        await nc.connect(**options)
    except (NatsError, OSError, ValueError) as error:
        raise UnreachableError(str(error) or type(error).__name__) from error
