"""A controller in virtual time: the real control core, stepped at its cadence, over links.

What `control.daemon` and `service.bus` are to each other over NATS, without either: frames are numbered and repeated
as heartbeats while an engine is idle, commands are encoded and decoded as on the wire, replies come back as answers.
In an outage the controller is dead: nothing is heard or sent, and its successor knows nothing and has a later epoch.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec

from coxswain.control.core import Answer, Beat, ControlCore, Inputs, Send
from coxswain.control.policy import Policy
from coxswain.lab.agenda import START, Agenda
from coxswain.lab.engine import Engine
from coxswain.lab.link import Link
from coxswain.lab.setup import Outage, Tables
from coxswain.schemas.commands import Reply, decode, encode
from coxswain.schemas.errors import RefusedError
from coxswain.schemas.status import Frame
from coxswain.schemas.subjects import CONTROLLER
from coxswain.service.port import CommandIn, FrameOut, LeadIn, Outbound, ReplyOut

HEARTBEAT_S: Final = 1.0
"""Between two frames of an idle engine."""
NAME: Final = "lab"


class _Token(NamedTuple):
    """Which command of which controller a reply answers."""

    core: ControlCore
    worker: str
    verb: str


class Mouth:
    """What the bus is to an engine: it numbers frames, and repeats the last one of an idle engine."""

    def __init__(self, engine: Engine, agenda: Agenda, send: Callable[[FrameOut | ReplyOut], None]) -> None:
        self._agenda = agenda
        self._send = send
        self._seq = 0
        self._idle: tuple[Frame, float] | None = None
        engine.attach(self._collect)

    def _collect(self, items: list[Outbound]) -> None:
        for item in items:
            if isinstance(item, FrameOut):
                self._seq += 1
                frame = msgspec.structs.replace(item.frame, seq=self._seq, sent_at=self._agenda.now)
                self._idle = (frame, self._agenda.now) if item.idle else None
                self._send(FrameOut(frame, item.idle))
                if item.idle:
                    self._agenda.after(HEARTBEAT_S, lambda seq=self._seq: self._repeat(seq))  # type: ignore[misc]
            elif isinstance(item, ReplyOut):
                self._send(item)

    def _repeat(self, seq: int) -> None:
        if self._idle is None or self._seq != seq:
            return
        (frame, since), now = self._idle, self._agenda.now
        self._seq += 1
        age_s = frame.leader.age_s
        leader = (
            frame.leader
            if age_s is None
            else msgspec.structs.replace(frame.leader, age_s=age_s + now - since)
        )
        self._send(
            FrameOut(msgspec.structs.replace(frame, seq=self._seq, sent_at=now, leader=leader), idle=True)
        )
        self._agenda.after(HEARTBEAT_S, lambda seq=self._seq: self._repeat(seq))  # type: ignore[misc]


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
        for engine in engines:
            Mouth(engine, agenda, self._hear)
        agenda.at(agenda.now, self._step)

    def _hear(self, item: FrameOut | ReplyOut) -> None:
        if isinstance(item, FrameOut):
            self._link.send(lambda: self._frames.append(item.frame))
        else:
            self._link.send(lambda: self._answer(item.token, item.reply))

    def _answer(self, token: _Token, reply: Reply) -> None:
        if reply.outcome == "rejected":
            self.rejected += 1
        if token.core is self._core:
            self._answers.append(Answer(token.worker, token.verb, ok=reply.outcome != "rejected"))

    def _step(self) -> None:
        self._agenda.after(self._cadence_s, self._step)
        frames, self._frames = self._frames, []
        answers, self._answers = self._answers, []
        now = self._agenda.now
        if any(outage.at_s <= now - START < outage.at_s + outage.for_s for outage in self._outages):
            self._core = None
            return
        if self._core is None:
            self._lives += 1
            self._core = ControlCore(self._make_policy(), NAME, self._new_id, cadence_s=self._cadence_s)
        inputs = Inputs(
            frames=frames, classes=self._tables.classes, tenants=self._tables.tenants,
            epoch=(START, self._lives), answers=answers,
        )  # fmt: skip
        for outgoing in self._core.step(now, inputs):
            self._send(self._core, outgoing)

    def _send(self, core: ControlCore, outgoing: Send | Beat) -> None:
        if isinstance(outgoing, Beat):
            for engine in self._engines.values():
                self._link.send(lambda port=engine.scheduler.port: port.offer(LeadIn(outgoing.lead)))  # type: ignore[misc]
            return
        self.commands += 1
        token = _Token(core, outgoing.worker, outgoing.verb)
        try:
            command, ignored = decode(outgoing.verb, encode(outgoing.command))
        except RefusedError:
            # As the bus of a worker would: the core hears of it without a round trip, which is soon enough.
            self.rejected += 1
            self._answers.append(Answer(outgoing.worker, outgoing.verb, ok=False))
            return
        item = CommandIn(CONTROLLER, outgoing.verb, command, ignored, token)
        self._link.send(lambda: self._engines[outgoing.worker].scheduler.port.offer(item))

    def _new_id(self) -> str:
        self._ids += 1
        return f"lab-{self._lives}-{self._ids}"
