"""A worker without an engine: the real bus on a real port, and a stand-in that drains it."""

import io
import json
import os
import tempfile
from typing import Any, Self

import nats
from nats.js.api import StreamConfig

from coxswain.common.logs import get_logger
from coxswain.schemas.events import decode_event
from coxswain.schemas.subjects import Subjects
from coxswain.service.bus import BusProcess, BusThread
from coxswain.service.config import Settings
from coxswain.service.port import Port
from tests.support.engine import INCARNATION, WORKER, Engine
from tests.support.waiting import eventually

FLEET = "test"
_SUBJECTS = Subjects(FLEET)


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
        settings = Settings.from_env(given)
        log = get_logger(self._lines, {"COX_LOG": "json"})
        about: dict[str, Any] = {"incarnation": incarnation, "hello": {"model": "model"}, "log": log}
        self._child_lines = tempfile.TemporaryFile()  # noqa: SIM115
        self.bus: BusProcess | BusThread = (
            BusThread(settings, self.port, **about)
            if settings.bus == "thread"
            else BusProcess(settings, self.port, **about, stderr=self._child_lines)
        )

    def __enter__(self) -> Self:
        """Start the engine's thread and the bus."""
        self.engine.start()
        self.bus.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop both."""
        self.bus.stop()
        self.engine.stop()
        self._lines.write(self._child_log())
        self._child_lines.close()

    async def connected(self) -> "Worker":
        """Wait until the worker is on NATS."""
        await eventually(lambda: self.port.connected)
        return self

    def _child_log(self) -> str:
        if self._child_lines.closed:
            return ""
        file = self._child_lines.fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode()

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The lines of one kind in this worker's log."""
        text = self._lines.getvalue() + self._child_log()
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]


async def add_stream(url: str) -> None:
    """Make the fleet's event stream, as `cox init` does."""
    async with await nats.connect(url) as client:
        await client.jetstream().add_stream(
            StreamConfig(name=_SUBJECTS.stream, subjects=[_SUBJECTS.events_all])
        )


async def stored(url: str) -> list[int]:
    """The numbers of all events in the stream, in the stream's order."""
    async with await nats.connect(url) as client:
        stream = client.jetstream()
        state = (await stream.stream_info(_SUBJECTS.stream)).state
        return [
            decode_event((await stream.get_msg(_SUBJECTS.stream, seq)).data).seq
            for seq in range(state.first_seq, state.last_seq + 1)
        ]
