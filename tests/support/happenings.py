"""Whatever can happen to a steered engine, chosen by numbers: for property tests of core and reports."""

from hypothesis import strategies as st

from coxswain.schemas.policy import ClassPolicy, Prices, TenantPolicy, TenantRank
from coxswain.service.scheduler.groups import Caps
from coxswain.service.scheduler.limits import Target
from tests.support.fake_engine import FakeEngine

ROLES = ("operator", "controller", "engine")
TABLES: tuple[tuple[dict[str, ClassPolicy], dict[str, TenantPolicy]], ...] = (
    ({}, {}),
    ({"gold": ClassPolicy(position=-1)}, {"a": TenantPolicy(class_="gold", weight=4)}),
    (
        {"gold": ClassPolicy(order="priority"), "default": ClassPolicy(position=2, order="priority")},
        {"default": TenantPolicy(weight=0.5, classes=("gold",))},
    ),
    (
        {
            "gold": ClassPolicy(position=-1, cut_in="kv", quantum_s=0.2),
            "default": ClassPolicy(order="priority", cut_in="slots", cooldown_s=0.3, ageing_s=1.0),
        },
        {"a": TenantPolicy(class_="gold")},
    ),
    (
        {"gold": ClassPolicy(position=-1, max_running=2, borrow=True), "default": ClassPolicy(ageing_s=1.0)},
        {
            "a": TenantPolicy(classes=("gold",), max_running=1),
            "b": TenantPolicy(class_="gold", max_running=1),
        },
    ),
)


def rank(engine: FakeEngine, tenant: str, **fields: float) -> None:
    """Set base and weight, as the verb does."""
    engine.core.ledger.settle_all()
    engine.core.rank(tenant, TenantRank(**fields))


def act(engine: FakeEngine, operation: int, choice: int, value: int) -> None:
    """One thing that can happen, chosen by three numbers."""
    core, now = engine.core, engine.now
    records = list(core.roster.records.values())
    record = records[choice % len(records)] if records else None
    if operation == 0 or record is None:
        shared = {"request": f"x{choice % 3}"} if value == 6 else {}  # a client that gives one id to several
        engine.submit("abc"[choice % 3], prompt=1 + choice, tokens=1 + value, priority=value - 3, **shared)
    elif operation in (1, 2):
        engine.step()
    elif operation == 3:
        lease, kv = None if value == 0 else now + value, "drop" if value == 1 else "keep"
        if engine.obstacle(record, kv) is None:
            core.holds.hold(now, record, ROLES[choice % 3], kv, lease, "why")
    elif operation == 4:
        core.holds.release(now, record, [ROLES[value % 3]], ROLES[value % 3], "command")
    elif operation == 5:
        core.holds.release(now, record, list(record.holds), "operator", "command")
    elif operation == 6:
        engine.wait(value / 2)
    elif operation == 7:
        engine.finish(record)
    elif operation == 8 and engine.running:
        engine.run_short(list(engine.running)[choice % len(engine.running)])
    elif operation == 9:
        engine.skip(value)
    elif operation == 10:
        core.reprioritize(
            now, record, value, [None, *core.classes][choice % (len(core.classes) + 1)], "operator"
        )
    elif operation == 11:
        fields = {"base": float(value * 10), "weight": [0.25, 1, 3][value % 3], "expected_output": choice % 5}
        rank(engine, "abc"[choice % 3], **fields)
    elif operation == 12:
        core.configure(*TABLES[choice % len(TABLES)])
    elif operation == 13:
        engine.lead(revision=value)
    elif operation == 14:
        core.holds.drop_held(now, "cache reset")
    elif operation == 15:
        core.ledger.settle_all()
        core.tenants.prices = Prices(input=value, cached=value / 2, output=3)
    elif operation == 16:
        limit(engine, choice, value)
    elif operation == 17:
        if value > 2:
            core.drain.begin(now, ROLES[choice % 2])
        else:
            core.drain.end(ROLES[choice % 2])


def limit(engine: FakeEngine, choice: int, value: int) -> None:
    """Set, change or lift a limit; 0 may not be lifted by anything but another limit."""
    target = [
        Target("tenant", "a"),
        Target("tenant", "b"),
        Target("class", "gold"),
        Target("class", "default"),
    ][choice % 4]
    cap = None if value > 3 else value
    engine.core.limits.limit(
        engine.now, ROLES[choice % 2], target, Caps(cap, None if cap is None else value + 1, choice)
    )


OPERATIONS = st.tuples(st.integers(0, 17), st.integers(0, 30), st.integers(0, 6))
"""Arguments of `act`."""
