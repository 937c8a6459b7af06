"""The port between the engine and the bus: bounded queues, a wake call, nothing else.

The bus owns NATS and JSON; the engine's thread owns the scheduler. Neither touches the other's state.
Called by `bus/` (on a thread of its own) and `scheduler/steered.py` (engine thread). The token path never waits
here: every call returns at once, and a full queue says so.
"""

from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from time import monotonic, time
from typing import Any, NamedTuple

from msgspec import Raw, Struct

from coxswain.schemas.commands import Command, Reply
from coxswain.schemas.errors import RefusedError
from coxswain.schemas.events import KINDS, Event
from coxswain.schemas.policy import Lead
from coxswain.schemas.status import (
    Config,
    Frame,
    QueuePage,
    QueueQuery,
    RequestQuery,
    RequestReport,
    RequestStatus,
    TenantStatus,
)

EVENTS_S = 0.05
"""How long events may wait for one another before the bus is woken for them: a status frame's interval."""
MAX_COMMANDS = 4_096
"""Commands that wait for the engine."""
MAX_QUERIES = 1_024
"""Queries that wait for the engine, behind the commands: who only looks must not delay who steers."""
MAX_OUTBOUND = 65_536
"""Replies, frames and events that wait for the bus."""
EVENT_ROOM = MAX_OUTBOUND - 8_192
"""Events stop here, so that a storm of them never costs a reply or a frame."""


# Structs cross to a bus of its own process as they are; `bus/wire.py` says how the others do.


class CommandIn(NamedTuple):
    """A well-formed command on its way to the engine; `token` is the bus's own handle for the reply."""

    role: str
    verb: str
    command: Command
    ignored: tuple[str, ...]
    token: Any


class QueryIn(NamedTuple):
    """A question: `what` is one of `subjects.QUERIES`."""

    what: str
    query: QueueQuery | RequestQuery | None
    token: Any


class LeadIn(Struct, tag="lead", array_like=True, gc=False):
    """A leader's heartbeat, as heard now."""

    lead: Lead


class ReplyOut(Struct, tag="reply", array_like=True, gc=False):
    """The answer to a `CommandIn`; `reply.code` is set on refusal."""

    token: Any
    reply: Reply


RequestTold = tuple[int, RequestStatus, bool]
"""The engine's number of a request, its row without a position, and whether it may be delivered tokens."""
TenantTold = tuple[TenantStatus, float | None, int, float]
"""A tenant's row without its age; since when its oldest request has waited (Unix s); its output tokens beyond those of
its requests with a slot; the price of an output token."""
Charge = tuple[str, float, float, int, int, float]
"""A tenant's name; of its row `base`, `charged` and the output tokens; then the last two as above."""


class Draft(NamedTuple):
    """What changed since the draft before, as the engine tells it: the bus makes frames of it (`bus/board.py`).

    The engine's time is precious, and making and encoding rows would be most of the cost of a large frame. So a row
    crosses only when something touched it; for a request that merely goes on, one number does, in an order that both
    sides know.
    """

    number: int
    """One more than the last: a gap is a loss, which `Port.begin_anew` repairs."""
    fresh: bool
    """Forget what was told before."""
    complete: bool
    """Everything was told by now: a full frame can be made."""
    frame: Frame
    """Without the rows below; it has all classes."""
    requests: Sequence[RequestTold] = ()
    """Rows that are new or changed."""
    gone: Sequence[tuple[int, int]] = ()
    """What is no longer listed: its number, and the output tokens that it had."""
    head: Sequence[int] = ()
    """Who waits first, in order."""
    tokens: Sequence[int] = ()
    """Output tokens of requests that may be delivered some, in the order in which their rows last crossed; then of
    `head`."""
    tenants: Sequence[TenantTold] = ()
    charges: Sequence[Charge] = ()


class FrameOut(Struct, tag="frame", array_like=True, gc=False):
    """A status frame. `idle` says that the engine goes to sleep after it: the bus repeats it until the next one."""

    draft: Draft
    idle: bool


class AnswerOut(NamedTuple):
    """The answer to a `QueryIn`."""

    token: Any
    answer: QueuePage | RequestReport | Config | Draft | Frame | RefusedError | Raw
    """The bus makes a full `Frame` of a `Draft`; `Raw` is JSON that is ready."""


class EventOut(Struct, tag="event", array_like=True, gc=False):
    """An event for the log; the bus puts it into its envelope."""

    kind: str
    """One of `events.KINDS`."""
    seq: int
    at: float
    step: int
    subject: tuple[str, int, str, str, int] | None
    """Request, child, tenant, class and priority; None if it concerns no request."""
    fields: dict[str, Any]
    """Those of its kind. Not to be changed: the request's story has the same."""

    def event(self, worker: str, incarnation: str) -> Event:
        """The event, whole."""
        fields = self.fields
        if self.subject is not None:
            request, child, tenant, class_, priority = self.subject
            fields = {
                "request": request, "child": child, "tenant": tenant, "class_": class_, "priority": priority, **fields,
            }  # fmt: skip
        return KINDS[self.kind](
            id=f"{worker}:{incarnation}:{self.seq}", worker=worker, incarnation=incarnation, seq=self.seq,
            at=self.at, step=self.step, **fields,
        )  # fmt: skip


Inbound = CommandIn | QueryIn | LeadIn
Outbound = ReplyOut | AnswerOut | FrameOut | EventOut


def _nobody() -> None:
    """Stand in for a side that is not there."""


class Port:
    """What both threads see. Each attribute is written by one side only; deques are atomic under the GIL."""

    def __init__(self) -> None:
        self.clock: Callable[[], float] = monotonic
        """What `wake_at` and `alarm_at` are told by; simulations put their own here."""
        self.unix_offset = time() - monotonic()
        """From the monotonic clock to Unix time as it was at the start: see `unix`."""
        self._commands: deque[CommandIn] = deque()
        self._queries: deque[tuple[int, QueryIn]] = deque()
        """Each with how many commands had been offered before it."""
        self.outbound: deque[Outbound] = deque()
        """What waits for the bus. Others may look at it, as every step does, but not change it."""
        self._wake_engine: Callable[[], None] = _nobody
        self._wake_bus: Callable[[], None] = _nobody
        self._set_alarm: Callable[[], None] = _nobody
        self.look: Callable[[], None] = _nobody
        """Called by the engine before it decides on a step: have what has arrived by now handed in (`attach_bus`)."""
        self._bus_told = False
        self._urgent = False
        """Whether more than events waits."""
        self._events_due = inf
        """When the events that wait go out at the latest (`clock`)."""
        # Written by the engine, read by the bus.
        self._commands_taken = 0
        self._lead_taken: LeadIn | None = None
        self.wake_at = inf
        """When the engine wants to be woken if nothing arrives (`clock`): see `wake_later`."""
        self.step = 0
        self.closing = False
        # Written by the bus, read by the engine.
        self._commands_offered = 0
        self._lead: LeadIn | None = None
        """The newest heartbeat of the highest epoch. It takes no place in a queue: were that full, silence would end
        every hold of the leader."""
        self.connected = False
        """Whether NATS is there: without it the engine builds no frames."""
        self.beginnings = 0
        """How often the bus had to be told everything from the beginning."""
        self.events_dropped = 0
        """Events that the bus could not deliver; the engine adds those that it could not queue."""
        self.alarm_at = inf
        """What the bus's timer is set to (monotonic s)."""

    def unix(self) -> float:
        """The worker's clock: Unix seconds that no jump of the wall clock moves.

        Deadlines, leases, events and frames go by it, in the engine as on the bus; were there two, a command could be
        too early for the one and too late for the other.
        """
        return monotonic() + self.unix_offset

    # The engine's side

    def attach_engine(self, wake: Callable[[], None]) -> None:
        """Say how to wake an idle engine; `wake` is called on the bus's thread."""
        self._wake_engine = wake

    def pending(self) -> int:
        """How many commands, queries and heartbeats wait for the engine."""
        return len(self._commands) + len(self._queries) + (self._lead is not self._lead_taken)

    def take(self) -> LeadIn | CommandIn | None:
        """The leader's heartbeat if there is a new one, else the next command, or None."""
        if (lead := self._lead) is not self._lead_taken:
            self._lead_taken = lead
            return lead
        if not self._commands:
            return None
        self._commands_taken += 1
        return self._commands.popleft()

    def take_query(self) -> QueryIn | None:
        """The next query, or None; also while a command waits that was offered before it: who asks sees it done."""
        if self._queries and self._queries[0][0] <= self._commands_taken:
            return self._queries.popleft()[1]
        return None

    def put(self, item: Outbound) -> bool:
        """Queue an item for the bus; False if the queue has no room for it (it is not queued)."""
        if isinstance(item, EventOut):
            return self.put_event(item)
        if len(self.outbound) >= MAX_OUTBOUND:
            return False
        self._urgent = True
        self.outbound.append(item)
        return True

    def put_event(self, item: EventOut) -> bool:
        """Queue an event, as `put`."""
        if len(self.outbound) >= EVENT_ROOM:
            return False
        if self._events_due == inf:
            self._events_due = self.clock() + EVENTS_S
        self.outbound.append(item)
        return True

    def flush(self, *, events: bool = False) -> None:
        """Tell the bus that items wait; once per step, whatever their number.

        Events alone wait for company, for `EVENTS_S` at most: every time the bus runs it takes the interpreter from
        the engine, and on a busy engine every step has an event. `events`: now, there may be no next step.
        """
        if not self.outbound or self._bus_told:
            return
        if self._urgent or events or self.clock() >= self._events_due:
            self._bus_told, self._urgent, self._events_due = True, False, inf
            self._wake_bus()

    def wake_later(self, delay_s: float | None) -> None:
        """Ask to be woken in `delay_s`, as at a lease's end. It replaces the last wish, None ends it.

        Works without NATS. Each wish is granted once: whoever still waits for something asks again when
        woken. Only a time earlier than its timer's disturbs the bus; a later one it finds when that rings.
        """
        # Before the comparison: `ring` has the other order, so one of the two sees what the other did.
        self.wake_at = inf if delay_s is None else self.clock() + delay_s
        if self.wake_at < self.alarm_at:
            self._set_alarm()

    # The bus's side

    def attach_bus(
        self,
        wake: Callable[[], None],
        set_alarm: Callable[[], None] = _nobody,
        look: Callable[[], None] = _nobody,
    ) -> None:
        """Say how to wake the bus; all are called on the engine thread and must be thread-safe and quick.

        Args:
            wake: items wait, `collect` them.
            set_alarm: `wake_at` is earlier than `alarm_at`.
            look: `offer` what has arrived, without waiting.
        """
        self._wake_bus = wake
        self._set_alarm = set_alarm
        self.look = look

    def offer(self, item: Inbound) -> bool:
        """Queue an item for the engine and wake it; False if its queue is full (it is not queued).

        A heartbeat replaces the one before it, unless that is of a newer leader.
        """
        if isinstance(item, LeadIn):
            if self._lead is None or item.lead.epoch >= self._lead.lead.epoch:
                self._lead = item
        elif isinstance(item, QueryIn):
            if len(self._queries) >= MAX_QUERIES:
                return False
            self._queries.append((self._commands_offered, item))
        elif len(self._commands) >= MAX_COMMANDS:
            return False
        else:
            self._commands_offered += 1
            self._commands.append(item)
        self._wake_engine()
        return True

    def tell_connected(self, connected: bool) -> None:
        """Say whether NATS is there. An engine that built no frames so far builds one: now somebody listens."""
        self.connected = connected
        if connected:
            self.wake_engine()

    def begin_anew(self) -> None:
        """Have the engine tell everything from the beginning: the bus is a new one, or it has missed something."""
        self.beginnings += 1
        self.wake_engine()

    def wake_engine(self) -> None:
        """Wake an idle engine."""
        self._wake_engine()

    def ring(self, now: float) -> None:
        """Wake the engine if the time that it asked for has come; else `alarm_at` says when to ring again."""
        # This order, for `wake_later` has the other.
        self.alarm_at = inf
        if self.wake_at <= now:
            self.wake_engine()
        else:
            self.alarm_at = self.wake_at

    def discard(self) -> None:
        """Throw away what waits: where there is no bus, as its `wake`, so that no queue fills."""
        self.collect()

    def collect(self) -> list[Outbound]:
        """Everything that waits for the bus, in order."""
        self._bus_told = False
        items = []
        while self.outbound:
            items.append(self.outbound.popleft())
        return items
