"""A worker's connection to NATS, at a server that does as it should not."""

import asyncio
import json
import socket
import struct
from typing import Any, Self

import pytest
import uvloop

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
