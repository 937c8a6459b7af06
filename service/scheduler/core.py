"""The steering core: what every request, tenant, hold and command means. Pure and synchronous.

Told of everything by the vLLM shell (`steered.py`), with the clock passed in; it acts on the engine only through
the small port `Engine`. Knows ranks, holds and leases; knows no policy, no NATS, no event loop. Here: the life of
a request, the leader, the tables. Its rooms: `roster` (who is where), `queue` (in which order they wait), `ledger`
(what they cost), `holds` (who keeps whom from running), `limits` (how many may run), `room` (who makes way for
whom), `budget` (prompt tokens per step), `drain`, `tenants`. Commands are in `verbs.py`.
`validate()` checks all invariants and is called by tests after every step.
"""

from collections.abc import Callable
from typing import Any, Final

from coxswain.schemas import events as ev
from coxswain.schemas.names import DEFAULT
from coxswain.schemas.policy import LEADER_LEASE_S, ClassPolicy, Epoch, Lead, TenantPolicy, TenantRank, digest
from coxswain.schemas.subjects import CONTROLLER
from coxswain.service.scheduler.arrival import met
from coxswain.service.scheduler.budget import StepBudget
from coxswain.service.scheduler.drain import Drain
from coxswain.service.scheduler.engine import Engine
from coxswain.service.scheduler.groups import ClassGroup
from coxswain.service.scheduler.holds import Holds
from coxswain.service.scheduler.ledger import Ledger
from coxswain.service.scheduler.limits import Limits
from coxswain.service.scheduler.queue import SteeredQueue
from coxswain.service.scheduler.record import Progress, Record
from coxswain.service.scheduler.room import Room
from coxswain.service.scheduler.roster import Roster
from coxswain.service.scheduler.states import HELD, QUEUED, Transition
from coxswain.service.scheduler.tenants import Tenants

BUILT_IN_CLASSES: Final = {DEFAULT: ClassPolicy()}


class SteeringCore:
    """All that steering knows on one engine.

    Args:
        engine: the mechanism it acts on.
        emit: called with each event; they leave through it and nowhere else. None if nobody listens: none is told.
        leader_lease_s: how long a leader may be silent before the holds of controllers end.
    """

    def __init__(
        self, engine: Engine, emit: Callable[..., None] | None, *, leader_lease_s: float = LEADER_LEASE_S
    ) -> None:
        self.engine = engine
        self.emit = emit
        self.leader_lease_s = leader_lease_s
        self.step = 0
        self.queue = SteeredQueue()
        self.tenants = Tenants()
        self.limits = Limits(self.queue, self.tenants, self.tell)
        self.roster = Roster(self.tenants, self.limits)
        self.ledger = Ledger(self.roster, self.tenants, self.queue)
        self.holds = Holds(
            engine, self.roster, self.ledger, self.queue, self.tell, self._began, self.limits.room
        )
        self.drain = Drain(self.roster, self.holds)
        self.room = Room(engine, self.roster, self.queue, self.holds, self.limits, self.evict)
        self.budget = StepBudget(engine, self.queue, self.limits)
        self.classes: dict[str, ClassPolicy] = {}
        self.digest = ""
        self.configure({}, {})
        self.epoch: Epoch | None = None
        self.leader: Lead | None = None
        self.leader_heard_at: float | None = None
        self._leader_silent = True

    # Life of a request, as the shell reports it

    def arrive(self, now: float, record: Record, payload: Progress) -> None:
        """A request reached the engine. It joins the queue when the engine enqueues it (`queued`)."""
        record.account = account = self.tenants.account(record.tenant)
        record.group = self._group_of(record)
        policy = account.policy
        record.priority = min(max(record.priority, policy.priority_min), policy.priority_max)
        record.payload = payload
        record.queued_since = now
        record.came = (now, self.step, record.prompt_tokens)
        self.tenants.arriving(account)
        self.roster.enter(record)
        if self.emit is not None:
            self.emit(now, record, ev.Queued, met(record, self.queue, self.roster))

    def admitting(self, record: Record, cached: int) -> None:
        """The engine takes the head of the queue; `cached` input tokens are expected from the prefix cache.

        Charged at once, so that the next pick in the same step sees it (VTC, algorithm 2, line 23).
        """
        self.roster.move(record, Transition.ADMIT)
        if record.admitted_at is None:
            self.ledger.charge_input(record, cached)

    def not_admitted(self, record: Record) -> None:
        """The engine took the head only to skip it in this step: undo `admitting`."""
        self.roster.move(record, Transition.EVICT)
        if record.admitted_at is None:
            self.ledger.refund_input(record)

    def running(self, record: Record) -> None:
        """The engine takes a request that waited with KV of its own."""
        if record.state is QUEUED:
            self.roster.move(record, Transition.ADMIT)

    def loading(self, record: Record) -> None:
        """The engine took the head, and loads its KV before it runs: it waits on, outside the queue, but charged."""
        self.roster.move(record, Transition.EVICT)

    def admitted(self, now: float, record: Record, computed: int, external: int = 0) -> None:
        """A step was scheduled with this request in it for the first time, or again after it had waited.

        `computed`: positions that were there without computing; of these, `external` came by a KV connector,
        the others from the prefix cache.
        """
        if record.state is QUEUED:  # it waited in one of vLLM's own queues
            self.roster.move(record, Transition.ADMIT)
        first = record.admitted_at is None
        if first:
            record.admitted_at = now
            self.ledger.book_input(record, min(computed, record.prompt_tokens), external)
            self.roster.awaiting_first[record] = None
        else:
            self.ledger.resume(record, computed, external)
        self._began(now, record)
        waited = now - record.queued_since
        record.queued_s += waited
        self.roster.touch(record)
        if self.emit is None:  # or the fields would be made for nobody
            return
        self.tell(
            now, record, ev.Admitted,
            uncached_input_tokens=record.uncached_tokens if first else max(0, record.lost_mark - computed),
            cached_input_tokens=record.cached_tokens if first else computed, external_input_tokens=external,
            queued_s=waited, resumed=not first, virtual_time=record.account.rank[0], waiting=len(self.queue),
        )  # fmt: skip

    def _began(self, now: float, record: Record) -> None:
        """It runs, for the first time or again."""
        self.room.protect(now, record)

    def evict(self, now: float, record: Record, reason: str) -> None:
        """Preempt a running request: its KV goes, it waits again."""
        self.evicted(now, record, reason)
        self.engine.evict(record)

    def evicted(self, now: float, record: Record, reason: str = "no free KV blocks") -> None:
        """A running request was preempted, by vLLM itself unless `reason` says otherwise."""
        record.queued_since = now
        self.roster.move(record, Transition.EVICT)
        self.ledger.lose_kv(record)
        self.roster.touch(record)
        self.tell(now, record, ev.Preempted, reason=reason)

    def lose_all_kv(self, now: float, reason: str) -> None:
        """Whatever does not run gives up its KV: held requests, and those released from a park that wait to run."""
        self.holds.drop_held(now, reason)
        for record in [
            record for record in self.roster.records.values() if self.engine.waits_with_kv(record)
        ]:
            self.evict(now, record, reason)

    def waits_again(self, now: float, record: Record) -> None:
        """A running streaming session waits for its next input; its KV stays."""
        record.queued_since = now
        self.roster.move(record, Transition.EVICT)
        self.ledger.settle(record)
        self.roster.touch(record)

    def turn_ended(self, record: Record, in_flight: int) -> None:
        """A session said the last token of a turn; `in_flight` positions computed beyond it are forgotten."""
        self.ledger.end_turn(record, in_flight)

    def next_turn_begins(self, record: Record) -> None:
        """vLLM is about to fold a session's output into its prompt: charge it first."""
        self.ledger.fold_turn(record)

    def next_turn(self, record: Record, prompt_tokens: int) -> None:
        """A session's next input arrived: its output list starts again."""
        self.ledger.begin_turn(record, prompt_tokens)
        self.roster.touch(record)

    def first_token(self, now: float, record: Record) -> None:
        """The first output token was delivered."""
        del self.roster.awaiting_first[record]
        record.first_token_at = now
        self.tell(now, record, ev.FirstToken, ttft_s=now - record.arrived_at)

    def finished(self, now: float, record: Record, reason: str) -> None:
        """The request ended, in whatever state it was."""
        was = record.state
        self.roster.move(record, Transition.FINISH)
        self.ledger.close(record)
        if record in self.roster.awaiting_first:
            if record.outputs:
                self.first_token(now, record)
            else:
                del self.roster.awaiting_first[record]
        if was in HELD:
            record.held_s += now - record.held_since
            self.holds.forget(record)
        elif was is QUEUED:
            record.queued_s += now - record.queued_since
            self.queue.remove(record)
        record.account.finished += 1
        self.roster.leave(record)
        if self.emit is not None:
            self.emit(now, record, ev.Finished, record.summed_up(now, reason))
        record.payload = None  # which has its record: the two would stay until the garbage collector came by

    # Time and the leader

    def tick(self, now: float) -> None:
        """End what is over: leases, and controllers' holds when the leader has been silent for too long."""
        self.holds.end_leases(now)
        silent_at = self._silent_at()
        if silent_at is not None and silent_at <= now:
            self._leader_silent = True
            self.roster.changed = True
            # What a leader keeps back must not outlive it.
            self.holds.fail_over(now)
            self.limits.fail_over(now)
            self.drain.end(CONTROLLER)
            self.tell(now, None, ev.LeaderChanged, epoch=None, reason="silent")

    def deadline(self) -> float | None:
        """When `tick` must be called at the latest, or None."""
        times = [at for at in (self.holds.deadline(), self._silent_at()) if at is not None]
        return min(times, default=None)

    def _silent_at(self) -> float | None:
        """When the leader will have been silent for too long; None without one that was heard."""
        if self._leader_silent or self.leader_heard_at is None:
            return None
        return self.leader_heard_at + self.leader_lease_s

    def heard(self, now: float, lead: Lead) -> None:
        """A leader's heartbeat; one of an older epoch than the highest seen is not believed."""
        if self.epoch is not None and lead.epoch < self.epoch:
            return
        unknown = self.leader is None or self.epoch != lead.epoch
        self.leader = lead
        self._follow(now, lead.epoch, f"{lead.controller} leads with {lead.policy}", news=unknown)

    def obeyed(self, now: float, epoch: Epoch) -> None:
        """A controller's command came with this epoch, which is not lower than the highest seen.

        It counts even if the command is then refused for another reason: the older leader is fenced off all the same.
        """
        if unknown := self.epoch != epoch:
            self.leader = None  # its heartbeat says who it is
        self._follow(now, epoch, "first command of its epoch", news=unknown)

    def _follow(self, now: float, epoch: Epoch, reason: str, *, news: bool) -> None:
        if news or self._leader_silent:
            self.roster.changed = True
            self.tell(now, None, ev.LeaderChanged, epoch=epoch, reason=reason)
        self.epoch = epoch
        self.leader_heard_at = now
        self._leader_silent = False

    def reprioritize(
        self, now: float, record: Record, priority: int | None, class_: str | None, by: str
    ) -> bool:
        """Change priority, class or both; False if that changed nothing."""
        old_priority, old_class = record.priority, record.class_
        new_priority = old_priority if priority is None else priority
        new_class = class_ or old_class
        if class_:
            record.set_class = class_
        if (new_priority, new_class) == (old_priority, old_class):
            return False
        waited = self.queue.remove(record)
        record.priority = new_priority
        if new_class != old_class:
            self.roster.reclass(record, new_class)
        if waited:
            self.queue.add(record)
        self.engine.reprioritized(record)
        self.room.ranks_changed()
        self.roster.touch(record)
        self.tell(
            now, record, ev.Reprioritized, by=by, from_priority=old_priority, to_priority=new_priority,
            from_class=old_class, to_class=new_class,
        )  # fmt: skip
        return True

    # Tables

    def rank(self, name: str, rank: TenantRank) -> None:
        """Put a tenant's base and weight in force."""
        account = self.tenants.account(name)
        self.ledger.settle_output(account)  # at the old weight
        before = account.virtual_time
        if (rank.weight, rank.expected_output) != (account.weight, account.expected_output):
            account.touch()
        account.weight = rank.weight
        self.ledger.learn(account, rank.expected_output)
        account.rebase(rank.base)
        self.roster.changed = True
        if account.virtual_time < before:
            self.ledger.moved_back(account)

    def configure(self, classes: dict[str, ClassPolicy], tenants: dict[str, TenantPolicy]) -> bool:
        """Put both tables in force, whole; False if they already were."""
        news = digest(classes, tenants)
        if news == self.digest:
            return False
        self.ledger.settle_all()
        self.digest = news
        self.classes = {**BUILT_IN_CLASSES, **classes}
        self.tenants.table = tenants
        for account in self.tenants.accounts.values():
            account.policy = self.tenants.policy_of(account.name)
            account.weight = account.policy.weight
            account.touch()
        waiting = [record for record in self.roster.records.values() if record in self.queue]
        for record in waiting:
            self.queue.remove(record)
        ordered = sorted(self.classes, key=lambda name: (self.classes[name].position, name))
        groups = {name: ClassGroup(name, self.classes[name], place) for place, name in enumerate(ordered)}
        self.roster.set_classes(groups, self._group_of)
        self.queue.set_classes(groups)
        self.limits.set_classes(groups)
        self._put_rows(tenants)
        self.room.set_classes(groups)
        self.budget.set_classes(groups)
        for record in waiting:
            self.queue.add(record)
        for record in self.roster.records.values():
            self.engine.reprioritized(record)
        return True

    def _put_rows(self, rows: dict[str, TenantPolicy]) -> None:
        for account in self.tenants.accounts.values():
            self.limits.put_in_force(account)
        for name, row in rows.items():  # those with caps are listed before they first come
            if (row.max_running, row.max_queued) != (None, None) and self.tenants.room_for(name):
                self.tenants.account(name).seen = True

    def _group_of(self, record: Record) -> ClassGroup:
        """The class a request runs in: what a command told, what it asked for and may, its tenant's, `default`."""
        classes, policy = self.roster.classes, record.account.policy
        told, asked = record.set_class, record.asked_class
        if told in classes:
            return classes[told]
        if asked in classes and (asked == policy.class_ or asked in policy.classes):
            return classes[asked]
        return classes.get(policy.class_) or classes[DEFAULT]

    def tell(self, now: float, record: Record | None, kind: type[ev.Event], **fields: Any) -> None:
        """Something happened: into the request's story, and out as an event."""
        if self.emit is not None:
            if record is not None:
                record.tell(now, self.step, kind, fields)
            self.emit(now, record, kind, fields)

    def validate(self) -> None:
        """Check every invariant of the core; raises AssertionError."""
        for room in (self.queue, self.roster, self.ledger, self.holds, self.limits, self.tenants):
            room.validate()
        for record in self.roster.records.values():
            assert self.roster.classes[record.class_] is record.group, record
            assert record.state is QUEUED or record not in self.queue, record
