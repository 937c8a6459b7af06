"""A worker's connection to NATS, at a server that does as it should not."""

import asyncio
import json
import socket
import struct
from typing import Any, Self

import uvloop

from coxswain.common.connection import Connection
from coxswain.service.bus.connect import connect

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
