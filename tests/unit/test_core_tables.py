"""The steering core and the tables: whose class and priority, and what new tables change."""

from typing import Any

import pytest

from coxswain.schemas.policy import ClassPolicy, TenantPolicy
from coxswain.service.scheduler.record import Record
from tests.support.fake_engine import FakeEngine, picture
from tests.support.happenings import rank


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("", "own"), ("own", "own"), ("other-allowed", "other-allowed"), ("gold", "own"), ("unknown", "own")],
)
def test_class_is_what_was_asked_for_and_may_be_had(asked: str, expected: str) -> None:
    """A tenant gets its own class or one that its row allows; anything else is its own."""
    engine = FakeEngine()
    engine.core.configure(
        {name: ClassPolicy() for name in ("own", "other-allowed", "gold")},
        {"a": TenantPolicy(class_="own", classes=("other-allowed", "unknown"))},
    )
    assert engine.submit(asked_class=asked).class_ == expected


def test_tenant_whose_class_is_not_there_is_in_default() -> None:
    """A row may name a class that nobody defined: its requests run in `default`."""
    engine = FakeEngine()
    engine.core.configure({}, {"a": TenantPolicy(class_="nowhere")})
    assert engine.submit().class_ == "default"


def test_class_set_by_command_outlives_tables() -> None:
    """A command's class stays through new tables; while it is undefined, it is as if never set."""
    engine = FakeEngine()
    core = engine.core
    gold, silver = {"gold": ClassPolicy(position=-1)}, {"silver": ClassPolicy()}
    core.configure(gold | silver, {})
    record = engine.submit()
    core.reprioritize(engine.now, record, None, "gold", "operator")
    core.configure(gold, {"a": TenantPolicy(class_="silver")})
    assert record.class_ == "gold"
    core.configure(silver, {})
    assert record.class_ == "default"
    core.configure(silver, {"a": TenantPolicy(class_="silver")})
    assert record.class_ == "silver"
    core.configure(gold, {})
    assert record.class_ == "gold"
    engine.check()


def test_new_tables_reach_the_engine_and_reorder_what_waits() -> None:
    """Positions, orders and weights count at once for everything that is here."""
    engine = FakeEngine()
    first, second = engine.submit("a"), engine.submit("b")
    assert engine.core.queue.peek() is first
    engine.core.configure({"vip": ClassPolicy(position=-5)}, {"b": TenantPolicy(class_="vip", weight=7)})
    assert engine.core.queue.peek() is second
    assert (second.account.weight, second.payload.place, first.payload.place) == (7, 0, 1)
    engine.check()


def test_configure_with_what_is_in_force_changes_nothing() -> None:
    """The same tables again are recognised by their digest and leave a later rank's weight alone."""
    engine = FakeEngine()
    engine.submit()
    tables: tuple[Any, Any] = ({"gold": ClassPolicy()}, {"a": TenantPolicy(weight=2)})
    assert engine.core.configure(*tables)
    rank(engine, "a", weight=5.0)
    before = picture(engine.core)
    assert not engine.core.configure({"gold": ClassPolicy()}, {"a": TenantPolicy(weight=2)})
    assert picture(engine.core) == before
    assert engine.core.tenants.account("a").weight == 5


def test_priority_is_clamped_to_the_tenants_range() -> None:
    """A client's priority cannot leave what its tenant's row allows."""
    engine = FakeEngine()
    engine.core.configure({}, {"a": TenantPolicy(priority_min=-1, priority_max=5)})
    assert [engine.submit(priority=asked).priority for asked in (-9, 0, 9)] == [-1, 0, 5]


def test_tables_are_applied_in_time_linear_in_what_waits() -> None:
    """New tables with 5,000 requests in the queue ask the engine once per request."""
    engine = FakeEngine()
    calls: list[Record] = []
    for i in range(5_000):
        engine.submit(f"t{i % 50}")
    engine.reprioritized = calls.append  # type: ignore[method-assign]
    engine.core.configure({"gold": ClassPolicy()}, {"default": TenantPolicy(class_="gold")})
    assert len(calls) == 5_000
    assert all(record.class_ == "gold" for record in calls)
    engine.check()
