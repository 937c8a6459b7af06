"""A controller in virtual time: the real control core, stepped at its cadence, over links.

What `control.daemon` and `service.bus` are to each other over NATS, without either: frames are numbered and repeated
as heartbeats while an engine is idle, commands are encoded and decoded as on the wire, replies come back as answers.
In an outage the controller is dead: nothing is heard or sent, and its successor knows nothing and has a later epoch.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from msgspec.structs import replace

from coxswain.control.core import (
    NOT_FAILURES,
    Answer,
    Ask,
    Beat,
    ControlCore,
    Inputs,
    Listing,
    Outgoing,
    Send,
)
from coxswain.control.daemon import MAX_QUEUE_PAGES, QUEUE_PAGE
from coxswain.control.policy import Policy, Tables
from coxswain.lab.agenda import START, Agenda
from coxswain.lab.engine import Engine
from coxswain.lab.link import Link
from coxswain.lab.setup import Outage
from coxswain.schemas.commands import Reply, decode, encode
from coxswain.schemas.errors import Code, RefusedError
from coxswain.schemas.status import Frame, QueuePage, QueueQuery, RequestStatus
from coxswain.schemas.subjects import CONTROLLER
from coxswain.service.bus.board import Board
from coxswain.service.port import AnswerOut, CommandIn, FrameOut, LeadIn, Outbound, QueryIn, ReplyOut

HEARTBEAT_S: Final = 1.0
"""Between two frames of an idle engine."""
FULL_S: Final = 1.0
"""Between two full frames of a busy one."""
NAME: Final = "lab"


class _Token(NamedTuple):
    """Which command of which controller a reply answers."""

    core: ControlCore
    send: Send


class _Question(NamedTuple):
    """Whose queue which controller asked for, and what it was told of it so far."""

    core: ControlCore
    worker: str
    rows: tuple[RequestStatus, ...] = ()
    pages: int = 1


Said = Frame | ReplyOut | AnswerOut
"""What comes from an engine."""


class Mouth:
    """What the bus is to an engine: it completes and numbers frames, and repeats the last one of an idle engine.

    Args:
        engine: whose.
        agenda: whose time it lives in.
        say: takes frames, replies and answers as they leave.
        requests: whether anybody reads the rows of single requests; frames go without them otherwise.
    """

    def __init__(
        self, engine: Engine, agenda: Agenda, say: Callable[[Said], None], *, requests: bool
    ) -> None:
        self._agenda = agenda
        self._say = say
        self._board = Board(FULL_S, requests=requests)
        self._seq = 0
        self._idle: tuple[Frame, float] | None = None
        engine.attach(self._collect)

    def _collect(self, items: list[Outbound]) -> None:
        for item in items:
            if isinstance(item, FrameOut):
                self._board.take(item.draft)
                self._show(idle=item.idle)
            elif isinstance(item, ReplyOut | AnswerOut):
                self._say(item)

    def _show(self, *, idle: bool) -> None:
        """As `service.bus.loop`, but that nothing costs time here."""
        board, now = self._board, self._agenda.now
        if (delta := board.delta()) is not None:
            self._number(delta, idle=False)
        if idle or board.due(now):
            self._number(board.full(), idle=idle)
            board.paid(now, 0.0)

    def _number(self, frame: Frame, *, idle: bool) -> None:
        now = self._agenda.now
        self._seq += 1
        frame = replace(frame, seq=self._seq, sent_at=now)
        self._idle = (frame, now) if idle else None
        self._say(frame)
        if idle:
            seq = self._seq
            self._agenda.after(HEARTBEAT_S, lambda: self._repeat(seq))

    def _repeat(self, seq: int) -> None:
        """Say again that the engine is idle, unless something else was said since."""
        if self._idle is None or self._seq != seq:
            return
        frame, since = self._idle
        age_s = frame.leader.age_s
        if age_s is not None:
            frame = replace(frame, leader=replace(frame.leader, age_s=age_s + self._agenda.now - since))
        self._number(frame, idle=True)


class Controller:
    """Leads these engines with a policy.

    Args:
        engines: whom it leads.
        agenda: whose time it lives in.
        make_policy: the policy, fresh, for it and for each successor.
        tables: class and tenant table.
        cadence_s: between two steps.
        link: between it and the engines, both ways.
        outages: when it is dead.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        agenda: Agenda,
        make_policy: Callable[[], Policy],
        tables: Tables,
        *,
        cadence_s: float,
        link: Link,
        outages: Sequence[Outage] = (),
    ) -> None:
        self.commands = 0
        """Commands sent, heartbeats apart."""
        self.rejected = 0
        """Commands refused, but for requests that had ended when they came."""
        self._engines = {engine.name: engine for engine in engines}
        self._agenda = agenda
        self._make_policy = make_policy
        self._tables = tables
        self._cadence_s = cadence_s
        self._link = link
        self._outages = tuple(outages)
        self._lives = 0
        self._ids = 0
        self._core: ControlCore | None = None
        self._frames: list[Frame] = []
        self._answers: list[Answer] = []
        self._listings: list[Listing] = []
        requests = make_policy().sees != "tenants"
        for engine in engines:
            Mouth(engine, agenda, self._hear, requests=requests)
        agenda.at(agenda.now, self._step)

    def _hear(self, said: Said) -> None:
        self._link.send(lambda: self._take(said))

    def _take(self, said: Said) -> None:
        if isinstance(said, Frame):
            self._frames.append(said)
        elif isinstance(said, ReplyOut):
            self._answer(said.token, said.reply)
        elif isinstance(said.answer, QueuePage):
            self._page(said.token, said.answer)

    def _answer(self, token: _Token, reply: Reply) -> None:
        ok = reply.outcome != "rejected"
        self.rejected += not ok and reply.code not in NOT_FAILURES
        if token.core is self._core:
            self._answers.append(Answer(token.send, ok=ok, code=reply.code))

    def _page(self, question: _Question, page: QueuePage) -> None:
        if question.core is not self._core:
            return
        rows = (*question.rows, *page.requests)
        if page.next is None or question.pages >= MAX_QUEUE_PAGES:
            self._listings.append(Listing(question.worker, rows))
        else:
            self._ask(_Question(question.core, question.worker, rows, question.pages + 1), page.next)

    def _ask(self, question: _Question, after: str | None = None) -> None:
        item = QueryIn("queue", QueueQuery(after=after, limit=QUEUE_PAGE), question)
        self._link.send(lambda: self._engines[question.worker].scheduler.port.offer(item))

    def _step(self) -> None:
        self._agenda.after(self._cadence_s, self._step)
        frames, self._frames = self._frames, []
        answers, self._answers = self._answers, []
        listings, self._listings = self._listings, []
        now = self._agenda.now
        if any(outage.at_s <= now - START < outage.at_s + outage.for_s for outage in self._outages):
            self._core = None
            return
        if self._core is None:
            self._lives += 1
            self._core = ControlCore(self._make_policy(), NAME, self._new_id, cadence_s=self._cadence_s)
        for frame in frames:
            self._core.hear(now, frame)
        inputs = Inputs(
            classes=self._tables.classes, tenants=self._tables.tenants,
            epoch=(START, self._lives), answers=answers, listings=listings,
        )  # fmt: skip
        for outgoing in self._core.step(now, inputs):
            self._send(self._core, outgoing)

    def _send(self, core: ControlCore, outgoing: Outgoing) -> None:
        if isinstance(outgoing, Ask):
            self._ask(_Question(core, outgoing.worker))
            return
        if isinstance(outgoing, Beat):
            for engine in self._engines.values():
                self._link.send(lambda port=engine.scheduler.port: port.offer(LeadIn(outgoing.lead)))  # type: ignore[misc]
            return
        self.commands += 1
        token = _Token(core, outgoing)
        try:
            command, ignored = decode(outgoing.verb, encode(outgoing.command))
        except RefusedError:
            # As the bus of a worker would: the core hears of it without a round trip, which is soon enough.
            self.rejected += 1
            self._answers.append(Answer(outgoing, ok=False, code=int(Code.MALFORMED)))
            return
        item = CommandIn(CONTROLLER, outgoing.verb, command, ignored, token)
        self._link.send(lambda: self._engines[outgoing.worker].scheduler.port.offer(item))

    def _new_id(self) -> str:
        self._ids += 1
        return f"lab-{self._lives}-{self._ids}"
