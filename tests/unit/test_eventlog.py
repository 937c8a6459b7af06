"""What the event log makes of JetStream's answers: when it asks, waits, gives up, and is worth waiting for."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest
from structlog.testing import CapturingLogger

from coxswain.schemas.subjects import Subjects
from coxswain.service.bus import eventlog
from coxswain.service.bus.eventlog import WINDOW, EventLog
from coxswain.service.port import Port
from tests.support.engine import event
from tests.support.waiting import eventually

STORED: Final = {"stream": "EVENTS", "seq": 1}
FULL: Final = {"error": {"code": 503, "err_code": 10077, "description": "maximum messages exceeded"}}
REFUSED: Final = {
    "error": {"code": 400, "err_code": 10054, "description": "message size exceeds maximum allowed"}
}


class JetStream:
    """A connection whose server answers when the test says so; use it as a context."""

    def __init__(self) -> None:
        self.port = Port()
        self.log = EventLog(Subjects("test"), "w1", self.port, CapturingLogger())
        self.is_closed = False
        self.asked: list[str] = []
        """Where answers are awaited."""
        self.forgotten = 0
        """Events that were published without a wish for an answer."""
        self._added = 0
        self._answer: Callable[[Any], Awaitable[None]]

    def add(self, count: int) -> None:
        """The engine has events."""
        for _ in range(count):
            self._added += 1
            self.log.add(event(self._added).event("w1", "01INC"))

    async def answer(self, body: dict[str, Any] | None) -> None:
        """Answer all that is asked; None is what NATS says where nobody listens."""
        headers = {"Status": "503"} if body is None else None
        asked, self.asked = self.asked, []
        for subject in asked:
            message = SimpleNamespace(subject=subject, headers=headers, data=json.dumps(body).encode())
            await self._answer(message)

    # What the log uses of nats-py's client

    def new_inbox(self) -> str:
        """Where answers go."""
        return "inbox"

    async def subscribe(self, _: str, cb: Callable[[Any], Awaitable[None]], **__: Any) -> None:
        """Hear answers."""
        self._answer = cb

    async def publish(self, _: str, __: bytes, reply: str, **___: Any) -> None:
        """Send an event."""
        if reply:
            self.asked.append(reply)
        else:
            self.forgotten += 1


@pytest.fixture
async def stream(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[JetStream]:
    """A log that runs. Silence is none unless a test says so, however slow the machine."""
    monkeypatch.setattr(eventlog, "ACK_TIMEOUT_S", 600.0)
    monkeypatch.setattr(eventlog, "PROBE_S", 0.02)
    monkeypatch.setattr(eventlog, "BACKOFF_S", (0.02,))
    made = JetStream()
    running = asyncio.create_task(made.log.run(cast("Any", made)))
    yield made
    made.is_closed = True
    made.add(1)
    await running


async def test_after_a_failure_one_event_asks_for_all(stream: JetStream) -> None:
    """Where nothing was stored one alone is sent again until one is; the others follow together."""
    stream.add(50)
    await eventually(lambda: len(stream.asked) == 50)
    await stream.answer(None)
    for _ in range(2):
        await eventually(lambda: stream.asked)
        assert len(stream.asked) == 1
        await stream.answer(None)
    await eventually(lambda: stream.asked)
    await stream.answer(STORED)
    await eventually(lambda: stream.asked)
    assert len(stream.asked) == 49


@pytest.mark.parametrize("found", [FULL, REFUSED])
async def test_events_are_kept_for_a_stream_that_comes_back_and_takes_none(
    stream: JetStream, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]
) -> None:
    """They were given up while there was none; now there is one, and what it has no room for may wait."""
    monkeypatch.setattr(eventlog, "NO_STREAM_GRACE_S", 0.0)
    stream.add(10)
    await eventually(lambda: stream.asked)
    await stream.answer(None)
    assert stream.port.events_dropped == 10
    while not stream.asked:  # one of them probes
        stream.add(1)
        await asyncio.sleep(0.01)
    await stream.answer(found)
    forgotten, dropped, waiting = stream.forgotten, stream.port.events_dropped, stream.log.waiting
    stream.add(2 * WINDOW)
    await eventually(lambda: stream.asked)
    assert (stream.forgotten, stream.port.events_dropped) == (forgotten, dropped)
    assert stream.log.waiting == waiting + 2 * WINDOW
    while stream.log.waiting:
        await stream.answer(STORED)
        await asyncio.sleep(0.01)
    assert stream.port.events_dropped == dropped


async def test_a_stream_that_pauses_is_worth_waiting_for(
    stream: JetStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that ends in the meantime waits; not where NATS says that there is none, until something answers."""
    assert not stream.log.hopeful, "nothing waits"
    monkeypatch.setattr(eventlog, "ACK_TIMEOUT_S", 0.02)
    stream.add(2)
    await eventually(lambda: len(stream.asked) > 2)
    assert stream.log.hopeful
    monkeypatch.setattr(eventlog, "ACK_TIMEOUT_S", 600.0)
    await eventually(lambda: stream.log._flight)
    await stream.answer(None)
    assert not stream.log.hopeful
    await eventually(lambda: stream.log._flight)
    await stream.answer(FULL)
    assert stream.log.hopeful


async def test_a_stream_that_is_given_up_is_not_worth_waiting_for(
    stream: JetStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silence for so long that events are published and forgotten is no pause."""
    monkeypatch.setattr(eventlog, "NO_STREAM_GRACE_S", 0.0)
    monkeypatch.setattr(eventlog, "ACK_TIMEOUT_S", 0.02)
    stream.add(1)
    await eventually(lambda: stream.port.events_dropped == 1)
    while not stream.log._flight:
        stream.add(1)
        await asyncio.sleep(0.01)
    assert stream.log.waiting
    assert not stream.log.hopeful
