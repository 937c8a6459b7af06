"""The steering core: what every request, tenant, hold and command means. Pure and synchronous.

Told of everything by the vLLM shell (`steered.py`), with the clock passed in; it acts on the engine only through
the small port `Engine`. Knows ranks, holds and leases; knows no policy, no NATS, no event loop.
`validate()` checks all invariants and is called by tests after every step. Commands are in `verbs.py`.
"""

import heapq
from collections.abc import Callable, Iterable
from math import isfinite
from typing import Any, Final, Protocol

from coxswain.schemas import events as ev
from coxswain.schemas.names import DEFAULT
from coxswain.schemas.policy import ClassPolicy, Epoch, Lead, TenantPolicy, TenantRank, digest
from coxswain.schemas.subjects import CONTROLLER, ENGINE, ROLES
from coxswain.service.scheduler.queue import SteeredQueue
from coxswain.service.scheduler.record import Hold, Progress, Record
from coxswain.service.scheduler.states import HELD, KV, Event, State, after
from coxswain.service.scheduler.tenants import Account, Tenants

BUILT_IN_CLASSES: Final = {DEFAULT: ClassPolicy()}
LEASES_EACH: Final = len({*ROLES, ENGINE})
"""Leases that one request can have: one per role."""


class Engine(Protocol):
    """What the core can make the engine do. Each takes effect from the very next step."""

    def obstacle(self, record: Record, kv: str) -> str | None:
        """Why this request cannot be held with this `kv` now, or None."""

    def hold(self, record: Record) -> None:
        """Stop scheduling a running request; keep its KV and its slot."""

    def drop(self, record: Record) -> None:
        """Free the KV of a running or kept request; it goes to no queue."""

    def resume(self, record: Record) -> None:
        """Schedule a kept request again."""

    def enqueue(self, record: Record) -> None:
        """Put a released request back into the waiting queue."""

    def dequeue(self, record: Record) -> None:
        """Take a waiting request out of the engine's bookkeeping of waiting requests."""

    def reprioritized(self, record: Record) -> None:
        """The request's class or priority changed."""

    def abort(self, records: list[Record]) -> None:
        """End requests and tell their clients."""

    def in_flight(self, record: Record) -> int:
        """Tokens scheduled whose output has not been processed yet."""


class SteeringCore:
    """All that steering knows on one engine.

    Args:
        engine: the mechanism it acts on.
        emit: called with each event's struct type and fields; events leave through it and nowhere else.
        leader_lease_s: how long a leader may be silent before the holds of controllers end.
    """

    def __init__(
        self,
        engine: Engine,
        emit: Callable[..., None],
        *,
        leader_lease_s: float = 5.0,
    ) -> None:
        self.engine = engine
        self._emit = emit
        self.leader_lease_s = leader_lease_s
        self.step = 0
        self.queue = SteeredQueue()
        self.tenants = Tenants()
        self.records: dict[str, Record] = {}
        """By the engine's id."""
        self.families: dict[str, dict[Record, None]] = {}
        """By public id: all children of a client's request that have not ended."""
        self._children: dict[str, int] = {}
        self.running: dict[Record, None] = {}
        self.held: dict[Record, None] = {}
        self.kept: dict[Record, None] = {}
        """Those of the held that keep KV and slot: no more than there are slots."""
        self.awaiting_first: dict[Record, None] = {}
        """Admitted, no token yet."""
        self.touched: dict[Record, None] = {}
        """Changed since the last status frame, running ones' token counts apart."""
        self.classes: dict[str, ClassPolicy] = {}
        self.class_table: dict[str, ClassPolicy] = {}
        self.digest = ""
        self.configure({}, {})
        self.epoch: Epoch | None = None
        self.leader: Lead | None = None
        self.leader_heard_at: float | None = None
        self._leader_silent = True
        self._leases: list[tuple[float, int, Record, Hold]] = []
        self._serial = 0
        self.preempted_total = 0
        self.recomputed_total = 0
        self.changed = True
        """Whether there is anything new for status."""

    # Life of a request, as the shell reports it

    def arrive(
        self,
        now: float,
        *,
        id: str,  # noqa: A002
        request: str,
        tenant: str,
        asked_class: str,
        priority: int,
        arrived_at: float,
        prompt_tokens: int,
        payload: Progress,
        outputs: list[Any],
    ) -> Record:
        """A request reached the engine. It joins the queue when the engine enqueues it (`queued`)."""
        account = self.tenants.account(tenant)
        policy = account.policy
        child = self._children.get(request, 0)
        self._children[request] = child + 1
        record = Record(
            id=id, request=request, child=child, account=account, asked_class=asked_class,
            priority=min(max(priority, policy.priority_min), policy.priority_max),
            arrived_at=arrived_at, prompt_tokens=prompt_tokens, payload=payload, outputs=outputs,
        )  # fmt: skip
        record.class_ = self._class_for(record)
        record.queued_since = now
        self.records[id] = record
        self.families.setdefault(request, {})[record] = None
        self.tenants.arriving(account)
        self.tenants.joined(account, record)
        self._touch(record)
        self.tell(now, record, ev.Queued, prompt_tokens=prompt_tokens)
        return record

    def admitting(self, record: Record, cached: int) -> None:
        """The engine takes the head of the queue; `cached` input tokens are expected from the prefix cache.

        Charged at once, so that the next pick in the same step sees it (VTC, algorithm 2, line 23).
        """
        self._move(record, Event.ADMIT)
        if record.admitted_at is None:
            record.cached_tokens = cached
            record.uncached_tokens = record.prompt_tokens - cached
            self._charge_input(record)

    def not_admitted(self, record: Record) -> None:
        """The engine took the head only to skip it in this step: undo `admitting`."""
        self._move(record, Event.EVICT)
        self.tenants.keeps_place(record.account, record)
        if record.admitted_at is None:
            record.uncached_tokens = record.cached_tokens = 0
            self._charge_input(record)

    def admitted(self, now: float, record: Record, computed: int) -> None:
        """A step was scheduled with this request in it for the first time, or again after its KV was lost.

        `computed`: positions that were there without computing (prefix cache, or a KV connector).
        """
        if record.state is State.QUEUED:  # it waited in one of vLLM's own queues
            self._move(record, Event.ADMIT)
        first = record.admitted_at is None
        if first:
            record.admitted_at = now
            record.cached_tokens = min(computed, record.prompt_tokens)
            record.uncached_tokens = record.prompt_tokens - record.cached_tokens
            self._charge_input(record)
            account = record.account
            account.uncached_input_tokens += record.uncached_tokens
            account.cached_input_tokens += record.cached_tokens
            account.dirty = True
            self.awaiting_first[record] = None
        else:
            record.resumed_at = computed
            record.settled_recompute = 0
        waited = now - record.queued_since
        record.queued_s += waited
        self._touch(record)
        self.tell(
            now, record, ev.Admitted,
            uncached_input_tokens=record.uncached_tokens if first else max(0, record.lost_mark - computed),
            cached_input_tokens=record.cached_tokens if first else computed,
            queued_s=waited, resumed=not first,
        )  # fmt: skip

    def losing_kv(self, record: Record) -> None:
        """The KV of a request is about to be freed, by vLLM or by us: remember what had been computed."""
        self.settle(record)
        record.lost_mark = max(record.lost_mark, record.payload.num_computed_tokens)
        record.resumed_at = record.lost_mark
        self.preempted_total += 1

    def evicted(self, now: float, record: Record) -> None:
        """vLLM itself preempted a running request for want of KV blocks."""
        self._move(record, Event.EVICT)
        self.losing_kv(record)
        record.queued_since = now
        self._touch(record)
        self.tell(now, record, ev.Preempted, reason="no free KV blocks")

    def waits_again(self, now: float, record: Record) -> None:
        """A running streaming session waits for its next input; its KV stays."""
        self._move(record, Event.EVICT)
        self.settle(record)
        record.queued_since = now
        self._touch(record)

    def next_turn_begins(self, record: Record) -> None:
        """vLLM is about to fold a session's output into its prompt: charge it first."""
        self.settle(record)

    def next_turn(self, record: Record, prompt_tokens: int) -> None:
        """A session's next input arrived: its output list starts again."""
        record.settled = 0
        record.prompt_tokens = prompt_tokens
        self._touch(record)

    def first_token(self, now: float, record: Record) -> None:
        """The first output token was delivered."""
        del self.awaiting_first[record]
        record.first_token_at = now
        self.tell(now, record, ev.FirstToken, ttft_s=now - record.arrived_at)

    def finished(self, now: float, record: Record, reason: str) -> None:
        """The request ended, in whatever state it was."""
        was = record.state
        record.holds.clear()
        self._move(record, Event.FINISH)
        self.settle(record)
        if record in self.awaiting_first:
            if record.outputs:
                self.first_token(now, record)
            else:
                del self.awaiting_first[record]
        if was in HELD:
            record.held_s += now - record.held_since
        elif was is State.QUEUED:
            record.queued_s += now - record.queued_since
        self.queue.remove(record)
        record.account.finished += 1
        del self.records[record.id]
        family = self.families[record.request]
        del family[record]
        if not family:
            del self.families[record.request], self._children[record.request]
        self.touched.pop(record, None)
        first = record.first_token_at
        self.tell(
            now, record, ev.Finished,
            reason=reason, uncached_input_tokens=record.uncached_tokens, cached_input_tokens=record.cached_tokens,
            output_tokens=len(record.outputs), recomputed_tokens=record.recomputed_tokens,
            queued_s=record.queued_s, held_s=record.held_s,
            ttft_s=None if first is None else first - record.arrived_at,
            run_s=0.0 if record.admitted_at is None
            else now - record.arrived_at - record.queued_s - record.held_s,
        )  # fmt: skip

    # Charging

    def _charge_input(self, record: Record) -> None:
        """Charge the input at today's knowledge, less what was charged for it before."""
        prices = self.tenants.prices
        cost = record.uncached_tokens * prices.input + record.cached_tokens * prices.cached
        if cost != record.charged_input:
            record.account.charge(cost - record.charged_input)
            if cost < record.charged_input:
                self._moved_back(record.account)
            record.charged_input = cost

    def _moved_back(self, account: Account) -> None:
        """A tenant's virtual time fell: tell both heaps that order by it."""
        self.tenants.moved_back(account)
        self.queue.moved_back(account)

    def settle(self, record: Record) -> None:
        """Charge what the request was delivered and count what it recomputed since it was last settled."""
        delivered = len(record.outputs)
        if delivered != record.settled:
            account = record.account
            account.output_tokens += delivered - record.settled
            account.charge((delivered - record.settled) * self.tenants.prices.output)
            record.settled = delivered
        if record.lost_mark > record.resumed_at:
            again = min(record.payload.num_computed_tokens, record.lost_mark) - record.resumed_at
            if again > record.settled_recompute:
                news = again - record.settled_recompute
                record.recomputed_tokens += news
                record.account.recomputed_tokens += news
                record.account.dirty = True
                self.recomputed_total += news
                record.settled_recompute = again
            if again == record.lost_mark - record.resumed_at:
                record.resumed_at = record.lost_mark

    def settle_all(self) -> None:
        """Settle whatever may be delivered tokens now: before order or totals are read.

        Once per step, so it looks only at what has a slot. What was in flight when a request lost its KV may be
        delivered later: it is settled when that request moves on.
        """
        for group in (self.running, self.kept):
            for record in group:
                if len(record.outputs) != record.settled or record.lost_mark > record.resumed_at:
                    self.settle(record)

    # Holds

    def hold(
        self, now: float, record: Record, role: str, kv: str, lease_until: float | None, reason: str
    ) -> bool:
        """Put or replace one role's hold; False if that changed nothing. `kv` only moves from keep to drop."""
        old = record.holds.get(role)
        if old is not None and old.kv == "drop":
            kv = "drop"
        if old is not None and old.lease_until is None and lease_until is None and old.kv == kv:
            return False
        in_flight = self.engine.in_flight(record)
        if record.state not in HELD:
            self._begin_hold(now, record, kv)
        elif kv == "drop" and record.state in (State.HELD_KEPT, State.HELD_PARKED):
            self._drop(now, record, reason)
        hold = Hold(role, kv, old.since if old else now, lease_until, reason)
        record.holds[role] = hold
        if lease_until is not None:
            self._serial += 1
            heapq.heappush(self._leases, (lease_until, self._serial, record, hold))
            self._tidy_leases()
        self._touch(record)
        self.tell(
            now, record, ev.Held, by=role, kv=KV.get(record.state, "none"), reason=reason,
            lease_s=None if lease_until is None else lease_until - now,
            in_flight_tokens=in_flight, output_tokens=len(record.outputs),
        )  # fmt: skip
        return True

    def _begin_hold(self, now: float, record: Record, kv: str) -> None:
        was = record.state
        self._move(record, Event.HOLD_DROP if kv == "drop" else Event.HOLD_KEEP)
        self.settle(record)
        record.held_since = now
        if was is State.QUEUED:
            record.queued_s += now - record.queued_since
            self.engine.dequeue(record)
            self.queue.remove(record)
        elif kv == "drop":
            self.losing_kv(record)
            self.engine.drop(record)
        else:
            self.engine.hold(record)

    def _tidy_leases(self) -> None:
        """Holds that were replaced or ended leave their entries behind: these go when they outnumber the rest."""
        if len(self._leases) > 2 * LEASES_EACH * len(self.held) + 64:
            self._leases = [entry for entry in self._leases if entry[2].holds.get(entry[3].role) is entry[3]]
            heapq.heapify(self._leases)

    def _drop(self, now: float, record: Record, reason: str) -> None:
        self._move(record, Event.DROP)
        self.losing_kv(record)
        self.engine.drop(record)
        self.tell(now, record, ev.Dropped, reason=reason, computed_tokens=record.lost_mark)

    def drop_held(self, now: float, reason: str) -> None:
        """Free the KV of everything that is held."""
        for record in [
            record for record in self.held if record.state in (State.HELD_KEPT, State.HELD_PARKED)
        ]:
            self._drop(now, record, reason)
            self._touch(record)

    def release(self, now: float, record: Record, roles: Iterable[str], by: str, reason: str) -> bool:
        """End the holds of `roles`; the request goes on when none is left. False if there was none to end."""
        ended = [role for role in roles if record.holds.pop(role, None)]
        if not ended:
            return False
        self._touch(record)
        if record.holds:
            return True
        was = record.state
        record.held_s += now - record.held_since
        held_s = now - record.held_since
        self._move(record, Event.RELEASE)
        if was is State.HELD_KEPT:
            self.engine.resume(record)
        else:
            record.queued_since = now
            self.engine.enqueue(record)
        self.tell(
            now, record, ev.Continued, by=by, reason=reason, held_s=held_s, output_tokens=len(record.outputs)
        )
        return True

    def tick(self, now: float) -> None:
        """End what is over: leases, and controllers' holds when the leader has been silent for too long."""
        while self._leases and self._leases[0][0] <= now:
            _, _, record, hold = heapq.heappop(self._leases)
            if record.holds.get(hold.role) is hold:
                self.release(now, record, (hold.role,), hold.role, "lease")
        if not self._leader_silent and self.leader_heard_at is not None:
            if now - self.leader_heard_at >= self.leader_lease_s:
                self._leader_silent = True
                self.changed = True
                for record in [record for record in self.held if CONTROLLER in record.holds]:
                    self.release(now, record, (CONTROLLER,), CONTROLLER, "failover")
                self.tell(now, None, ev.LeaderChanged, epoch=None, reason="silent")

    def deadline(self) -> float | None:
        """When `tick` must be called at the latest, or None."""
        while (
            self._leases and self._leases[0][2].holds.get(self._leases[0][3].role) is not self._leases[0][3]
        ):
            heapq.heappop(self._leases)
        times = [self._leases[0][0]] if self._leases else []
        if not self._leader_silent and self.leader_heard_at is not None:
            times.append(self.leader_heard_at + self.leader_lease_s)
        return min(times, default=None)

    # Leader and tables

    def heard(self, now: float, lead: Lead) -> None:
        """A leader's heartbeat; one of an older epoch than the highest seen is not believed."""
        if self.epoch is not None and lead.epoch < self.epoch:
            return
        changed = self.epoch != lead.epoch or self._leader_silent
        self.epoch = lead.epoch
        self.leader = lead
        self.leader_heard_at = now
        self._leader_silent = False
        if changed:
            self.changed = True
            self.tell(
                now,
                None,
                ev.LeaderChanged,
                epoch=lead.epoch,
                reason=f"{lead.controller} leads with {lead.policy}",
            )

    def obeyed(self, now: float, epoch: Epoch) -> None:
        """A controller's command came with this epoch, which is not lower than the highest seen.

        It counts even if the command is then refused for another reason: the older leader is fenced off all the same.
        """
        if self.epoch != epoch or self._leader_silent:
            self.tell(now, None, ev.LeaderChanged, epoch=epoch, reason="first command of its epoch")
            self._leader_silent = False
        self.epoch = epoch
        self.leader_heard_at = now

    def rank(self, name: str, rank: TenantRank) -> None:
        """Put a tenant's base and weight in force; call `settle_all` before."""
        account = self.tenants.account(name)
        before = account.virtual_time
        account.weight = rank.weight
        account.rebase(rank.base)
        self.changed = True
        if account.virtual_time < before:
            self._moved_back(account)

    def configure(self, classes: dict[str, ClassPolicy], tenants: dict[str, TenantPolicy]) -> bool:
        """Put both tables in force, whole; False if they already were."""
        news = digest(classes, tenants)
        if news == self.digest:
            return False
        self.settle_all()
        self.digest = news
        self.class_table = classes
        self.classes = {**BUILT_IN_CLASSES, **classes}
        ordered = sorted(self.classes, key=lambda name: (self.classes[name].position, name))
        self._places = {name: place for place, name in enumerate(ordered)}
        self.tenants.table = tenants
        for account in self.tenants.accounts.values():
            account.policy = self.tenants.policy_of(account.name)
            account.weight = account.policy.weight
            account.dirty = True
        waiting = [record for record in self.records.values() if record in self.queue]
        for record in waiting:
            self.queue.remove(record)
        for record in self.records.values():
            record.class_ = self._class_for(record)
            self._touch(record)
        self.queue.set_classes(self.classes)
        for record in waiting:
            self.queue.add(record)
        for record in self.records.values():
            self.engine.reprioritized(record)
        return True

    def _class_for(self, record: Record) -> str:
        """The class a request runs in: what a command set, what it asked for and may, its tenant's, `default`."""
        policy = record.account.policy
        if record.set_class in self.classes:
            return record.set_class
        asked = record.asked_class
        if asked in self.classes and (asked == policy.class_ or asked in policy.classes):
            return asked
        return policy.class_ if policy.class_ in self.classes else DEFAULT

    def class_place(self, name: str) -> int:
        """Place of a class among all, 0 runs first."""
        return self._places[name]

    # Bookkeeping

    def _move(self, record: Record, event: Event) -> None:
        """Take a transition and keep the sets and counts in step with it."""
        old = record.state
        new = after(old, event)
        account = record.account
        if old is State.QUEUED:
            self.tenants.left(account, record)
        elif old is State.RUNNING:
            del self.running[record]
            account.running -= 1
        elif new not in HELD:
            del self.held[record]
            account.held -= 1
            self._tidy_leases()
        self.kept.pop(record, None)
        if new is State.QUEUED:
            self.tenants.joined(account, record)
        elif new is State.RUNNING:
            self.running[record] = None
            account.running += 1
        elif new in HELD and old not in HELD:
            self.held[record] = None
            account.held += 1
        if new is State.HELD_KEPT:
            self.kept[record] = None
        record.state = new
        account.dirty = True
        self.changed = True

    def _touch(self, record: Record) -> None:
        self.touched[record] = None
        self.changed = True

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
        record.priority, record.class_ = new_priority, new_class
        if waited:
            self.queue.add(record)
        self.engine.reprioritized(record)
        self._touch(record)
        self.tell(
            now, record, ev.Reprioritized, by=by, from_priority=old_priority, to_priority=new_priority,
            from_class=old_class, to_class=new_class,
        )  # fmt: skip
        return True

    def tell(self, now: float, record: Record | None, kind: type[ev.Event], **fields: Any) -> None:
        """Something happened: into the request's story, and out as an event."""
        if record is not None:
            record.tell(now, self.step, kind, fields)
        self._emit(now, record, kind, fields)

    def validate(self) -> None:
        """Check every invariant of the core; raises AssertionError."""
        self.queue.validate()
        counts: dict[str, list[int]] = {name: [0, 0, 0] for name in self.tenants.accounts}
        for record in self.records.values():
            assert record.state is not State.FINISHED
            assert (record.state in HELD) == bool(record.holds) == (record in self.held), record
            assert (record.state is State.RUNNING) == (record in self.running), record
            assert (record.state is State.HELD_KEPT) == (record in self.kept), record
            assert (record.state is State.QUEUED) == (record in record.account.waiting), record
            assert record.class_ in self.classes
            assert record in self.families[record.request]
            assert record.state is State.QUEUED or record not in self.queue, record
            assert 0 <= record.settled <= len(record.outputs)
            index = 0 if record.state is State.QUEUED else 1 if record.state is State.RUNNING else 2
            counts[record.account.name][index] += 1
        for name, account in self.tenants.accounts.items():
            assert counts[name] == [account.queued, account.running, account.held], name
            assert account.virtual_time == account.base + account.charged + account.lift, name
            assert isfinite(account.virtual_time), name
        live = set(self.records.values())
        for group in (self.running, self.held, self.kept, self.awaiting_first, self.touched):
            assert group.keys() <= live
        self.tenants.validate()
        assert len(self._leases) <= 2 * LEASES_EACH * len(self.held) + 64
        assert sum(len(family) for family in self.families.values()) == len(self.records)
        assert self.families.keys() == self._children.keys()
