"""A TCP proxy that can be cut, a partition between two that both live on, or slow. For tests."""

import asyncio
from contextlib import suppress
from typing import Self

MAX_LATE = 1_024
"""Pieces of data under way on a slow connection; beyond, its sender waits."""


class Proxy:
    """Stands between clients and a server on the loopback; use it as a context.

    Args:
        port: the server's.
    """

    def __init__(self, port: int) -> None:
        self._to = port
        self._port = 0
        self.latency_s = 0.0
        """By how much everything is late, each way."""
        self.bytes_per_s = float("inf")
        """Bandwidth of each connection, each way."""
        self._ends: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """Where clients connect to."""
        return self._port

    @property
    def url(self) -> str:
        """The same as an address of NATS."""
        return f"nats://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        """Listen."""
        await self.mend()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Drop everybody."""
        await self.cut()

    async def mend(self) -> None:
        """Whoever connects gets through."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Nothing passes any more: connections end, new ones are refused."""
        self._server.close()
        for end in tuple(self._ends):
            end.close()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.close()
            return
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self._ends.add(sink)
            task = asyncio.create_task(self._pump(source, sink))
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        now = asyncio.get_running_loop().time
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAX_LATE)
        delivering = asyncio.create_task(self._deliver(late, sink))
        with suppress(OSError):
            while data := await source.read(65_536):
                await late.put((now() + self.latency_s, data))
                if self.bytes_per_s < float("inf"):
                    await asyncio.sleep(len(data) / self.bytes_per_s)
        delivering.cancel()
        self._ends.discard(sink)
        sink.close()
        with suppress(OSError):
            await sink.wait_closed()

    async def _deliver(self, late: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
        """Write what comes in, in order, when it is time."""
        now = asyncio.get_running_loop().time
        with suppress(OSError):
            while True:
                due, data = await late.get()
                if (wait_s := due - now()) > 0:
                    await asyncio.sleep(wait_s)
                sink.write(data)
                await sink.drain()
