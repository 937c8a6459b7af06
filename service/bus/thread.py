"""The bus as a thread of the engine's process: nothing to start and nothing to supervise.

It shares the interpreter with the scheduler, whose steps it delays where they are bound by Python; `process.py` does
not. For debugging, for measuring that difference, and where a process may start no other. Chosen by `COX_BUS=thread`.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from math import inf
from typing import Any

import uvloop

from coxswain.common.logs import get_logger
from coxswain.service.bus.loop import Bus
from coxswain.service.config import Settings
from coxswain.service.port import Port


class BusThread:
    """The thread that joins one worker to NATS.

    Args:
        settings: who we are and where NATS is.
        port: what is shared with the engine.
        incarnation: a ULID, new with every start of the worker.
        hello: what service discovery shows of this worker (model, versions).
        log: a structlog logger; our own by default.
    """

    def __init__(
        self, settings: Settings, port: Port, *, incarnation: str, hello: dict[str, str], log: Any = None
    ) -> None:
        self._port = port
        self._log = log or get_logger(fleet=settings.connection.fleet, worker=settings.worker)
        self.bus = Bus(settings, port, incarnation=incarnation, hello=hello, log=self._log)
        self._alarm: asyncio.TimerHandle | None = None
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="coxswain-bus", daemon=True)

    # For the engine's process

    def start(self) -> None:
        """Start the thread; returns at once, whether or not NATS can be reached."""
        self._thread.start()

    def stop(self, timeout_s: float = 3.0) -> bool:
        """Send what is left and end the thread, in at most about `timeout_s`; False if it was left behind."""
        if not self._thread.is_alive():
            return True
        self._call(self.bus.stop, time.monotonic() + timeout_s)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _call(self, function: Callable[..., object], *args: Any) -> None:
        """Run `function` on the loop: from any thread, without waiting, without effect once it has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    # The thread

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._main())
        except Exception:  # noqa: BLE001 - nothing of ours may end the engine's process
            self._log.exception("bus.died", hint="this worker serves on, unsteered, until it is restarted")
        finally:
            self._port.tell_connected(False)
            self._port.attach_bus(self._port.discard)

    async def _main(self) -> None:
        self._port.attach_bus(
            wake=lambda: self._call(self.bus.wake), set_alarm=lambda: self._call(self._ring)
        )
        self._ring()
        await self.bus.run()

    def _ring(self) -> None:
        """Wake the engine if it is time, else set the timer."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._port.ring(time.monotonic())
        if self._port.alarm_at < inf:
            # A millisecond late rather than early: uvloop's timers count in milliseconds.
            delay_s = self._port.alarm_at - time.monotonic() + 0.001
            self._alarm = self._loop.call_later(max(0.0, delay_s), self._ring)
