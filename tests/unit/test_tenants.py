"""Tenants: virtual time, the lift on return from idle, policy rows, and the heap that orders them."""

from itertools import islice
from math import isfinite

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coxswain.schemas.policy import TenantPolicy, TenantRank
from coxswain.service.scheduler import tenants as module
from coxswain.service.scheduler.tenants import Account, RankHeap, Tenants
from tests.support import structs
from tests.support.fake_engine import FakeEngine

Operations = list[tuple[int, int, float]]


def account(name: str = "a") -> Account:
    """An account with nothing in it."""
    return Account(name, TenantPolicy(), Tenants())


# Virtual time


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("charge"), st.floats(0, 1e15)),
            st.tuples(st.just("rank"), structs.of(TenantRank)),
            st.tuples(st.just("lift"), st.floats(-1e18, 1e18)),
        ),
        max_size=30,
    ),
)
def test_virtual_time_is_always_a_finite_sum(operations: list[tuple[str, float | TenantRank]]) -> None:
    """Whatever ranks the contract allows, virtual time is base + charged + lift and a number."""
    tenant = account()
    for _, value in operations:
        if isinstance(value, TenantRank):
            tenant.weight = value.weight
            tenant.rebase(value.base)
        elif _ == "charge":
            tenant.charge(value)
        else:
            before = tenant.virtual_time
            tenant.lift_to(value)
            assert tenant.virtual_time >= before
        assert tenant.virtual_time == tenant.base + tenant.charged + tenant.lift
        assert isfinite(tenant.virtual_time)


def test_charge_is_divided_by_the_weight_in_force() -> None:
    """A weight counts from the moment it is set, not for what was charged before."""
    tenant = account()
    tenant.charge(12)
    tenant.weight = 3.0
    tenant.charge(12)
    assert tenant.charged == 12 + 4


def test_lift_never_lowers() -> None:
    """A floor below the virtual time changes nothing."""
    tenant = account()
    tenant.charge(10)
    tenant.lift_to(4)
    assert (tenant.virtual_time, tenant.lift) == (10, 0)
    tenant.lift_to(14)
    assert (tenant.virtual_time, tenant.lift) == (14, 4)


@pytest.mark.parametrize("change", ["charge", "rebase", "lift_to"])
def test_every_change_of_virtual_time_is_news(change: str) -> None:
    """Whatever moves a tenant's virtual time marks it for the next status frame."""
    tenant = account()
    getattr(tenant, change)(5.0)
    assert tenant in tenant.tenants.touched


# The lift, as the core applies it


def test_return_from_idle_lifts_to_the_least_active() -> None:
    """A tenant that comes back does not cash in the time in which it asked for nothing."""
    engine = FakeEngine(slots=1)
    first, second = engine.submit("a").account, engine.submit("b").account
    first.charge(50)
    second.charge(30)
    tenant = engine.core.tenants.account("idle")
    tenant.charge(7)
    engine.submit("idle")
    assert (tenant.virtual_time, tenant.lift) == (30, 23)


def test_an_active_tenant_is_not_lifted() -> None:
    """Only the first request of an idle tenant lifts it; more requests change nothing."""
    engine = FakeEngine()
    first = engine.submit("a").account
    engine.submit("b").account.charge(100)
    first.charge(1)
    engine.submit("a")
    assert first.lift == 0


def test_with_nobody_active_the_floor_is_who_left_last() -> None:
    """In an empty queue a newcomer starts where the last tenant that left it stands by now."""
    engine = FakeEngine()
    last = engine.submit("a", prompt=16)
    engine.submit("b", prompt=4)
    engine.admit()
    engine.admit()
    assert last.account.virtual_time == 16
    floor = engine.core.tenants.account("b")
    assert engine.submit("new").account.virtual_time == floor.virtual_time == 4
    engine.check()


def test_a_tenant_above_the_floor_keeps_its_place() -> None:
    """A lift goes up only: who was served more than the least active stays where it is."""
    engine = FakeEngine()
    engine.submit("a")
    rich = engine.core.tenants.account("rich")
    rich.charge(99)
    engine.submit("rich")
    assert (rich.virtual_time, rich.lift) == (99, 0)


# Rows and bounds


def test_row_of_a_tenant_falls_back_to_default_then_to_built_in() -> None:
    """A tenant without a row has that of `default`; without that, the built-in one."""
    tenants = Tenants()
    assert tenants.policy_of("x") == TenantPolicy()
    tenants.table = {"default": TenantPolicy(weight=2), "x": TenantPolicy(weight=3)}
    assert tenants.policy_of("x").weight == 3
    assert tenants.policy_of("y").weight == 2


def test_accounts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the bound new tenants share one account; those that have one keep it."""
    monkeypatch.setattr(module, "MAX_TENANTS", 3)
    tenants = Tenants()
    known = [tenants.account(name) for name in "abc"]
    late = [tenants.account(f"late{i}") for i in range(100)]
    assert {account.name for account in late} == {module.OTHER}
    assert len({id(account) for account in late}) == 1
    assert [tenants.account(name) for name in "abc"] == known
    tenants.validate()


def test_oldest_waiting_request_stays_first_when_it_is_skipped() -> None:
    """What vLLM takes and puts back has waited since it came, and is still the tenant's oldest."""
    engine = FakeEngine()
    records = []
    for _ in range(4):
        records.append(engine.submit("a"))
        engine.wait(1)
    engine.skip(3)
    for record in records:
        assert record.account.oldest_since == record.queued_since
        engine.finish(record)
    assert records[0].account.oldest_since is None
    engine.check()


def test_skipping_a_later_request_does_not_make_it_the_oldest() -> None:
    """A skipped request of better priority that came later does not hide the one that waits longest."""
    engine = FakeEngine()
    old = engine.submit("a")
    engine.wait(5)
    engine.submit("a", priority=-1)
    engine.skip()
    assert old.account.oldest_since == old.queued_since
    engine.check()


# RankHeap


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7), st.floats(0, 100)), max_size=80))
def test_rank_heap_is_a_sort(operations: Operations) -> None:
    """Members come in order of virtual time, then name, whatever grew unseen or fell and was told."""
    _check_rank_heap(operations)


def test_walk_mends_a_heap_of_which_all_has_grown() -> None:
    """Listing the first after all have grown, in another order, gives the new order, and the next one is cheap."""
    heap: RankHeap[Account] = RankHeap()
    accounts = [account(f"t{i}") for i in range(1_000)]
    for item in accounts:
        heap.push(item)
    for i, item in enumerate(accounts):
        item.charge(1 + i * 7_919 % 1_000)
    expected = sorted(accounts, key=lambda item: (item.virtual_time, item.name))
    assert list(islice(heap.walk(), 64)) == expected[:64]
    stored = {entry[-1]: entry[:-2] for entry in heap._heap}
    assert all(stored[item] == item.rank for item in expected[:64])
    assert list(heap.walk()) == expected
    assert all(entry[:-2] == entry[-1].rank for entry in heap._heap)
    heap.validate()


def test_tenant_that_waits_alone_is_next_whatever_it_was_served() -> None:
    """With one tenant, as where nobody says who asks, all that runs need not be counted for every admission."""
    engine = FakeEngine(slots=2)
    running = engine.submit()
    engine.step()
    waiting, account = engine.submit(), running.account
    before = account.virtual_time
    engine.deliver(running, 5)
    assert engine.core.queue.peek() is waiting
    assert account.virtual_time == before
    assert account.rank[0] > before


def _check_rank_heap(operations: Operations) -> None:
    heap: RankHeap[Account] = RankHeap()
    accounts = [account(f"t{i}") for i in range(8)]
    members: set[Account] = set()
    for operation, index, value in operations:
        item = accounts[index]
        if operation == 0 and item not in members:
            heap.push(item)
            members.add(item)
        elif operation == 1:
            heap.discard(item)
            members.discard(item)
        elif operation in (2, 3):
            item.charge(value)
        else:
            fell = value < item.virtual_time
            item.rebase(value - item.charged - item.lift)
            if fell and item in members:
                heap.push(item)
        expected = sorted(members, key=lambda item: (item.virtual_time, item.name))
        heap.validate()
        assert list(heap.walk()) == expected
        assert heap.least() is (expected[0] if expected else None)
        assert len(heap) == len(members)
        assert set(heap) == members


def test_rank_heap_forgets_what_left() -> None:
    """Members that come and go for ever, never asked for, leave no more than a constant behind."""
    heap: RankHeap[Account] = RankHeap()
    for i in range(5_000):
        item = account(f"t{i}")
        heap.push(item)
        heap.discard(item)
    assert len(heap._heap) <= 64
    heap.validate()
