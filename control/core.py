"""The control core: frames, tables and the lease in, commands out.

Pure: no async, no I/O; the clock and command ids are passed in.

Levels, not edges: each step compares what every worker says it has with what it should have, and sends the
difference. So a lost command, a restarted worker and a new leader are all the same case.
Called by `daemon`, which carries out what `step` returns.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import nsmallest
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import msgspec

from coxswain.control import requests
from coxswain.control.errors import PolicyError
from coxswain.control.failures import Failures, Stage
from coxswain.control.fleet import Fleet, WorkerView
from coxswain.control.policy import Directives, Policy, Tables, weight_of
from coxswain.control.told import ECHO_S, Told
from coxswain.control.vetting import Config, Vetting
from coxswain.schemas.commands import COMMANDS, Command
from coxswain.schemas.errors import Code
from coxswain.schemas.names import DEFAULT
from coxswain.schemas.policy import (
    ClassPolicy,
    Epoch,
    Lead,
    Sight,
    TenantPolicy,
    TenantRank,
)
from coxswain.schemas.status import Frame, RequestStatus, TenantStatus

BEAT_S: Final = 0.5
"""Between two heartbeats of the leader; workers give it up after 5 s."""
EXPIRES_S: Final = 5.0
"""A command that was not applied by then never is."""
TOLERANCE: Final = 0.5
"""A base that is off by no more (half an input token of virtual time) is left alone."""
CLOSE: Final = 0.05
"""So is an expectation that is off by no more than this part of itself."""
MAX_RANK_ROWS: Final = 2_000
"""Rows in one `rank`, well under NATS's default payload limit: those told longest ago. The next one has the rest."""
RANK_ROWS_PER_STEP: Final = 750
"""Rows that one step compares. In large fleets workers take turns: a step's length is bounded, not a rank's age."""
ASK_S: Final = 0.5
"""How often a worker is asked for the part of its queue that frames do not list."""
ABOUT_REQUESTS: Final = frozenset({"prioritize", "preempt", "continue"})
NOT_FAILURES: Final = frozenset({404, 422})
"""Answers to commands about single requests after which nothing needs to be tried again: it ended, it cannot."""


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """What the shell knows at a step, beside the frames that it heard."""

    classes: Mapping[str, ClassPolicy] | None = None
    tenants: Mapping[str, TenantPolicy] | None = None
    """The tables, whole; None until they were read: nothing but heartbeats is sent before."""
    epoch: Epoch | None = None
    """The lease's epoch while it is held, else None: only a leader sends anything."""
    answers: Sequence["Answer"] = ()
    """What became of commands sent in earlier steps."""
    listings: Sequence["Listing"] = ()
    """Queues that were asked for in earlier steps."""


class Listing(NamedTuple):
    """A worker's queue, whole, as an `Ask` brought it."""

    worker: str
    rows: Sequence[RequestStatus]


class Answer(NamedTuple):
    """Whether a worker accepted a command."""

    send: "Send"
    """Which: a late answer is no later command's."""
    ok: bool
    code: int | None = None
    """The refusal's; None also if nobody answered."""
    ignored: Sequence[str] = ()
    """Fields that the worker does not know: the rest was applied."""


class Send(NamedTuple):
    """A command for one worker."""

    worker: str
    verb: str
    command: Command


class Ask(NamedTuple):
    """A worker's queue is wanted, whole; a `Listing` may come, or nothing."""

    worker: str


class Beat(NamedTuple):
    """The leader's heartbeat."""

    lead: Lead


Outgoing = Send | Ask | Beat


class ControlCore:
    """The controller without its I/O.

    Args:
        policy: what order should rule.
        controller: our name, for heartbeats and as the commands' issuer.
        new_id: makes a fresh command id.
        cadence_s: least time between two ranks to the same worker.
        patient: whether a policy that raises is lived with, and counted in `failures`; else the step raises too.
    """

    def __init__(
        self,
        policy: Policy,
        controller: str,
        new_id: Callable[[], str],
        *,
        cadence_s: float = 0.05,
        patient: bool = False,
    ) -> None:
        self.policy = policy
        self.controller = controller
        self.cadence_s = cadence_s
        self.fleet = Fleet(rows=policy.sees != "tenants")
        self.disowned_by: dict[str, Epoch] = {}
        """Workers that obey a later epoch than ours, by their own word, and which: the shell must look whether the
        lease is still ours. That alone decides: a worker may lie, or have been lied to."""
        self.failures = Failures()
        self._patient = patient
        self._new_id = new_id
        self._epoch: Epoch | None = None
        self._told: dict[str, Told] = {}
        self._beat_at = float("-inf")
        self._tables = Tables()
        self._tables_of: tuple[Any, Any, int] = (None, None, 0)
        self._config = Config()
        self._vetting = Vetting(patient=patient)
        self._outgoing: list[Outgoing] = []

    def hear(self, now: float, frame: Frame) -> None:
        """Take a status frame as it comes; the next step sees what it says."""
        self.fleet.merge(frame, now)

    def step(self, now: float, inputs: Inputs) -> list[Outgoing]:
        """Take what is new; return what to send, in order. `now` is Unix seconds, and never jumps."""
        for listing in inputs.listings:
            self.fleet.list_queue(listing.worker, listing.rows)
        self.fleet.age(now)
        tables = self._complete(inputs.classes or {}, inputs.tenants or {})
        observed = self._observed(tables, now)
        self.fleet.settle()
        self.disowned_by = self._disowned_by(inputs.epoch)
        if inputs.epoch != self._epoch:
            self._epoch = inputs.epoch
            self._told.clear()
            self._beat_at = float("-inf")
        if self._epoch is None:
            if observed:
                self.failures.rested()
            return []
        for answer in inputs.answers:
            self._answered(answer, now)
        self._outgoing = outgoing = self._meet(now)
        if inputs.classes is None or inputs.tenants is None:
            return outgoing
        self._vetting.begin()
        if observed:
            try:
                directives = self.policy.decide(now)
                # What it said may be lazy, and raise only here: what was made of it until then goes out.
                self._carry_out(now, directives, inputs.classes, tables)
            except BaseException as error:  # noqa: BLE001 - it is others' code, and may even exit
                self._failed("decide", error)
            else:
                classes = None if directives.classes is None else self._config.classes
                self.failures.worked(classes, self._vetting.error)
        if self.failures.in_row and (instead := self.failures.instead) is not None:
            self._carry_out(now, instead, inputs.classes, tables)
        return outgoing

    def _observed(self, tables: Tables, now: float) -> bool:
        try:
            self.policy.observe(self.fleet, tables, now)
        except BaseException as error:  # noqa: BLE001 - it is others' code, and may even exit
            self._failed("observe", error)
            return False
        return True

    def _failed(self, stage: Stage, error: BaseException) -> None:
        if not self._patient or isinstance(error, KeyboardInterrupt):
            raise error
        self.failures.failed(stage, error)

    def _carry_out(
        self, now: float, directives: Directives, classes: Mapping[str, ClassPolicy], tables: Tables
    ) -> None:
        """Whatever workers do not have of what the policy wants goes out."""
        if not isinstance(directives, Directives):
            raise PolicyError(f"decide returned {type(directives).__name__}, not Directives")
        self._configure(now, directives, classes, tables)
        self._rank(now, directives, tables)
        self._steer(now, directives, tables)
        if self.policy.sees == "queue":
            self._ask(now)

    def sight(self) -> Sight:
        """What we see of the fleet."""
        live = list(self.fleet.live())
        return Sight(
            workers=len(live),
            tenants=len(self.fleet.busy()),
            queued=sum(view.frame.queued for view in live),
            running=sum(view.frame.running for view in live),
            held=sum(view.frame.held for view in live),
        )

    def _complete(self, classes: Mapping[str, ClassPolicy], tenants: Mapping[str, TenantPolicy]) -> Tables:
        """The tables with a row for every class that there is; the same object while nothing changed."""
        seen = self.fleet.presence.classes
        if (classes, tenants, len(seen)) != self._tables_of:
            rows = {name: classes.get(name, ClassPolicy()) for name in sorted({DEFAULT, *classes, *seen})}
            # Read-only: what a policy put into them would go to every worker as the operators'.
            self._tables = Tables(MappingProxyType(rows), MappingProxyType(dict(tenants)))
            self._tables_of = (dict(classes), dict(tenants), len(seen))
        return self._tables

    def _disowned_by(self, epoch: Epoch | None) -> dict[str, Epoch]:
        if epoch is None:
            return {}
        heard = ((view.worker, view.frame.leader.epoch) for view in self.fleet.live())
        return {worker: other for worker, other in heard if other and other > epoch}

    def _meet(self, now: float) -> list[Outgoing]:
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
        worker, verb, command = answer.send
        if (told := self._told.get(worker)) is not None:
            about = verb in ABOUT_REQUESTS and answer.code in NOT_FAILURES
            # None of the classes is there any more: other caps stand, and there is nothing to try again.
            ok = answer.ok or about or (verb == "limit" and answer.code == Code.NOT_FOUND)
            told.answered(verb, command.id, now, ok=ok, partly=bool(answer.ignored))

    def _configure(
        self, now: float, directives: Directives, classes: Mapping[str, ClassPolicy], tables: Tables
    ) -> None:
        """`configure` for every worker that does not have the tables in force."""
        wanted = classes if directives.classes is None else directives.classes
        if (wanted, tables.tenants) != self._config.made_of:
            self._config = Config.of(wanted, tables.tenants, classes, Vetting(patient=self._patient))
        config = self._config
        self._vetting.error = self._vetting.error or config.error
        for view in self.fleet.live():
            told, has = self._told[view.worker], view.frame.config
            if (
                has == config.digest
                or not told.ready("configure", now)
                or not told.wants(config.digest, has, now)
            ):
                continue
            told.config, told.part = (config.digest, now), ("", "")
            fields = {"classes": dict(config.classes), "tenants": dict(config.tenants)}
            self._send(now, view, told, "configure", fields)

    def _rank(self, now: float, directives: Directives, tables: Tables) -> None:
        """`rank` for workers whose bases, weights or prices are materially other than wanted, longest ago first."""
        wanted_prices = self._vetting.prices(directives.prices)
        compared = 0
        for view in sorted(self.fleet.live(), key=lambda view: self._told[view.worker].ranked_at):
            told = self._told[view.worker]
            if compared >= RANK_ROWS_PER_STEP or now - told.ranked_at < self.cadence_s:
                break
            if not told.ready("rank", now):
                continue
            told.ranked_at = now
            wanted = directives.ranks.get(view.worker, {})
            compared += len(wanted)
            rows = self._differing(now, view, told, wanted, tables)
            prices = wanted_prices if wanted_prices != told.prices else None
            if not rows and prices is None:
                continue
            told.prices = wanted_prices
            told.rank(rows, now)
            fields = {"incarnation": view.incarnation, "tenants": rows, "prices": prices}
            self._send(now, view, told, "rank", fields)

    def _differing(
        self, now: float, view: WorkerView, told: Told, wanted: Mapping[str, TenantRank], tables: Tables
    ) -> dict[str, TenantRank]:
        """The rows that a worker does not have: by what it was just told, else by what it reports."""
        rows: dict[str, TenantRank] = {}
        ranks, told_at, reported, vet = told.ranks, told.ranks_at, view.tenants.rank, self._vetting.rank
        for tenant, rank in wanted.items():
            said: TenantRank | None = None
            try:
                said = ranks.get(tenant)
                has: TenantRank | TenantStatus
                if said is not None and now - told_at[tenant] < ECHO_S:
                    has = said
                else:
                    has = reported(tenant) or said or TenantRank(weight=weight_of(tables.tenants, tenant))
                expected = rank.expected_output
                has_it = (  # what is not a number is never close to anything
                    -TOLERANCE <= rank.base - has.base <= TOLERANCE
                    and abs(expected - has.expected_output) <= CLOSE * expected
                    and rank.weight == has.weight
                )
            except Exception:  # noqa: BLE001 - what a policy says may be anything: vetting tells what is wrong
                has_it = False
            if not has_it and (taken := vet(tenant, rank, named=said is not None)) is not None:
                rows[tenant] = taken
        if len(rows) <= MAX_RANK_ROWS:
            return rows
        return dict(nsmallest(MAX_RANK_ROWS, rows.items(), key=lambda row: told.told_at(row[0])))

    def _steer(self, now: float, directives: Directives, tables: Tables) -> None:
        """Commands about single requests and caps, for every worker that needs any."""
        vetting = self._vetting
        for view in self.fleet.live():
            told, worker = self._told[view.worker], view.worker
            wanted, moves = directives.priorities.get(worker, {}), directives.moves.get(worker, {})
            holds, caps = directives.holds.get(worker, {}), directives.caps.get(worker, {})
            if (wanted or moves) and told.ready("prioritize", now):
                self._order(now, view, told, requests.prioritize(now, view, told, wanted, moves, vetting))
            if (holds or view.requests) and told.ready("preempt", now) and told.ready("continue", now):
                self._order(now, view, told, requests.hold(now, view, told, holds, vetting))
            if (caps or told.caps or told.inherited) and told.ready("limit", now):
                self._order(now, view, told, requests.limit(now, view, told, caps, tables, vetting))

    def _order(self, now: float, view: WorkerView, told: Told, orders: Iterable[requests.Order]) -> None:
        for verb, fields in orders:
            self._send(now, view, told, verb, fields)

    def _ask(self, now: float) -> None:
        """`query queue` for workers where more waits than frames list."""
        for view in self.fleet.live():
            told = self._told[view.worker]
            if view.unlisted and now - told.asked_at >= ASK_S:
                told.asked_at = now
                self._outgoing.append(Ask(view.worker))

    def _send(self, now: float, view: WorkerView, told: Told, verb: str, fields: Mapping[str, Any]) -> None:
        # Deadlines are judged by the worker's clock, so they are told by it: our own may be another.
        worker_now = view.frame.sent_at + (now - view.heard_at)
        command = COMMANDS[verb](
            id=self._new_id(),
            issuer=self.controller,
            epoch=self._epoch,
            expires_at=worker_now + EXPIRES_S,
            **fields,
        )
        told.sent(verb, command.id, now)
        self._outgoing.append(Send(view.worker, verb, command))

    def validate(self) -> None:
        """Check every invariant; raises AssertionError."""
        self.fleet.validate()
        assert not self.fleet.changed, "every step ends settled"
        assert self._epoch is not None or not self._told, "only a leader tells anybody anything"
        for name, told in self._told.items():
            assert name in self.fleet.workers
            told.validate()
