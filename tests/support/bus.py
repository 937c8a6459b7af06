"""A worker without an engine: the real bus on a real port, and a stand-in that drains it."""

import asyncio
import io
import json
import time
from collections.abc import Callable
from typing import Any, Self

from coxswain.service.bus import Bus
from coxswain.service.config import Settings
from coxswain.service.logs import get_logger
from coxswain.service.port import Port
from tests.support.engine import INCARNATION, WORKER, Engine

FLEET = "test"


class Worker:
    """One worker in fleet `test`; use it as a context.

    Args:
        url: where NATS is.
        incarnation: of this run.
        busy: the engine takes nothing from the port.
        env: more of the environment.
    """

    def __init__(self, url: str, *, incarnation: str = INCARNATION, busy: bool = False, **env: str) -> None:
        given = {"COX_FLEET": FLEET, "COX_WORKER": WORKER, **env, "COX_NATS_URL": url}
        self._lines = io.StringIO()
        self.port = Port()
        self.engine = Engine(self.port, busy=busy)
        self.bus = Bus(
            Settings.from_env(given),
            self.port,
            incarnation=incarnation,
            hello={"model": "model"},
            log=get_logger(self._lines, {"COX_LOG": "json"}),
        )

    def __enter__(self) -> Self:
        """Start both threads."""
        self.engine.start()
        self.bus.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop both threads."""
        self.bus.stop()
        self.engine.stop()

    async def connected(self) -> "Worker":
        """Wait until the worker is on NATS."""
        await eventually(lambda: self.port.connected)
        return self

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The lines of one kind in this worker's log."""
        lines = [json.loads(line) for line in self._lines.getvalue().splitlines()]
        return [line for line in lines if line["event"] == event]


async def eventually(true: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait until `true()` is, or fail."""
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"not true after {timeout_s} s")
        await asyncio.sleep(0.01)
