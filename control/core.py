"""The control core: frames, tables and the lease in, commands out.

Pure: no async, no I/O; the clock and command ids are passed in.

Levels, not edges: each step compares what every worker says it has with what it should have, and sends the
difference. So a lost command, a restarted worker and a new leader are all the same case.
Called by `daemon`, which carries out what `step` returns.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from coxswain.control.fleet import Fleet, WorkerView
from coxswain.control.policy import Directives, Policy, weight_of
from coxswain.schemas.commands import Command, Configure, Rank
from coxswain.schemas.names import DEFAULT
from coxswain.schemas.policy import ClassPolicy, Epoch, Lead, Prices, Sight, TenantPolicy, TenantRank, digest
from coxswain.schemas.status import Frame

BEAT_S: Final = 0.5
"""Between two heartbeats of the leader; workers give it up after 5 s."""
EXPIRES_S: Final = 5.0
"""A command that was not applied by then never is."""
ECHO_S: Final = 1.5
"""How long a worker's status may lag behind a rank that it applied; a full frame comes every second."""
ANSWER_S: Final = 2.0
"""A command without an answer by then counts as failed."""
FIRST_RETRY_S: Final = 0.25
MAX_RETRY_S: Final = 4.0
"""Bounds of the doubling wait after a command that failed."""
TOLERANCE: Final = 0.5
"""A base that is off by no more (half an input token of virtual time) is left alone."""
MAX_RANK_ROWS: Final = 2_000
"""Rows in one `rank`, well under NATS's default payload limit; the next step sends the rest."""


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """What the shell knows at a step."""

    frames: Sequence[Frame] = ()
    """Status frames since the last step, as they came."""
    classes: Mapping[str, ClassPolicy] | None = None
    tenants: Mapping[str, TenantPolicy] | None = None
    """The tables, whole; None until they were read: nothing but heartbeats is sent before."""
    epoch: Epoch | None = None
    """The lease's epoch while it is held, else None: only a leader sends anything."""
    answers: Sequence["Answer"] = ()
    """What became of commands sent in earlier steps."""


class Answer(NamedTuple):
    """Whether a worker accepted a command."""

    worker: str
    verb: str
    ok: bool


class Send(NamedTuple):
    """A command for one worker."""

    worker: str
    verb: str
    command: Command


class Beat(NamedTuple):
    """The leader's heartbeat."""

    lead: Lead


class Retry(msgspec.Struct):
    """Patience with one worker: in flight since when, and how long to wait after a failure."""

    sent_at: float | None = None
    ready_at: float = 0.0
    wait_s: float = FIRST_RETRY_S

    def ready(self, now: float) -> bool:
        """Whether another command may go out; no answer for too long is a failure."""
        if self.sent_at is not None and now - self.sent_at > ANSWER_S:
            self.answered(now, ok=False)
        return self.sent_at is None and now >= self.ready_at

    def answered(self, now: float, *, ok: bool) -> None:
        """Take an answer."""
        self.sent_at = None
        self.ready_at = now if ok else now + self.wait_s
        self.wait_s = FIRST_RETRY_S if ok else min(MAX_RETRY_S, self.wait_s * 2)


class Told(msgspec.Struct):
    """What one incarnation of a worker was told by this leader."""

    incarnation: str
    rows: dict[str, tuple[TenantRank, float]] = {}
    """Ranks sent, and when."""
    prices: Prices | None = None
    config: tuple[str, float] = ("", 0.0)
    """Digest sent, and when."""
    rank: Retry = msgspec.field(default_factory=Retry)
    configure: Retry = msgspec.field(default_factory=Retry)


class ControlCore:
    """The controller without its I/O.

    Args:
        policy: what order should rule.
        controller: our name, for heartbeats and as the commands' issuer.
        new_id: makes a fresh command id.
        cadence_s: least time between two ranks to the same worker.
    """

    def __init__(
        self, policy: Policy, controller: str, new_id: Callable[[], str], *, cadence_s: float = 0.05
    ) -> None:
        self.policy = policy
        self.controller = controller
        self.cadence_s = cadence_s
        self.fleet = Fleet()
        self.superseded_by: Epoch | None = None
        """A later epoch than ours that a worker obeys: the shell must give up the lease."""
        self._new_id = new_id
        self._epoch: Epoch | None = None
        self._told: dict[str, Told] = {}
        self._beat_at = float("-inf")
        self._ranked_at = float("-inf")

    def step(self, now: float, inputs: Inputs) -> list[Send | Beat]:
        """Take what is new; return what to send, in order. `now` is Unix seconds."""
        for frame in inputs.frames:
            self.fleet.merge(frame, now)
        self.fleet.age(now)
        self.policy.observe(self.fleet, inputs.tenants or {}, now)
        self.fleet.settle()
        self.superseded_by = self._superseded_by(inputs.epoch)
        if inputs.epoch != self._epoch:
            self._epoch = inputs.epoch
            self._told.clear()
            self._beat_at = self._ranked_at = float("-inf")
        if self._epoch is None or self.superseded_by is not None:
            return []
        for answer in inputs.answers:
            self._answered(answer, now)
        outgoing = self._meet(now)
        if inputs.classes is None or inputs.tenants is None:
            return outgoing
        directives = self.policy.decide(now)
        outgoing += self._configure(now, directives, inputs.classes, inputs.tenants)
        if now - self._ranked_at >= self.cadence_s:
            self._ranked_at = now
            outgoing += self._rank(now, directives, inputs.tenants)
        return outgoing

    def sight(self) -> Sight:
        """What we see of the fleet."""
        live = list(self.fleet.live())
        busy = {
            name
            for view in live
            for name, row in view.tenants.items()
            if row.queued or row.running or row.held
        }
        return Sight(
            workers=len(live),
            tenants=len(busy),
            queued=sum(view.frame.queued for view in live),
            running=sum(view.frame.running for view in live),
            held=sum(view.frame.held for view in live),
        )

    def _superseded_by(self, epoch: Epoch | None) -> Epoch | None:
        heard = (view.frame.leader.epoch for view in self.fleet.live())
        return max((other for other in heard if epoch and other and other > epoch), default=None)

    def _meet(self, now: float) -> list[Send | Beat]:
        """Forget incarnations that ended; greet new ones with a heartbeat, before which they obey nobody."""
        live = {view.worker: view.incarnation for view in self.fleet.live()}
        self._told = {name: told for name, told in self._told.items() if live.get(name) == told.incarnation}
        strangers = live.keys() - self._told.keys()
        self._told.update((name, Told(incarnation=live[name])) for name in strangers)
        if not strangers and now - self._beat_at < BEAT_S:
            return []
        assert self._epoch is not None
        self._beat_at = now
        lead = Lead(
            epoch=self._epoch,
            controller=self.controller,
            policy=self.policy.name,
            at=now,
            sees=self.sight(),
        )
        return [Beat(lead)]

    def _answered(self, answer: Answer, now: float) -> None:
        told = self._told.get(answer.worker)
        if told is None:
            return
        if answer.verb == "configure":
            told.configure.answered(now, ok=answer.ok)
            if not answer.ok:
                told.config = ("", 0.0)
        elif answer.verb == "rank":
            told.rank.answered(now, ok=answer.ok)
            if not answer.ok:
                told.rows.clear()
                told.prices = None

    def _configure(
        self,
        now: float,
        directives: Directives,
        classes: Mapping[str, ClassPolicy],
        tenants: Mapping[str, TenantPolicy],
    ) -> list[Send | Beat]:
        """`configure` for every worker that does not have the tables in force."""
        wanted = self._ordered(directives, classes)
        name = digest(wanted, tenants)
        sends: list[Send | Beat] = []
        for view in self.fleet.live():
            told = self._told[view.worker]
            echoed = told.config[0] == name and now - told.config[1] < ECHO_S
            if view.frame.config == name or echoed or not told.configure.ready(now):
                continue
            told.config = (name, now)
            told.configure.sent_at = now
            command = Configure(**self._envelope(now), classes=dict(wanted), tenants=dict(tenants))
            sends.append(Send(view.worker, "configure", command))
        return sends

    def _ordered(
        self, directives: Directives, classes: Mapping[str, ClassPolicy]
    ) -> Mapping[str, ClassPolicy]:
        """The class table with the policy's order in every row, and rows for classes that have none."""
        if directives.order is None:
            return classes
        seen = {row.class_ for view in self.fleet.live() for row in view.tenants.values()}
        return {
            name: msgspec.structs.replace(classes.get(name, ClassPolicy()), order=directives.order)
            for name in sorted({DEFAULT, *classes, *seen})
        }

    def _rank(
        self, now: float, directives: Directives, tenants: Mapping[str, TenantPolicy]
    ) -> list[Send | Beat]:
        """`rank` for every worker whose bases, weights or prices are materially other than wanted."""
        sends: list[Send | Beat] = []
        for view in self.fleet.live():
            wanted = directives.ranks.get(view.worker, {})
            told = self._told[view.worker]
            if not told.rank.ready(now):
                continue
            rows: dict[str, TenantRank] = {}
            for tenant, rank in wanted.items():
                base, weight = _has(now, view, told, tenant, tenants)
                if abs(rank.base - base) > TOLERANCE or rank.weight != weight:
                    rows[tenant] = rank
                    if len(rows) == MAX_RANK_ROWS:
                        break
            prices = directives.prices if directives.prices != told.prices else None
            if not rows and prices is None:
                continue
            told.rank.sent_at = now
            told.prices = directives.prices
            told.rows.update((tenant, (rank, now)) for tenant, rank in rows.items())
            command = Rank(**self._envelope(now), incarnation=view.incarnation, tenants=rows, prices=prices)
            sends.append(Send(view.worker, "rank", command))
        return sends

    def _envelope(self, now: float) -> dict[str, Any]:
        return {
            "id": self._new_id(),
            "issuer": self.controller,
            "epoch": self._epoch,
            "expires_at": now + EXPIRES_S,
        }

    def validate(self) -> None:
        """Check every invariant; raises AssertionError."""
        self.fleet.validate()
        assert not self.fleet.changed, "every step ends settled"
        assert self._epoch is not None or not self._told, "only a leader tells anybody anything"
        for name, told in self._told.items():
            assert told.incarnation
            assert name in self.fleet.workers
            assert FIRST_RETRY_S <= told.rank.wait_s <= MAX_RETRY_S
            assert FIRST_RETRY_S <= told.configure.wait_s <= MAX_RETRY_S


def _has(
    now: float, view: WorkerView, told: Told, tenant: str, tenants: Mapping[str, TenantPolicy]
) -> tuple[float, float]:
    """Base and weight that a worker has: as we just told it, else as it reports, else as we once told it."""
    row = view.tenants.get(tenant)
    rank, sent_at = told.rows.get(tenant, (None, 0.0))
    if rank is not None and (row is None or now - sent_at < ECHO_S):
        return rank.base, rank.weight
    if row is not None:
        return row.base, row.weight
    return 0.0, weight_of(tenants, tenant)
