"""Events on their way into JetStream: in order, stored once, bounded, and never in anybody's way.

An event is in the backlog until sent and in flight until acknowledged. Acknowledgements are awaited in a
window; when one is overdue or the connection is lost, everything in flight goes back to the head of the
backlog and is sent again from there. JetStream knows an event by its `Nats-Msg-Id` and stores a repeated
one once, as long as the repetition falls into the stream's `duplicate_window`. If nothing stores events for too long,
the log does without them: each is published once, for whoever listens now. Called by `loop.py`.
"""

import asyncio
import time
from collections import deque
from typing import Any, Final

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import MaxPayloadError

from coxswain.schemas.commands import encode
from coxswain.schemas.errors import UNREADABLE
from coxswain.schemas.events import Event
from coxswain.schemas.subjects import Subjects
from coxswain.service.port import Port

MAX_BACKLOG: Final = 65_536
"""Events that wait or are in flight; beyond it the oldest are dropped."""
WINDOW: Final = 256
"""Events in flight."""
ACK_TIMEOUT_S: Final = 2.0
BACKOFF_S: Final = (0.2, 0.5, 1.0, 2.0, 5.0)
"""Waits before sending again, the last one for ever."""
NO_STREAM_SAID_S: Final = 5.0
NO_STREAM_GRACE_S: Final = 30.0
"""How long "no stream" may be an election: in a cluster that lost the stream's leader NATS waits up to 9 s before it
even begins one. It is said after the first. After the second events are given up; one a second probes. Silence counts
as well: while anybody subscribes to events, NATS does not report that no stream does."""
PROBE_S: Final = 1.0
FULL: Final = 503
"""The code by which JetStream says that it has no room: its disk is full, or a stream that refuses what is new."""
MAX_FULL_PAUSE_S: Final = 2.0


class _Error(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Ack(msgspec.Struct):
    seq: int = 0
    error: _Error | None = None


_decode_ack = msgspec.json.Decoder(_Ack).decode


class EventLog:
    """The backlog of one incarnation; it outlives connections.

    Args:
        subjects: of the fleet.
        worker: this worker's name.
        port: where drops are counted.
        log: a structlog logger.
    """

    def __init__(self, subjects: Subjects, worker: str, port: Port, log: Any) -> None:
        self._subjects = subjects
        self._worker = worker
        self._port = port
        self._log = log
        self._backlog: deque[Event] = deque()
        self._flight: dict[int, Event] = {}
        self._sent = 0
        """Number of the last send; it is also the last token of the inbox for its acknowledgement."""
        self._patience_until = 0.0
        self._hold_off_until = 0.0
        self._failures = 0
        self._no_stream_since: float | None = None
        self._denied = False
        """Whether NATS said that nobody stores events; silence may be a pause."""
        self._given_up = False
        """Whether there has been no stream for so long that events are published and forgotten, except for probes."""
        self._troubles: set[str] = set()
        self._news = asyncio.Event()
        self._newest = 0

    @property
    def settled(self) -> int:
        """Every event up to this `seq` is stored or given up: nobody need keep it for us."""
        oldest = self._oldest
        return self._newest if oldest is None else oldest.seq - 1

    @property
    def _oldest(self) -> Event | None:
        return next(iter(self._flight.values()), None) or (self._backlog[0] if self._backlog else None)

    def age(self, now: float) -> tuple[int, float]:
        """How many events JetStream has not acknowledged, and for how long the oldest has waited at `now` (Unix s)."""
        oldest = self._oldest
        return (0, 0.0) if oldest is None else (self.waiting, max(0.0, now - oldest.at))

    @property
    def waiting(self) -> int:
        """Events that JetStream has not acknowledged."""
        return len(self._backlog) + len(self._flight)

    @property
    def hopeful(self) -> bool:
        """Whether events wait for a stream that is there, as far as we know: worth waiting for. It may pause."""
        return self.waiting > 0 and not self._denied and not self._given_up

    def add(self, event: Event) -> None:
        """Take an event; when there is no room the oldest in the backlog is dropped for it."""
        self._newest = event.seq
        if self.waiting >= MAX_BACKLOG:
            self._backlog.popleft()
            self._drop(1)
            self._say("backlog_full", "NATS has been away for too long: the oldest events are dropped")
        self._backlog.append(event)
        self._news.set()

    async def run(self, client: Client) -> None:
        """Send until the connection is closed; what it did not acknowledge is kept for the next one."""
        inbox = client.new_inbox()
        self._hold_off_until = 0.0
        self._found()
        try:
            await client.subscribe(f"{inbox}.*", cb=self._on_ack, pending_msgs_limit=4 * WINDOW)
            # Asked of the connection, not left to cancellation: nats-py swallows CancelledError in publish.
            while not client.is_closed:
                await self._fill(client, inbox)
                await self._wait()
                if self._flight and time.monotonic() >= self._patience_until:
                    self._say("unacknowledged", "JetStream does not answer: events wait and are sent again")
                    self._not_stored(BACKOFF_S[-1])
        finally:
            self._take_back()

    async def _fill(self, client: Client, inbox: str) -> None:
        while self._backlog and (self._given_up or self._may_ask):
            event, asks = self._backlog.popleft(), self._may_ask
            if asks:
                self._sent += 1
                self._flight[self._sent] = event
                self._patience_until = time.monotonic() + ACK_TIMEOUT_S
            else:
                self._drop(1)
            try:
                await client.publish(
                    self._subjects.event(self._worker, str(type(event).__struct_config__.tag)),
                    encode(event),
                    reply=f"{inbox}.{self._sent}" if asks else "",
                    headers={"Nats-Msg-Id": event.id},
                )
            except MaxPayloadError:
                if asks:
                    del self._flight[self._sent]
                    self._drop(1)
                self._say("too_large", "an event is larger than the server's max_payload and was dropped")

    @property
    def _may_ask(self) -> bool:
        """Whether one more event may be sent to be acknowledged. After a failure one alone: few are repeated."""
        window = 1 if self._failures else WINDOW
        return len(self._flight) < window and time.monotonic() >= self._hold_off_until

    async def _wait(self) -> None:
        """Until there is news, or it is time to send again; an empty log waits without a timer."""
        now = time.monotonic()
        due = self._patience_until if self._flight else self._hold_off_until if self._backlog else None
        try:
            async with asyncio.timeout(None if due is None else max(0.0, due - now)):
                await self._news.wait()
        except TimeoutError:
            return
        self._news.clear()

    async def _on_ack(self, msg: Msg) -> None:
        number = int(msg.subject.rpartition(".")[2])
        if number not in self._flight:
            return  # taken back meanwhile
        self._news.set()
        self._patience_until = time.monotonic() + ACK_TIMEOUT_S
        if msg.headers and msg.headers.get("Status") == "503":
            self._denied = True
            self._not_stored(PROBE_S)
            return
        try:
            error = _decode_ack(msg.data).error
        except UNREADABLE:
            error = _Error(description="acknowledgement is not JSON")
        self._found()
        if error is not None and error.code == FULL:
            self._say(
                "full", f"{error.description}: events wait until there is room", err_code=error.err_code
            )
            self._again(MAX_FULL_PAUSE_S)
            return
        del self._flight[number]
        if error is None:
            self._accepted()
        else:
            # The stream is there and does not want it (too large): sending again would change nothing.
            self._drop(1)
            self._say("refused", error.description, err_code=error.err_code)

    def _found(self) -> None:
        """There is a stream, whatever it answered, or nothing is known of one yet: events are for it."""
        self._no_stream_since = None
        self._denied = self._given_up = False

    def _accepted(self) -> None:
        self._failures = 0
        if self._troubles:
            self._log.info(
                "events.resumed", after=sorted(self._troubles), dropped_total=self._port.events_dropped
            )
            self._troubles.clear()

    def _not_stored(self, pause_s: float) -> None:
        """Nothing that is in flight was stored: nobody listens, or nobody answers."""
        now = time.monotonic()
        if self._no_stream_since is None:
            self._no_stream_since = now
        silent_s = now - self._no_stream_since
        if silent_s >= NO_STREAM_SAID_S:
            self._say(
                "no_stream",
                f"stream {self._subjects.stream} does not exist, or nobody leads it: run `cox init`; "
                f"after {NO_STREAM_GRACE_S:g} s of this events are lost",
            )
        if silent_s < NO_STREAM_GRACE_S:
            self._again(pause_s)
            return
        self._given_up = True
        self._drop(len(self._flight))  # published they were
        self._flight.clear()
        self._hold_off_until = now + PROBE_S

    def _again(self, most_s: float) -> None:
        """Send everything in flight again, in order, after a pause."""
        self._take_back()
        pause_s = min(most_s, BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)])
        self._failures += 1
        self._hold_off_until = time.monotonic() + pause_s

    def _take_back(self) -> None:
        self._backlog.extendleft(reversed(self._flight.values()))
        self._flight.clear()

    def _drop(self, count: int) -> None:
        self._port.events_dropped += count

    def _say(self, trouble: str, hint: str, **fields: Any) -> None:
        """Log a trouble once, until events are stored again."""
        if trouble not in self._troubles:
            self._troubles.add(trouble)
            self._log.warning(f"events.{trouble}", hint=hint, waiting=self.waiting, **fields)
