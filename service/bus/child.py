"""The bus as a program: what `process.py` starts, one for each engine.

It ends with the engine: a closed socket says that nobody is there any more, however the engine ended. Signals are
left to the engine, which ends it in order. Run as `python -m coxswain.service.bus.child FD`.
"""

import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections import deque
from typing import Final

import uvloop

from coxswain.service.bus import wire
from coxswain.service.bus.loop import Bus
from coxswain.service.port import Inbound, LeadIn, Outbound, Port, QueryIn

BEAT_S: Final = 0.25
"""How often the engine's process is told what changed."""
LIFE_S: Final = 2.0
"""How often it is told that we are alive, if nothing changed."""
MAX_UNREAD: Final = 16 * 1024 * 1024
"""Bytes that wait for an engine's process which does not read; beyond it commands are refused.

From half of it on queries are, and commands that are large: a few of those would keep everybody else's out.
"""
LEADS: Final = 1024 * 1024
"""Bytes beyond that for the leader's heartbeats alone, thousands of them: were they refused with commands, whoever
floods would end every hold of the leader."""
LARGE: Final = 64 * 1024
"""Bytes of a command that names hundreds of targets."""
ALONE_S: Final = 2.0
"""How long we go on sending what is left when the engine has gone without a word."""


class FarPort(Port):
    """The port as the bus sees it from here: what it hands in goes over the socket.

    Args:
        writer: to the engine's process.
        unix_offset: the engine's, so that both go by one clock.
    """

    def __init__(self, writer: asyncio.StreamWriter, unix_offset: float) -> None:
        super().__init__()
        self.unix_offset = unix_offset
        self._writer = writer
        self._arrived: deque[Outbound] = deque()
        self._told: wire.State | None = None
        self._told_at = 0.0
        self.news = asyncio.Event()
        """Set when the engine's process must be told our state at once."""

    def tell_connected(self, connected: bool) -> None:
        """Have the engine's process told at once whether NATS is there."""
        self.connected = connected
        self.news.set()

    def begin_anew(self) -> None:
        """Have the engine's process told at once that something is missing."""
        self.beginnings += 1
        self.news.set()

    def offer(self, item: Inbound) -> bool:
        """Send an item to the engine; False if its process does not read."""
        packed = wire.pack_down(wire.down(item))
        room = MAX_UNREAD
        if isinstance(item, LeadIn):
            room += LEADS
        elif isinstance(item, QueryIn) or len(packed) > LARGE:
            room //= 2
        if self._writer.transport.get_write_buffer_size() > room:
            return False
        self._writer.write(packed)
        return True

    def collect(self) -> list[Outbound]:
        """Everything that has arrived from the engine, in order."""
        items = list(self._arrived)
        self._arrived.clear()
        return items

    def arrived(self, step: int, items: list[Outbound]) -> None:
        """Take what the engine sent."""
        self.step = step
        self._arrived.extend(items)

    def tell(self, state: wire.State) -> None:
        """Tell the engine's process our state, if that changed or it has heard nothing for a while."""
        now = time.monotonic()
        if state != self._told or now - self._told_at >= LIFE_S:
            self._told, self._told_at = state, now
            self._writer.write(wire.pack_down(state))


class Child:
    """One life of a bus in this process.

    Args:
        reader: from the engine's process.
        writer: to it.
        begin: the first message.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, begin: wire.Begin) -> None:
        self._reader = reader
        self._port = FarPort(writer, begin.unix_offset)
        self._bus = Bus(
            begin.settings, self._port, incarnation=begin.incarnation, hello=begin.hello,
            life=begin.life, refused=begin.refused,
        )  # fmt: skip

    async def run(self) -> None:
        """Serve until the engine says so or is gone. What fails here ends the process; the engine starts another."""
        async with asyncio.TaskGroup() as group:
            others = [group.create_task(self._listen()), group.create_task(self._beat())]
            try:
                await self._bus.run()
            finally:
                self._tell()
                for task in others:
                    task.cancel()

    async def _listen(self) -> None:
        try:
            while True:
                batch = await receive(self._reader)
                items: list[Outbound] = []
                for message in batch.messages:
                    match message:
                        case wire.End(within_s):
                            self._port.closing = True
                            self._bus.stop(time.monotonic() + within_s)
                        case wire.FullUp(body):
                            down = wire.read_down(body)
                            if not isinstance(down, wire.State):
                                await self._bus.full(wire.from_down(down))
                        case wire.Begin():
                            pass
                        case _:
                            items.append(wire.from_up(message))
                self._port.arrived(batch.step, items)
                self._bus.wake()
        except (asyncio.IncompleteReadError, ConnectionError):
            self._bus.stop(time.monotonic() + ALONE_S)

    async def _beat(self) -> None:
        while True:
            self._tell()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._port.news.wait()
            self._port.news.clear()

    def _tell(self) -> None:
        bus, port = self._bus, self._port
        port.tell(wire.State(port.connected, bus.settled, port.events_dropped, bus.refused, port.beginnings))


async def receive(reader: asyncio.StreamReader) -> wire.Batch:
    """The next batch.

    Raises:
        asyncio.IncompleteReadError: the engine's process is gone.
    """
    length = int.from_bytes(await reader.readexactly(wire.LENGTH), "big")
    return wire.read_batch(await reader.readexactly(length))


async def serve(fd: int) -> None:
    """Be the bus of the engine at the other end of a socket."""
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=fd), limit=2**20)
    first = (await receive(reader)).messages[0]
    assert isinstance(first, wire.Begin), "the engine's process says first who it is"
    await Child(reader, writer, first).run()
    writer.close()


def main() -> None:
    """Run until the engine's process ends or says so."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    uvloop.run(serve(int(sys.argv[1])))


if __name__ == "__main__":
    main()
