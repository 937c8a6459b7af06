"""The engine's end of the socket to its bus: encodes and sends what the port holds, and never waits.

What the socket has no room for stays where it was: encoded bytes here, at most one batch, the rest in the port, whose
queue is bounded. Events are kept until the bus says that they are settled, for the bus after it, should it end.
Called by `process.py` on the engine's thread and on its own.
"""

import contextlib
import socket
import threading
import time
from collections import deque
from typing import Any, Final

from coxswain.service.bus import wire
from coxswain.service.port import EVENT_ROOM, EventOut, Outbound, Port

BATCH: Final = 512
"""Items encoded in one go, on a thread that is not the engine's: some milliseconds."""


class Outbox:
    """Where what the engine says goes.

    Args:
        port: where it waits.
        log: a structlog logger.
    """

    def __init__(self, port: Port, log: Any) -> None:
        self._port = port
        self._log = log
        self._lock = threading.Lock()
        """Held for no longer than it takes to encode a batch and to send without waiting."""
        self._socket: socket.socket | None = None
        self._unsent = bytearray()
        self._kept: deque[EventOut] = deque()

    @property
    def full(self) -> bool:
        """Whether bytes wait for the socket."""
        return bool(self._unsent)

    def send(self) -> bool:
        """Send what waits in the port, unless bytes wait already; False if some wait now."""
        with self._lock:
            if self._socket is not None and not self._unsent:
                self._send(self._port.collect())
            return not self._unsent

    def go_on(self) -> None:
        """Send bytes that wait, now that the socket has room, and then what waits in the port."""
        with self._lock:
            self._flush()
        self.send()

    def say(self, message: wire.Up) -> None:
        """Send a message of our own."""
        with self._lock:
            if self._socket is not None:
                self._unsent += wire.pack_up(self._port.step, [message])
                self._flush()

    def open(self, to: socket.socket, begin: wire.Begin) -> None:
        """Begin with a new bus, and tell it what the one before may have left undone."""
        # Nothing is taken from the port yet, so that what was kept stays ahead of it; encoded without the lock and a
        # little at a time, so that the engine's thread waits for neither lock nor interpreter.
        again: list[Outbound] = list(self._kept)
        data = bytearray(wire.pack_up(self._port.step, [begin]))
        for first in range(0, len(again), BATCH):
            data += self._packed(again[first : first + BATCH])
            time.sleep(0)
        with self._lock:
            self._socket = to
            self._unsent += data
            self._flush()
        self.send()

    def close(self) -> None:
        """The bus is gone."""
        with self._lock:
            self._socket = None
            self._unsent.clear()

    def settled(self, seq: int) -> None:
        """Events up to `seq` need not be kept."""
        with self._lock:
            while self._kept and self._kept[0].seq <= seq:
                self._kept.popleft()

    def _send(self, items: list[Outbound]) -> None:
        self._unsent += self._packed(items)
        for item in items:
            if isinstance(item, EventOut):
                if len(self._kept) >= EVENT_ROOM:  # the bus drops its oldest too, and counts them
                    self._kept.popleft()
                self._kept.append(item)
        self._flush()

    def _packed(self, items: list[Outbound]) -> bytes:
        """The items for the socket, but for those that cannot be encoded."""
        try:
            return wire.pack_up(self._port.step, [wire.up(item) for item in items])
        except Exception:  # noqa: BLE001 - our fault, for which the engine must not pay
            self._log.exception("bus.not_encoded", items=len(items))
            return b"".join(self._packed([item]) for item in items) if len(items) > 1 else b""

    def _flush(self) -> None:
        if self._socket is not None and self._unsent:
            with contextlib.suppress(OSError):  # no room, or nobody there, which whoever reads will see
                del self._unsent[: self._socket.send(self._unsent)]
