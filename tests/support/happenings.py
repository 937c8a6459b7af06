"""Whatever can happen to a steered engine, chosen by numbers: for property tests of core and reports."""

from hypothesis import strategies as st

from coxswain.schemas.policy import ClassPolicy, Prices, TenantPolicy, TenantRank
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
        lease = None if value == 0 else now + value
        core.holds.hold(now, record, ROLES[choice % 3], "drop" if value == 1 else "keep", lease, "why")
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
        engine.skip(min(value, len(core.queue)))
    elif operation == 10:
        core.reprioritize(
            now, record, value, [None, *core.classes][choice % (len(core.classes) + 1)], "operator"
        )
    elif operation == 11:
        rank(engine, "abc"[choice % 3], base=float(value * 10), weight=[0.25, 1, 3][value % 3])
    elif operation == 12:
        core.configure(*TABLES[choice % len(TABLES)])
    elif operation == 13:
        engine.lead(revision=value)
    elif operation == 14:
        core.holds.drop_held(now, "cache reset")
    elif operation == 15:
        core.ledger.settle_all()
        core.tenants.prices = Prices(input=value, cached=value / 2, output=3)


OPERATIONS = st.tuples(st.integers(0, 15), st.integers(0, 30), st.integers(0, 6))
"""Arguments of `act`."""
