"""The bus as a process of its own, so that NATS and JSON take nothing of the interpreter that the scheduler runs in.

What the engine says is encoded and sent on its own thread (`outbox.py`). A second thread sleeps until something
arrives: it hands commands to the engine, keeps its alarm, sends what the socket had no room for, and starts another
process when one has ended. Before each step the engine's thread looks for commands too: while it works, the other one
waits for the interpreter, and what came meanwhile would be a whole step late. `child.py` is the other end, `wire.py`
what crosses.
"""

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from math import inf
from typing import IO, Any, Final

from msgspec.structs import replace

from coxswain.common.logs import get_logger
from coxswain.service.bus import wire
from coxswain.service.bus.outbox import Outbox
from coxswain.service.config import Settings
from coxswain.service.port import Port

STALL_S: Final = 1.0
"""A bus that has taken nothing for this long gets no frames until it does."""
SILENCE_S: Final = 10.0
"""A bus that has said nothing for this long is killed."""
GRACE_S: Final = 2.0
"""It is given this much more, once: the silence may have been ours, as after a machine's sleep."""
BACKOFF_S: Final = (0.1, 5.0)
"""First and longest pause before another is started; doubled each time, until one has lived twice the longest."""
READ: Final = 2**18
"""Bytes read at once."""
LOOK: Final = 2**14
"""Bytes that the engine's thread reads at once: some hundred commands, and a millisecond of its step."""
BUFFER: Final = 2**22
"""Bytes that we ask the socket to hold; the kernel may allow less."""


class BusProcess:
    """The process that joins one worker to NATS, and the thread that looks after it.

    Args:
        settings: who we are and where NATS is.
        port: what is shared with the engine.
        incarnation: a ULID, new with every start of the worker.
        hello: what service discovery shows of this worker (model, versions).
        log: a structlog logger; our own by default.
        stderr: where the process itself logs; this process's by default.
    """

    def __init__(
        self,
        settings: Settings,
        port: Port,
        *,
        incarnation: str,
        hello: dict[str, str],
        log: Any = None,
        stderr: IO[bytes] | None = None,
    ) -> None:
        self._begin = wire.Begin(settings, incarnation, hello, 0, {}, port.unix_offset)
        self._port = port
        self._log = log or get_logger(fleet=settings.connection.fleet, worker=settings.worker)
        self._stderr = stderr
        self._outbox = Outbox(port, self._log)
        self._poke = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stop_at = inf
        self._child: subprocess.Popen[bytes] | None = None
        self._reading = threading.Lock()
        """Held by whichever thread reads or judges what was read: the socket, and what follows."""
        self._arrived = select.poll()
        """Whether there is something to read, for the engine's thread."""
        self._ours: socket.socket | None = None
        self._buffer = bytearray()
        self._connected = False
        """Whether the process, as it last said, is connected to NATS."""
        self._beginnings = 0
        """How often, as it last said, it missed something."""
        self._heard_at = 0.0
        self._suspect = False
        self._full_since = inf
        self._dropped_before = 0
        self._thread = threading.Thread(target=self._run, name="coxswain-bus", daemon=True)

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return None if self._child is None else self._child.pid

    # For the engine's thread

    def start(self) -> None:
        """Start the thread and, on it, the process; returns at once."""
        self._port.attach_bus(wake=self._send, set_alarm=self._rouse, look=self._look)
        self._thread.start()

    def stop(self, timeout_s: float = 3.0) -> bool:
        """Send what is left and end the process, in at most about `timeout_s`; False if the thread was left behind."""
        if not self._thread.is_alive():
            return True
        self._stop_at = time.monotonic() + timeout_s
        self._rouse()
        self._thread.join(timeout_s + 0.5)
        return not self._thread.is_alive()

    def _send(self) -> None:
        if not self._outbox.send():
            self._rouse()

    def _look(self) -> None:
        """Take a little of what has arrived, unless something waits already, or the thread is at it.

        The rest, and that nobody is there any more, are the thread's.
        """
        if not self._port.pending() and self._arrived.poll(0) and self._reading.acquire(blocking=False):
            try:
                self._read(LOOK)
            finally:
                self._reading.release()

    def _rouse(self) -> None:
        """Have the thread look at its alarm, at what is unsent and at `_stop_at`."""
        with contextlib.suppress(OSError):  # closed: the thread has ended
            os.eventfd_write(self._poke, 1)

    # The thread

    def _run(self) -> None:
        try:
            self._supervise()
        except Exception:  # noqa: BLE001 - nothing of ours may end the engine's process
            self._log.exception("bus.died", hint="this worker serves on, unsteered, until it is restarted")
        finally:
            self._port.tell_connected(False)
            self._port.attach_bus(self._port.discard)
            self._port.discard()
            poke, self._poke = self._poke, -1
            os.close(poke)

    def _supervise(self) -> None:
        failures = 0
        while self._stop_at == inf:
            began = time.monotonic()
            why = self._attend()
            if self._stop_at < inf:
                break
            failures = 0 if time.monotonic() - began > 2 * BACKOFF_S[1] else min(failures + 1, 16)
            pause_s = min(BACKOFF_S[0] * 2**failures, BACKOFF_S[1])
            hint = "this worker serves on, and its bus is started again"
            self._log.error("bus.lost", why=why, pause_s=pause_s, hint=hint)
            self._pause(time.monotonic() + pause_s)

    def _pause(self, until: float) -> None:
        poll = self._poll()
        while time.monotonic() < until and self._stop_at == inf:
            self._wait(poll, until)

    def _poll(self) -> select.poll:
        poll = select.poll()
        poll.register(self._poke, select.POLLIN)
        return poll

    def _wait(self, poll: select.poll, until: float) -> dict[int, int]:
        """What is ready, at the latest by then; the engine's alarm rings meanwhile."""
        due = min(until, self._port.alarm_at)
        # A millisecond late rather than early: poll counts in milliseconds.
        delay_ms = None if due == inf else max(0, int((due - time.monotonic()) * 1_000) + 1)
        ready = dict(poll.poll(delay_ms))
        if self._poke in ready:
            os.eventfd_read(self._poke)
        if self._poke in ready or time.monotonic() >= self._port.alarm_at:
            self._port.ring(time.monotonic())
        return ready

    def _attend(self) -> str:
        """Start a process and serve it to its end; why it ended."""
        ours, theirs = socket.socketpair()
        with ours:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            ours.setblocking(False)
            with theirs:
                # -P: a folder that is called coxswain, where the engine was started, is not us.
                command = [sys.executable, "-P", "-m", "coxswain.service.bus.child", str(theirs.fileno())]
                try:
                    self._child = subprocess.Popen(  # noqa: S603
                        command, stdin=subprocess.DEVNULL, stderr=self._stderr, pass_fds=(theirs.fileno(),)
                    )
                except OSError as error:
                    return f"it cannot be started: {error}"
            try:
                self._outbox.open(ours, self._begin)
                with self._reading:
                    self._ours = ours
                    self._arrived.register(ours, select.POLLIN)
                return self._serve(ours) or f"it ended with {self._child.wait(GRACE_S)}"
            except subprocess.TimeoutExpired:
                return "it closed its socket"
            finally:
                self._part()
                self._child.kill()
                self._child.wait()
                self._child = None

    def _part(self) -> None:
        with self._reading:
            if self._ours is not None:
                self._arrived.unregister(self._ours)
            self._ours = None
            self._buffer.clear()
        self._outbox.close()
        self._connected, self._full_since, self._beginnings = False, inf, 0
        self._port.beginnings += 1  # the next bus knows nothing
        self._dropped_before = self._port.events_dropped
        self._begin = replace(self._begin, life=self._begin.life + 1)
        self._port.tell_connected(False)

    def _serve(self, ours: socket.socket) -> str:
        """Serve the process until it ends (then nothing is returned), or must be ended (why)."""
        poll, ending = self._poll(), False
        self._heard_at, self._suspect = time.monotonic(), False
        while time.monotonic() < self._stop_at:
            if self._stop_at < inf and not ending:
                ending = True
                self._outbox.send()
                self._outbox.say(wire.End(self._stop_at - time.monotonic()))
            poll.register(ours, select.POLLIN | (select.POLLOUT if self._outbox.full else 0))
            ready = self._wait(
                poll, min(self._heard_at + SILENCE_S, self._full_since + STALL_S, self._stop_at)
            )
            flags = ready.get(ours.fileno(), 0)
            if flags & ~select.POLLOUT:
                with self._reading:
                    if not self._read():
                        return ""
            if flags & select.POLLOUT:
                self._outbox.go_on()
            with self._reading:
                self._look_at_stall()
                silent = self._silent()
            if silent:
                return f"it said nothing for {SILENCE_S + GRACE_S:g} s"
        return "it did not end in time"

    def _look_at_stall(self) -> None:
        if not self._outbox.full:
            self._full_since = inf
            if self._connected and not self._port.connected:
                self._port.tell_connected(True)
        elif self._full_since == inf:
            self._full_since = time.monotonic()
        elif self._port.connected and time.monotonic() - self._full_since >= STALL_S:
            self._port.tell_connected(False)

    def _silent(self) -> bool:
        now = time.monotonic()
        if now - self._heard_at < SILENCE_S:
            return False
        if self._suspect:
            return True
        self._suspect, self._heard_at = True, now - SILENCE_S + GRACE_S
        return False

    # From the process

    def _read(self, most: int = READ) -> bool:
        """Take what has arrived, at most so many bytes of it; False if the process is gone."""
        if self._ours is None:
            return True
        try:
            data = self._ours.recv(most)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if not data:
            return False
        self._heard_at, self._suspect = time.monotonic(), False
        self._buffer += data
        for body in wire.unpack(self._buffer):
            try:
                self._take(wire.read_down(body), body)
            except Exception:  # noqa: BLE001 - one message must not end the bus
                self._log.exception("bus.not_taken")
        return True

    def _take(self, message: wire.Down, body: bytes) -> None:
        if isinstance(message, wire.State):
            self._hear(message)
        elif not self._port.offer(wire.from_down(message)):
            self._outbox.say(wire.FullUp(body))

    def _hear(self, state: wire.State) -> None:
        self._outbox.settled(state.settled)
        self._begin = replace(self._begin, refused=state.refused)
        self._port.events_dropped = self._dropped_before + state.events_dropped
        if state.beginnings != self._beginnings:
            self._beginnings = state.beginnings
            self._port.begin_anew()
        if state.connected != self._connected:
            self._connected = state.connected
            self._port.tell_connected(state.connected)
