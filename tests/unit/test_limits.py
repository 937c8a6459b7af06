"""Caps, borrowing, ageing and draining on the core: what is in force, who may run, what each verb says."""

import random
from time import perf_counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coxswain.schemas import events as ev
from coxswain.schemas.commands import Targets
from coxswain.schemas.policy import ClassPolicy, TenantPolicy, TenantRank
from coxswain.schemas.subjects import CONTROLLER
from coxswain.service.scheduler import limits, tenants
from coxswain.service.scheduler.groups import Caps
from coxswain.service.scheduler.limits import Target
from coxswain.service.scheduler.room import STUCK_S
from coxswain.service.scheduler.rows import class_row, tenant_row
from coxswain.service.scheduler.states import State
from tests.support.fake_engine import FakeEngine, picture
from tests.unit.test_verbs import EPOCH, Steered

A, GOLD = Targets(tenants=("a",)), Targets(classes=("gold",))


@pytest.fixture
def steered() -> Steered:
    """An engine with four slots whose leader was heard, and a class `gold` for whoever asks."""
    steered = Steered()
    steered.engine.lead(*EPOCH)
    steered(
        "configure", classes={"gold": ClassPolicy()}, tenants={"default": TenantPolicy(classes=("gold",))}
    )
    return steered


def caps(steered: Steered, tenant: str = "a") -> tuple[int | None, int | None]:
    """What status says is in force on a tenant."""
    row = tenant_row(steered.engine.core.tenants.account(tenant))
    return row.max_running, row.max_queued


def running(engine: FakeEngine) -> str:
    """Tenants of what runs, as letters in order."""
    return "".join(sorted(record.account.name for record in engine.running))


def told(engine: FakeEngine) -> list[tuple[str, str]]:
    """The `limited` events: by whom, and what they say."""
    return [(fields["by"], fields["detail"]) for fields in engine.seen(ev.Limited)]


# What is in force


def test_strictest_of_table_and_roles_is_in_force(steered: Steered) -> None:
    """Each role sets and lifts its own; the row stands beside them; the lowest of each kind counts."""
    assert caps(steered) == (None, None)
    steered("limit", to=A, max_running=5, max_queued=9)
    assert caps(steered) == (5, 9)
    steered.controller("limit", to=A, max_running=3)
    assert caps(steered) == (3, 9)
    steered("configure", tenants={"a": TenantPolicy(max_running=4, max_queued=2)})
    assert caps(steered) == (3, 2)
    steered.controller("limit", to=A, max_running=None)
    assert caps(steered) == (4, 2)
    steered("configure")
    assert caps(steered) == (5, 9)
    steered("limit", to=A, max_running=None, max_queued=None)
    assert caps(steered) == (None, None)
    steered.engine.check()


def test_absent_fields_stay_and_null_lifts(steered: Steered) -> None:
    """A limit changes what it names and nothing else; what changes nothing is `unchanged` and not told."""
    to = Targets(tenants=("a", "b"), classes=("gold",))
    assert steered("limit", to=to, max_running=2, max_queued=7).counts == {"applied": 3}
    assert steered("limit", to=to, max_running=2).counts == {"unchanged": 3}
    assert steered("limit", to=A, max_queued=None).counts == {"applied": 1}
    assert (caps(steered), caps(steered, "b")) == ((2, None), (2, 7))
    assert steered("limit", to=A, max_queued=None).counts == {"unchanged": 1}
    assert steered("limit", to=Targets(tenants=("c",)), max_running=None).counts == {"unchanged": 1}
    assert told(steered.engine) == [
        ("operator", "class gold: max_running=2 max_queued=7"),
        ("operator", "tenant a: max_running=2 max_queued=7"),
        ("operator", "tenant b: max_running=2 max_queued=7"),
        ("operator", "tenant a: max_queued=none"),
    ]
    first = steered.engine.seen(ev.Limited)[0]
    assert (first["class_"], "tenant" in first) == ("gold", False)


def test_what_comes_later_is_limited_too(steered: Steered) -> None:
    """A limit on a tenant that nobody has seen holds for its first request, and status shows it before that."""
    steered("limit", to=A, max_running=1)
    account = steered.engine.core.tenants.accounts["a"]
    assert account.seen
    for _ in range(3):
        steered.engine.submit("a")
        steered.engine.submit("b")
    steered.engine.step()
    assert running(steered.engine) == "abbb"


def test_a_tenant_with_a_limit_is_listed_even_if_a_stricter_one_was_in_force(steered: Steered) -> None:
    """Nothing changes in what it may have; but nobody was told of it before, and a rank alone tells no whole row."""
    rows = {"default": TenantPolicy(max_running=1)}
    steered("configure", tenants=rows)
    known = steered.engine.core.tenants
    steered.engine.core.rank("a", TenantRank(base=1.0))
    known.touched.clear()
    steered.engine.core.rank("a", TenantRank(base=2.0))
    steered("limit", to=A, max_running=2)
    account = known.accounts["a"]
    assert (account.seen, account.caps.max_running, known.touched[account]) == (True, 1, True)


def test_class_that_returns_has_its_limit_still(steered: Steered) -> None:
    """A limit on a class outlives a table without that class."""
    steered("limit", to=GOLD, max_running=0)
    steered("configure")
    steered("configure", classes={"gold": ClassPolicy(max_running=3)})
    assert class_row(0.0, steered.engine.core.roster.classes["gold"]).max_running == 0


def test_prefill_limits_are_of_tenants_and_classes(steered: Steered) -> None:
    """`max_prefill_tokens_per_step` bounds every step of whom it names; lifted, it bounds nobody."""
    limits = steered.engine.core.limits
    assert not limits.bounds_prefill
    steered("limit", to=A, max_prefill_tokens_per_step=512)
    steered("limit", to=GOLD, max_prefill_tokens_per_step=256)
    assert {group.name: tokens for group, tokens in limits.prefill().items()} == {"a": 512, "gold": 256}
    steered("limit", to=A, max_prefill_tokens_per_step=None)
    steered("limit", to=GOLD, max_prefill_tokens_per_step=None)
    assert not limits.bounds_prefill


def test_limits_of_controllers_end_with_their_leader(steered: Steered) -> None:
    """A silent leader's limits end, as its holds do; an operator's stay. A successor in time inherits them."""
    steered("limit", to=A, max_running=3)
    steered.controller("limit", to=A, max_running=0)
    steered.engine.wait(4)
    steered.engine.lead(EPOCH[0], EPOCH[1] + 1)
    steered.engine.wait(4)
    assert caps(steered) == (0, None)
    steered.engine.wait(2)
    assert caps(steered) == (3, None)
    assert told(steered.engine)[-1] == (CONTROLLER, "failover: its limits on 1 ended")
    steered.engine.check()


REFUSALS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "requests": (400, "tenants and classes", {"to": Targets(requests=("r1",)), "max_running": 1}),
    "all": (400, "tenants and classes", {"to": Targets(all=True), "max_running": 1}),
    "no field": (400, "at least one of max_running, max_queued, max_prefill", {"to": A}),
    "no such class": (404, "known are default, gold", {"to": Targets(classes=("silver",)), "max_running": 1}),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_limit_says_why_and_changes_nothing(steered: Steered, name: str) -> None:
    """Each refusal has its code and a text that names the cause."""
    code, text, fields = REFUSALS[name]
    before = picture(steered.engine.core)
    reply = steered("limit", **fields)
    assert (reply.outcome, reply.code) == ("rejected", code)
    assert text in str(reply.error)
    assert picture(steered.engine.core) == before


def test_some_classes_missing_is_partial(steered: Steered) -> None:
    """What exists is limited, what does not is named."""
    reply = steered("limit", to=Targets(classes=("gold", "silver")), max_running=1)
    assert (reply.outcome, reply.counts) == ("partial", {"applied": 1, "not_found": 1})
    assert {result.request: result.outcome for result in reply.results} == {
        "silver": "not_found",
        "gold": "applied",
    }


def test_stored_limits_are_bounded(steered: Steered, monkeypatch: pytest.MonkeyPatch) -> None:
    """More targets than a role may have limits on are refused whole."""
    monkeypatch.setattr(limits, "MAX_LIMITS", 2)
    before = picture(steered.engine.core)
    many = Targets(tenants=("x", "y", "z"))
    assert steered("limit", to=many, max_running=1).code == 413
    assert steered("limit", to=many, max_running=None).counts == {"unchanged": 3}
    assert picture(steered.engine.core)["limits"] == before["limits"]


def test_a_worker_that_keeps_as_many_tenants_as_it_can_is_limited_and_freed(
    steered: Steered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a cap on a tenant without an account is not possible; what is known, and lifting, always is."""
    monkeypatch.setattr(tenants, "MAX_TENANTS", 2)
    core = steered.engine.core
    reply = steered("limit", to=Targets(tenants=("a", "b", "c"), classes=("gold",)), max_running=1)
    assert (reply.outcome, reply.counts) == ("partial", {"applied": 3, "not_possible": 1})
    assert core.tenants.accounts.keys() == {"a", "b"}
    steered.engine.submit("c")
    assert tenants.OTHER in core.tenants.accounts
    reply = steered("limit", to=Targets(tenants=("c",)), max_running=1)
    assert (reply.code, "later ones share" in str(reply.error)) == (413, True)
    assert steered("limit", to=A, max_running=2).counts == {"applied": 1}
    assert steered("limit", to=GOLD, max_running=None).counts == {"applied": 1}
    assert core.roster.classes["gold"].max_running is None
    assert steered("limit", to=Targets(tenants=("a", "b", "c")), max_running=None).counts == {
        "applied": 2, "unchanged": 1,
    }  # fmt: skip
    steered.engine.check()


def test_a_row_with_a_cap_gets_no_account_where_none_is_left(
    steered: Steered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table with more capped tenants than a worker keeps is put in force; the shared account is not theirs."""
    monkeypatch.setattr(tenants, "MAX_TENANTS", 2)
    steered("configure", tenants={name: TenantPolicy(max_running=1) for name in "abc"})
    accounts = steered.engine.core.tenants.accounts
    assert {name: account.max_running for name, account in accounts.items()} == {"a": 1, "b": 1}


# Who may run


def test_caps_hold_in_every_pass(steered: Steered) -> None:
    """With a cap on a tenant and on a class, no step has more of either running, and nobody else waits for it."""
    engine = steered.engine
    steered("limit", to=A, max_running=2)
    steered("limit", to=GOLD, max_running=1)
    for _ in range(6):
        engine.submit("a")
        engine.submit("b", asked_class="gold")
    engine.submit("c", tokens=99)
    most = {"a": 0, "b": 0}
    for _ in range(60):
        engine.step()
        engine.check()
        most = {name: max(before, running(engine).count(name)) for name, before in most.items()}
        assert "c" in running(engine)
    assert most == {"a": 2, "b": 1}
    assert engine.core.tenants.accounts["a"].finished == 6
    assert engine.core.tenants.accounts["b"].finished == 6


def test_lowered_cap_names_the_excess_and_raised_one_lets_in(steered: Steered) -> None:
    """What runs over a cap that was lowered is reported to whoever ends it; no more of it is offered."""
    engine, core = steered.engine, steered.engine.core
    for _ in range(5):
        engine.submit("a", tokens=50)
    engine.step()
    assert running(engine) == "aaaa"
    steered("limit", to=A, max_running=1)
    (over,) = core.limits.over()
    assert (over.group, over.excess, over.borrowed) == (core.tenants.accounts["a"], 3, 0)
    victims = list(engine.running)[1:]
    for record in victims:
        core.holds.hold(engine.now, record, "engine", "keep", None, "over its cap")
    assert list(core.limits.over()) == []
    assert not any(core.limits.room(record) for record in victims)
    assert (len(core.queue), bool(core.queue), core.queue.blocked) == (1, False, 1)
    steered("limit", to=A, max_running=2)
    assert (bool(core.queue), core.limits.room(victims[0])) == (True, True)
    engine.check()


def test_who_stops_for_one_cap_counts_for_the_other(steered: Steered) -> None:
    """A tenant and a class are each one over, and the worst is of both: it alone stops."""
    engine = steered.engine
    for _ in range(3):
        engine.submit("a", asked_class="gold", tokens=50)
    engine.step()
    steered("limit", to=Targets(tenants=("a",), classes=("gold",)), max_running=2)
    engine.step()
    assert (running(engine), len(engine.seen(ev.Held))) == ("aa", 1)
    engine.check()


def test_others_stop_in_place_of_what_cannot_be_held(steered: Steered) -> None:
    """A cap lowered under a streaming session holds those that can be; where all are sessions, they run on."""
    engine = steered.engine
    records = [engine.submit("a", tokens=50) for _ in range(3)]
    engine.step()
    worst = list(engine.running)[-1]
    worst.payload.obstacle = "a streaming session cannot be held"
    steered("limit", to=A, max_running=1)
    engine.step()
    assert [record for record in records if record not in engine.core.roster.held] == [worst]
    worst.payload.obstacle = None
    steered("limit", to=A, max_running=2)
    engine.step()
    for record in engine.running:
        record.payload.obstacle = "a streaming session cannot be held"
    steered("limit", to=A, max_running=1)
    engine.step()
    assert running(engine) == "aa"
    engine.check()


def test_what_cannot_be_kept_is_dropped_for_a_cap(steered: Steered) -> None:
    """With LoRA and a KV connector no hold keeps any KV: the cap is exact all the same, from the next step on."""
    engine = steered.engine
    first, second, third = (engine.submit("a", tokens=50) for _ in range(3))
    engine.step()
    engine.unkeepable.update((first, third))
    steered("limit", to=A, max_running=1)
    engine.step()
    assert (first.state, second.state, third.state) == (State.RUNNING, State.HELD_KEPT, State.QUEUED)
    assert [held["kv"] for held in engine.seen(ev.Held)] == ["dropped", "kept"]
    engine.check()


def test_not_every_step_looks_for_whom_to_stop_where_nobody_can_be(
    steered: Steered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions over a cap run for hours: a step looks through what runs when their count changes, or after a while."""
    engine, room = steered.engine, steered.engine.core.room
    looks: list[float] = []
    placed: list[float] = []
    worst_running, free_slots = engine.worst_running, engine.free_slots
    monkeypatch.setattr(engine, "free_slots", lambda: placed.append(engine.now) or free_slots())
    monkeypatch.setattr(engine, "worst_running", lambda: looks.append(engine.now) or worst_running())
    records = [engine.submit("a", tokens=50) for _ in range(5)]
    engine.step()
    for record in records:
        record.payload.obstacle = "a streaming session cannot be held"
    steered("limit", to=A, max_running=1)
    began = engine.now
    placed.clear()
    for step in range(50):
        room.plan(began + 0.001 * step)
    assert (looks, placed) == ([began], []), "and nobody borrows, so nobody looks for room to give back"
    running_on = iter(engine.running)
    assert not list(engine.core.limits.borrowers(running_on))
    assert len(list(running_on)) == 4, "not even looked at"
    steered("limit", to=A, max_running=2)
    room.plan(began + 0.051)
    assert len(looks) == 2
    another = next(record for record in records if record not in engine.running)
    engine.finish(next(iter(engine.running)))
    steered("limit", to=A, max_running=None)
    engine.admit()
    steered("limit", to=A, max_running=2)
    another.payload.obstacle = None
    room.plan(began + 0.052)
    assert another in engine.core.roster.held, "as many are over as before, but not the same"
    for record in engine.running:
        record.payload.obstacle = None
    room.plan(began + 0.053)
    assert (running(engine), len(looks)) == ("aaa", 3)
    room.plan(began + 0.052 + STUCK_S)
    assert (running(engine), len(looks)) == ("aa", 4)
    engine.check()


def test_cap_holds_for_what_was_released_from_a_park_and_not_admitted_since(steered: Steered) -> None:
    """It counts as running before it does: what is too many of it is held again, and keeps its KV."""
    engine, core = steered.engine, steered.engine.core
    parked = [engine.submit("a", tokens=50) for _ in range(2)]
    engine.step()
    for record in parked:
        steered("preempt", record)
        core.holds.park(engine.now, record, "test")
        core.holds.release(engine.now, record, ("operator",), "engine", "room")
    assert core.tenants.accounts["a"].running == len(engine.again) == 2
    steered("limit", to=A, max_running=1)
    engine.step()
    assert running(engine) == "a"
    (held,) = core.roster.held
    assert (held.state, held in engine.kv) == (State.HELD_PARKED, True)
    engine.check()
    steered("limit", to=A, max_running=None)
    engine.step()
    assert running(engine) == "aa"
    assert held.recomputed_tokens == 0


def test_held_requests_do_not_count_as_running(steered: Steered) -> None:
    """A hold makes room under the cap: another request of the tenant runs instead."""
    engine = steered.engine
    steered("limit", to=A, max_running=1)
    first, second = engine.submit("a"), engine.submit("a")
    engine.step()
    steered("preempt", first)
    engine.step()
    assert list(engine.running) == [second]
    assert not engine.core.limits.room(first)


def test_classes_are_counted_through_every_change(steered: Steered) -> None:
    """A running request that changes class takes its place in the new one's count."""
    engine, core = steered.engine, steered.engine.core
    steered("limit", to=GOLD, max_running=1)
    records = [engine.submit("a", tokens=50) for _ in range(2)]
    engine.step()
    steered("prioritize", *records, class_="gold")
    assert class_row(0.0, core.roster.classes["gold"]).running == 2
    assert [over.group.name for over in core.limits.over()] == ["gold"]
    engine.check()
    steered("configure")
    assert list(core.limits.over()) == []
    engine.check()


def test_cap_that_is_lifted_leaves_no_credit(steered: Steered) -> None:
    """A tenant that was kept back by its cap does not catch up on the others when it goes, as after idleness."""
    engine = steered.engine
    steered("limit", to=A, max_running=1)
    for _ in range(60):
        engine.submit("a")
        engine.submit("b")
    for _ in range(80):
        engine.step()
    a, b = (engine.core.tenants.accounts[name] for name in "ab")
    assert b.virtual_time > 1.5 * a.virtual_time
    steered("limit", to=A, max_running=None)
    assert a.virtual_time == pytest.approx(b.virtual_time)
    engine.check()


def test_tenant_at_its_cap_is_no_floor_for_who_returns(steered: Steered) -> None:
    """Returning from idleness lifts to the least of those that could run, not to one that its cap keeps back."""
    engine = steered.engine
    steered("limit", to=A, max_running=0)
    engine.submit("a")
    for _ in range(40):
        engine.submit("b")
    for _ in range(10):
        engine.step()
    engine.core.ledger.settle_all()
    assert engine.submit("c").account.virtual_time == engine.core.tenants.accounts["b"].virtual_time > 0


# Borrowing


def lending() -> Steered:
    """Four slots, of which `a` has two and may borrow, in a class of its own; others are in `default`."""
    steered = Steered()
    steered(
        "configure",
        classes={"gold": ClassPolicy(position=-1, borrow=True)},
        tenants={"a": TenantPolicy(class_="gold", max_running=2)},
    )
    return steered


def test_idle_share_is_borrowed() -> None:
    """Where nothing within its caps waits, a class that may borrow runs beyond them; every one of it may go then."""
    steered = lending()
    engine, core = steered.engine, steered.engine.core
    for _ in range(4):
        engine.submit("a", tokens=50)
    engine.submit("b", tokens=50)
    engine.step()
    assert running(engine) == "aaab"
    (over,) = core.limits.over()
    assert (over.group.name, over.excess, over.borrowed) == ("a", 1, 1)
    assert len(list(core.limits.borrowers(core.roster.running))) == 1
    assert core.queue.blocked == 0
    engine.submit("b")
    assert core.queue.peek().account.name == "b"
    assert core.limits.room(core.queue.peek())
    engine.check()


def test_who_may_not_borrow_waits_for_room() -> None:
    """Of a tenant over its cap only what runs in a class that borrows counts as borrowed."""
    steered = lending()
    steered("configure", tenants={"a": TenantPolicy(max_running=2)})
    engine, core = steered.engine, steered.engine.core
    for _ in range(4):
        engine.submit("a", tokens=50)
    engine.step()
    assert running(engine) == "aa"
    assert not list(core.limits.borrowers(core.roster.running))


# Ageing


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32), st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=4))
def test_no_class_is_passed_over_beyond_its_bound(seed: int, bounds: list[float]) -> None:
    """However much waits before it, a class with a bound has one among the first D admissions after the bound."""
    rng = random.Random(seed)
    engine = FakeEngine(slots=1)
    classes = {f"c{i}": ClassPolicy(position=i, ageing_s=bound) for i, bound in enumerate(bounds)}
    engine.core.configure(
        {"flood": ClassPolicy(position=-9), **classes}, {"default": TenantPolicy(classes=("flood", *classes))}
    )
    names = ["flood", *classes]
    since = dict.fromkeys(classes, engine.now)  # when each was last admitted, or had something to offer again
    passed = dict.fromkeys(classes, 0)  # admissions of others since its bound was over
    for _ in range(150):
        for name in (*names, *rng.choices(names, k=2)):
            if not engine.core.roster.classes[name].queued:
                engine.submit("t", asked_class=name, prompt=1, tokens=1)
        engine.step()
        (admitted,) = [record for record, kind, _ in engine.events if kind is ev.Admitted and record]
        engine.events.clear()
        for name, policy in classes.items():
            if admitted.class_ == name:
                since[name], passed[name] = engine.now, 0
            elif (
                engine.now - since[name] > (policy.ageing_s or 0.0) + 0.11
            ):  # a step, and the rounding of sums
                passed[name] += 1
                assert passed[name] <= len(classes), (name, admitted)


def test_what_aged_is_marked_and_its_clock_starts_again() -> None:
    """The head of a class that waited too long goes first, once, and can be told from others."""
    engine = FakeEngine(slots=1)
    engine.core.configure(
        {"gold": ClassPolicy(position=-1), "default": ClassPolicy(ageing_s=0.25)},
        {"default": TenantPolicy(classes=("gold",))},
    )
    gold = [engine.submit(asked_class="gold", prompt=1, tokens=1) for _ in range(8)]
    slow = [engine.submit(prompt=1, tokens=1) for _ in range(2)]
    order = []
    for _ in range(8):
        engine.step()
        order += [record for record, kind, _ in engine.events if kind is ev.Admitted]
        engine.events.clear()
    assert [record in slow for record in order] == [False, False, False, True, False, False, False, True]
    assert [record.aged for record in slow] == [True, True]
    assert not any(record.aged for record in gold)


# Drain


def test_drain_ends_holds_and_refuses_new_ones(steered: Steered) -> None:
    """Holds of people and controllers end, the engine's own do not; what is queued and running goes on."""
    engine = steered.engine
    records = [engine.submit() for _ in range(4)]
    engine.step()
    steered("preempt", records[0])
    steered.controller("preempt", records[1], lease_s=60.0)
    engine.core.holds.hold(engine.now, records[2], "engine", "keep", None, "room")
    reply = steered("drain", on=True)
    assert (reply.outcome, reply.counts) == ("applied", {"applied": 2})
    assert [len(record.holds) for record in records] == [0, 0, 1, 0]
    assert [fields["reason"] for fields in engine.seen(ev.Continued)] == ["drain", "drain"]
    assert steered("drain", on=True).counts == {}
    refused = steered("preempt", records[3])
    assert (refused.code, "draining" in str(refused.error)) == (503, True)
    steered("drain", on=False)
    assert steered("preempt", records[3]).outcome == "applied"
    engine.check()


def test_drain_ends_as_holds_do(steered: Steered) -> None:
    """A controller's ends with its leader; an operator's lasts, and its end ends everybody's."""
    engine, core = steered.engine, steered.engine.core
    steered.controller("drain", on=True)
    steered.controller("drain", on=False)
    assert not core.drain.roles
    steered.controller("drain", on=True)
    steered("drain", on=False)
    assert not core.drain.roles
    steered.controller("drain", on=True)
    steered("drain", on=True)
    steered.controller("drain", on=False)
    assert core.drain.roles == {"operator"}
    steered.controller("drain", on=True)
    engine.wait(6)
    assert core.drain.roles == {"operator"}


# What it costs


@pytest.mark.parametrize("order", ["fair", "priority"])
@pytest.mark.parametrize("tenants", [1, 10_000])
def test_capped_requests_at_the_head_cost_nothing(order: str, tenants: int) -> None:
    """10,000 requests that may not run, all before the first that may, are passed over in well under 0.1 ms."""
    engine = FakeEngine()
    engine.core.configure({"default": ClassPolicy(order=order)}, {})
    for i in range(10_000):
        engine.submit(f"t{i % tenants}", priority=-1)
    for account in list(engine.core.tenants.accounts.values()):
        engine.core.limits.limit(0.0, "operator", Target("tenant", account.name), Caps(0))
    last = engine.submit("z")
    rounds = []
    for _ in range(20):
        began = perf_counter()
        for _ in range(100):
            assert engine.core.queue
            assert engine.core.queue.peek() is last
        rounds.append((perf_counter() - began) / 100)
    assert min(rounds) < 50e-6
    engine.check()
