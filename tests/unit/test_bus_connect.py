"""A worker's connection to NATS, at a server that does as it should not."""

import asyncio
import json
import socket
import struct
from contextlib import nullcontext
from typing import Any, Self

import pytest
import uvloop
from nats.errors import Error

from coxswain.common import nats_client
from coxswain.common.connection import Connection
from coxswain.common.logs import get_logger
from coxswain.common.nats_client import NatsClient
from coxswain.schemas.subjects import Subjects
from coxswain.service.bus.connect import connect
from coxswain.service.bus.eventlog import EventLog
from coxswain.service.bus.frames import Frames
from coxswain.service.bus.session import MAX_UNSENT, Session
from coxswain.service.config import Settings
from coxswain.service.port import AnswerOut, Port
from tests.support.engine import frame

INFO = (
    b"INFO " + json.dumps({"server_id": "x", "version": "2.12.0", "max_payload": 1 << 20}).encode() + b"\r\n"
)
WITHIN_S = 20.0


class Deaf:
    """A NATS server that greets, then reads nothing, and resets the connection when it is told to."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._greet, "127.0.0.1", 0, limit=1_024)
        host, port = self._server.sockets[0].getsockname()
        self.url = f"nats://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(INFO)
        while not (await reader.readline()).startswith(b"PING"):
            pass
        writer.write(b"PONG\r\n")
        self._transport: Any = writer.transport
        self._transport.pause_reading()

    def reset(self) -> None:
        """End the connection without a word: RST, as for a client that is too slow."""
        linger = struct.pack("ii", 1, 0)
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._transport.abort()


def test_a_connection_that_is_reset_with_bytes_unsent_is_over() -> None:
    """Whoever waits for its end is told, no subscription is left behind, and no task fails."""

    async def run() -> list[dict[str, Any]]:
        failures: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        closed = asyncio.Event()
        async with Deaf() as server, asyncio.timeout(WITHIN_S):
            connection = Connection(urls=(server.url,), fleet="main")
            client = await connect(connection, name="t", on_error=lambda _: None, on_closed=closed.set)
            await client.subscribe("a")
            while client.pending_data_size < 4 << 20:
                writing = asyncio.ensure_future(client.publish("b", bytes(1 << 19)))
                await asyncio.wait([writing], timeout=0.1)
            server.reset()
            await closed.wait()
            assert client.is_closed
            assert not client._subs
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        return failures

    assert uvloop.run(run()) == []


@pytest.mark.parametrize("address", ["nats://me:t0p@{}:{}", "me:t0p@{}:{}", "tls://me:t0p@{}:{}"])
def test_one_address_with_tls_asks_for_it_at_all(address: str) -> None:
    """A server that offers no TLS hears nothing, whatever its own address says."""

    async def run() -> bytes:
        heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(INFO)
            heard.set_result(await reader.readline())
            writer.close()

        async with asyncio.timeout(WITHIN_S), await asyncio.start_server(greet, "127.0.0.1", 0) as server:
            urls = ("tls://127.0.0.1:1", address.format(*server.sockets[0].getsockname()))
            with pytest.raises(Error, match="offers no TLS"):
                await connect(
                    Connection(urls=urls), name="t", on_error=lambda _: None, on_closed=lambda: None
                )
            return await heard

    assert asyncio.run(run()) == b""


@pytest.mark.parametrize(
    ("urls", "says_tls", "goes_on"),
    [
        (["tls://a", "nats://b"], False, False),
        (["tls://a", "nats://b"], True, True),
        (["nats://a", "nats://b"], False, True),
        (["wss://a", "ws://b"], True, False),  # nats-py would not encrypt it
        (["ws://a", "wss://b"], False, True),  # it is encrypted already
    ],
)
async def test_tls_is_asked_for_when_its_address_was_given_up(
    urls: list[str], says_tls: bool, goes_on: bool
) -> None:
    """nats-py drops servers that fail; the one that is left is not trusted more for that."""
    client = NatsClient()
    client._setup_server_pool(urls)
    del client._server_pool[0]
    client._current_server = client._server_pool[0]
    with nullcontext() if goes_on else pytest.raises(Error, match="offers no TLS"):
        await client._process_info({"tls_required": says_tls}, initial_connection=True)


def test_what_waits_for_a_deaf_server_is_bounded_in_bytes() -> None:
    """However large frames and answers are: frames are left out, who asks is refused, and what is small still fits."""
    large, small = frame(tenants=100_000), frame(full=False)
    port, frames, log = Port(), Frames(), get_logger()
    bytes_each = sum(map(len, frames.outgoing(large, 0.0, 1 << 20, idle=False)))

    async def fill(client: NatsClient) -> list[int]:
        """What waits after each large frame, and at last after large answers and small frames."""
        settings = Settings.from_env({"COX_WORKER": "w1"})
        events = EventLog(Subjects("main"), "w1", port, log)
        session = Session(client, settings, port, frames, events, incarnation="01A", hello={}, log=log)
        waits = [0]
        while len(waits) < 2 or waits[-1] > waits[-2]:
            await session.status(large, idle=False)
            waits.append(client.unsent)
        for _ in range(4):
            await session.answer(AnswerOut("me", large))
            await session.status(small, idle=False)
        return [*waits, client.unsent]

    async def run() -> list[int]:
        closed = asyncio.Event()
        async with Deaf() as server, asyncio.timeout(WITHIN_S):
            connection = Connection(urls=(server.url,), fleet="main")
            client = await connect(connection, name="t", on_error=lambda _: None, on_closed=closed.set)
            try:
                return await fill(client)
            finally:
                server.reset()
                await closed.wait()

    *waits, full, last = uvloop.run(run())
    assert len(waits) > 2
    assert MAX_UNSENT - bytes_each < full <= MAX_UNSENT + 10_000  # NATS's own words come to it
    assert full + 2_000 < last < full + 20_000


def test_no_inbox_tells_of_another() -> None:
    """A worker that a controller commands hears some of its inboxes: the others have nothing in common with them."""
    client = NatsClient()
    names = [client.new_inbox().rpartition(".")[2] for _ in range(100)]
    assert {len(name) for name in names} == {22}
    assert len({name[:12] for name in names} | {name[12:] for name in names}) == 200


def test_a_nats_py_that_reads_in_another_way_is_no_reason_not_to_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The module can be imported, as engines do; whoever wants to connect is told."""
    monkeypatch.setattr(nats_client, "_LOST", ["MSG_RE"])
    with pytest.raises(
        RuntimeError, match="this nats-py reads messages in another way: its parser has no MSG_RE"
    ):
        NatsClient()
