"""Holds of three roles: who holds, until when, with or without KV, and when the request goes on."""

from collections.abc import Iterable
from itertools import permutations

import pytest

from coxswain.schemas import events as ev
from coxswain.schemas.subjects import CONTROLLER, ENGINE, OPERATOR
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.states import HELD, State
from tests.support.fake_engine import FakeEngine, picture

LEADER_LEASE_S = 1_000.0

# Every order of what can happen to the holds of one request, against a model of a dozen lines.

HAPPENINGS = {
    "operator holds": lambda trial: trial.hold(OPERATOR),
    "controller holds 4 s": lambda trial: trial.hold(CONTROLLER, 4.0),
    "controller holds 60 s": lambda trial: trial.hold(CONTROLLER, 60.0),
    "engine holds": lambda trial: trial.hold(ENGINE),
    "operator continues": lambda trial: trial.release((OPERATOR, CONTROLLER, ENGINE), OPERATOR),
    "controller continues": lambda trial: trial.release((CONTROLLER,), CONTROLLER),
    "engine continues": lambda trial: trial.release((ENGINE,), ENGINE),
    "5 s pass": lambda trial: trial.wait(5.0),
    "the leader falls silent": lambda trial: trial.silence(),
}


class Trial:
    """One request, and the naive model: roles with the time at which their hold ends."""

    def __init__(self, *, running: bool) -> None:
        self.engine = FakeEngine(leader_lease_s=LEADER_LEASE_S)
        self.engine.lead()
        self.record = self.engine.submit()
        self.free = State.RUNNING if running else State.QUEUED
        if running:
            self.engine.admit()
        self.holds: dict[str, float | None] = {}

    def hold(self, role: str, lease_s: float | None = None) -> None:
        """One role holds, or replaces its hold."""
        until = None if lease_s is None else self.engine.now + lease_s
        self.engine.core.holds.hold(self.engine.now, self.record, role, "keep", until, "")
        self.holds[role] = until

    def release(self, roles: Iterable[str], by: str) -> None:
        """End the holds of some roles."""
        done = self.engine.core.holds.release(self.engine.now, self.record, roles, by, "command")
        assert done == bool(self.holds.keys() & set(roles))
        self.holds = {role: until for role, until in self.holds.items() if role not in roles}

    def wait(self, seconds: float) -> None:
        """Let time pass: leases end."""
        self.engine.wait(seconds)
        now = self.engine.now
        self.holds = {role: until for role, until in self.holds.items() if until is None or until > now}

    def silence(self) -> None:
        """Nothing is heard of the leader for as long as it may be silent."""
        self.wait(LEADER_LEASE_S)
        self.holds.pop(CONTROLLER, None)

    def check(self) -> None:
        """Core, engine and model agree."""
        ends = {role: hold.lease_until for role, hold in self.record.holds.items()}
        assert ends == self.holds
        assert (self.record.state in HELD) == bool(self.holds)
        assert self.record.state in HELD or self.record.state is self.free
        assert (self.record in self.engine.running) == (self.record.state is State.RUNNING)


@pytest.mark.parametrize(("running", "length"), [(True, 5), (False, 4)])
def test_holds_in_every_order(*, running: bool, length: int) -> None:
    """In each of all orders a request is held exactly while one role's hold lasts, and never longer."""
    for order in permutations(HAPPENINGS, length):
        trial = Trial(running=running)
        for name in order:
            HAPPENINGS[name](trial)
            trial.check()
    trial.engine.check()


def held(*roles: str, **fields: float) -> tuple[FakeEngine, Record]:
    """A running request with some KV, held by these roles."""
    engine = FakeEngine(**fields)
    record = engine.submit(prompt=40)
    engine.admit()
    engine.compute(record)
    for role in roles:
        engine.core.holds.hold(engine.now, record, role, "keep", None, "")
    return engine, record


# Leases


def test_replaced_lease_does_not_end_the_new_hold() -> None:
    """An old lease's end says nothing of the hold that replaced it, longer or without end."""
    engine, record = held()
    for until in (engine.now + 2, engine.now + 4, None):
        engine.core.holds.hold(engine.now, record, CONTROLLER, "keep", until, "")
    engine.wait(10)
    assert record.state is State.HELD_KEPT
    assert engine.core.deadline() is None


def test_lease_can_be_shortened() -> None:
    """The latest lease counts, also when it ends earlier than the one before."""
    engine, record = held()
    for seconds in (60, 3):
        engine.core.holds.hold(engine.now, record, CONTROLLER, "keep", engine.now + seconds, "")
    assert engine.core.deadline() == engine.now + 3
    engine.wait(3)
    assert record.state is State.RUNNING
    engine.check()


def test_lease_of_a_hold_that_was_taken_again_is_the_new_one() -> None:
    """Held, continued and held again by the same role: the first lease does not end the second hold."""
    engine, record = held()
    engine.core.holds.hold(engine.now, record, CONTROLLER, "keep", engine.now + 2, "")
    engine.core.holds.release(engine.now, record, [CONTROLLER], CONTROLLER, "command")
    engine.core.holds.hold(engine.now, record, CONTROLLER, "keep", engine.now + 9, "")
    engine.wait(5)
    assert record.state is State.HELD_KEPT


def test_deadline_is_the_earliest_thing_to_end() -> None:
    """The engine is woken for the earliest live lease or for the leader's silence, and for nothing else."""
    engine, record = held(leader_lease_s=5.0)
    assert engine.core.deadline() is None
    engine.lead()
    assert engine.core.deadline() == engine.now + 5
    engine.core.holds.hold(engine.now, record, OPERATOR, "keep", engine.now + 2, "")
    assert engine.core.deadline() == engine.now + 2
    engine.finish(record)
    assert engine.core.deadline() == engine.now + 5
    engine.wait(5)
    assert engine.core.deadline() is None


def test_leases_renewed_for_ever_leave_nothing_behind() -> None:
    """A controller that renews day-long leases every step keeps the heap at a few entries per hold."""
    engine, record = held()
    second = engine.submit()
    for i in range(20_000):
        for each in (record, second):
            engine.core.holds.hold(engine.now, each, CONTROLLER, "keep", engine.now + 80_000 + i, "")
        if i % 1_000 == 0:
            engine.check()
    assert len(engine.core.holds._leases) < 100
    engine.finish(record)
    engine.finish(second)
    engine.check()


def test_many_leases_that_end_at_once_end_in_one_tick() -> None:
    """Ten thousand holds with the same end are all over after one tick."""
    engine = FakeEngine()
    records = [engine.submit(f"t{i % 10}") for i in range(10_000)]
    for record in records:
        engine.core.holds.hold(engine.now, record, OPERATOR, "keep", engine.now + 1, "")
    assert not engine.core.queue
    engine.wait(1)
    assert len(engine.core.queue) == 10_000
    engine.check()


# Who ends what


def test_operator_ends_every_hold() -> None:
    """An operator's continue clears the holds of all roles at once."""
    engine, record = held(OPERATOR, CONTROLLER, ENGINE)
    assert engine.core.holds.release(engine.now, record, list(record.holds), OPERATOR, "command")
    assert (record.state, record.holds) == (State.RUNNING, {})
    assert [fields["by"] for fields in engine.seen(ev.Continued)] == [OPERATOR]


@pytest.mark.parametrize("role", [CONTROLLER, ENGINE])
def test_other_roles_end_their_own(role: str) -> None:
    """A role's continue leaves the holds of others in force."""
    engine, record = held(OPERATOR, CONTROLLER, ENGINE)
    assert engine.core.holds.release(engine.now, record, [role], role, "command")
    assert role not in record.holds
    assert record.state is State.HELD_KEPT
    assert not engine.seen(ev.Continued)


def test_continue_of_what_is_not_held_changes_nothing() -> None:
    """Ending a hold that is not there says so and changes nothing."""
    engine, record = held(OPERATOR)
    before = picture(engine.core)
    assert not engine.core.holds.release(engine.now, record, [CONTROLLER], CONTROLLER, "command")
    assert picture(engine.core) == before


def test_failover_ends_controllers_holds_only() -> None:
    """When the leader falls silent its holds end; operators and the engine hold on."""
    engine, record = held(OPERATOR, CONTROLLER, leader_lease_s=5.0)
    other = engine.submit()
    engine.core.holds.hold(engine.now, other, CONTROLLER, "drop", engine.now + 500, "")
    engine.lead()
    engine.wait(4.9)
    assert CONTROLLER in record.holds
    engine.wait(0.1)
    assert list(record.holds) == [OPERATOR]
    assert other.state is State.QUEUED
    assert [fields["reason"] for fields in engine.seen(ev.Continued)] == ["failover"]
    assert engine.seen(ev.LeaderChanged)[-1] == {"epoch": None, "reason": "silent"}
    engine.wait(100)
    assert len(engine.seen(ev.LeaderChanged)) == 2
    engine.check()


def test_new_leader_inherits_the_holds_of_its_predecessor() -> None:
    """A takeover within the leader lease leaves controllers' holds in force."""
    engine, record = held(CONTROLLER, leader_lease_s=5.0)
    engine.lead(revision=1)
    engine.wait(4)
    engine.lead(revision=2)
    engine.wait(4)
    assert record.state is State.HELD_KEPT
    engine.lead(revision=1)  # the old one is not believed, and keeps nothing alive
    engine.wait(1)
    assert record.state is State.RUNNING


def test_leader_known_by_its_commands_alone_is_named_once_it_is_heard() -> None:
    """Until then nobody takes the policy of its predecessor for its own."""
    engine = FakeEngine(leader_lease_s=5.0)
    engine.lead(revision=1)
    engine.core.obeyed(engine.now, (1.0, 2))
    assert (engine.core.epoch, engine.core.leader) == ((1.0, 2), None)
    engine.lead(revision=2)
    engine.core.obeyed(engine.now, (1.0, 2))
    engine.lead(revision=2)
    assert engine.core.leader is not None
    assert [(fields["epoch"], fields["reason"]) for fields in engine.seen(ev.LeaderChanged)] == [
        ((1.0, 1), "c1 leads with vtc"),
        ((1.0, 2), "first command of its epoch"),
        ((1.0, 2), "c1 leads with vtc"),
    ]


# KV


def test_kv_only_moves_from_keep_to_drop() -> None:
    """A hold that dropped the KV cannot claim later to have kept it; one that kept it can still drop it."""
    engine, record = held(OPERATOR)
    assert engine.core.holds.hold(engine.now, record, OPERATOR, "drop", None, "")
    assert (record.state, record.holds[OPERATOR].kv) == (State.HELD_DROPPED, "drop")
    assert not engine.core.holds.hold(engine.now, record, OPERATOR, "keep", None, "")
    assert engine.core.holds.hold(engine.now, record, OPERATOR, "keep", engine.now + 5, "")
    assert (record.state, record.holds[OPERATOR].kv) == (State.HELD_DROPPED, "drop")
    assert len(engine.seen(ev.Dropped)) == 1
    engine.check()


def test_drop_by_one_role_drops_for_all() -> None:
    """Blocks are there or not: one role's drop frees them while another role's hold goes on."""
    engine, record = held(OPERATOR)
    engine.core.holds.hold(engine.now, record, CONTROLLER, "drop", engine.now + 3, "")
    assert record not in engine.kv
    engine.wait(3)
    assert record.state is State.HELD_DROPPED
    engine.core.holds.release(engine.now, record, [OPERATOR], OPERATOR, "command")
    assert record.state is State.QUEUED
    engine.check()


def test_hold_of_a_waiting_request_has_no_kv_to_drop() -> None:
    """Held while it waits, a request has nothing to keep or lose, and goes back to its place."""
    engine = FakeEngine()
    first, second = engine.submit(), engine.submit()
    engine.core.holds.hold(engine.now, first, OPERATOR, "drop", None, "")
    assert first.state is State.HELD_NONE
    assert list(engine.core.queue.walk()) == [second]
    engine.core.holds.release(engine.now, first, [OPERATOR], OPERATOR, "command")
    assert list(engine.core.queue.walk()) == [first, second]
    assert engine.core.ledger.preempted_total == 0
    engine.check()


def test_cache_reset_drops_what_is_kept_and_nothing_else() -> None:
    """When the prefix cache is reset, held requests lose their KV and stay held."""
    engine, record = held(OPERATOR)
    waiting = engine.submit()
    engine.core.holds.hold(engine.now, waiting, OPERATOR, "keep", None, "")
    engine.core.holds.drop_held(engine.now, "prefix cache reset")
    engine.core.holds.drop_held(engine.now, "prefix cache reset")
    assert (record.state, waiting.state) == (State.HELD_DROPPED, State.HELD_NONE)
    assert [fields["computed_tokens"] for fields in engine.seen(ev.Dropped)] == [8]
    engine.check()


def test_same_hold_again_changes_nothing() -> None:
    """A hold without end that is asked for again is not applied, told or counted twice."""
    engine, record = held(OPERATOR)
    before, told = picture(engine.core), len(engine.events)
    assert not engine.core.holds.hold(engine.now, record, OPERATOR, "keep", None, "again")
    assert picture(engine.core) == before
    assert len(engine.events) == told


def test_tokens_in_flight_are_told_and_charged_to_the_held_request() -> None:
    """What was in flight when a hold began still arrives, is counted, and costs what it costs."""
    engine, record = held()
    engine.flying[record] = 2
    engine.core.holds.hold(engine.now, record, OPERATOR, "keep", None, "")
    engine.deliver(record, 2)
    engine.core.ledger.settle_all()
    assert engine.seen(ev.Held)[-1]["in_flight_tokens"] == 2
    assert record.account.output_tokens == 2
    assert record.account.charged == 40 + 2 * 2


def test_settling_forgets_a_loss_once_it_is_made_good() -> None:
    """A request that has recomputed what it lost costs a step no more than one that never lost anything."""
    engine, record = held(OPERATOR)
    engine.core.holds.drop_held(engine.now, "room")
    engine.core.holds.release(engine.now, record, [OPERATOR], OPERATOR, "command")
    engine.admit()
    engine.compute(record)
    engine.core.ledger.settle_all()
    assert record.recomputed_tokens == 8
    engine.core.ledger._settle_recompute = lambda record: pytest.fail(f"looked at {record}")  # type: ignore[method-assign]
    engine.compute(record)
    engine.core.ledger.settle_all()


def test_settling_costs_nothing_for_what_has_no_slot() -> None:
    """Held requests that never ran are not looked at when a step begins; kept ones are."""
    engine, kept = held(OPERATOR)
    for record in [engine.submit() for _ in range(100)]:
        engine.core.holds.hold(engine.now, record, OPERATOR, "keep", None, "")
    assert list(kept.account.meter.lists) == [kept]
    engine.finish(kept)
    engine.core.ledger.settle_all()
