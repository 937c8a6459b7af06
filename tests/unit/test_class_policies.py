"""Policies that only write the class table: strict and colocate."""

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import asdict

from coxswain.control.fleet import Fleet
from coxswain.control.policies.colocate import Colocate
from coxswain.control.policies.strict import Strict
from coxswain.control.policy import Tables
from coxswain.schemas.policy import ClassPolicy

rows = st.builds(
    ClassPolicy,
    position=st.integers(-3, 3),
    order=st.sampled_from(["fair", "priority"]),
    cut_in=st.sampled_from(["off", "queue", "slots", "kv"]),
    ageing_s=st.none() | st.floats(1.0, 100.0),
    max_running=st.none() | st.integers(0, 9),
    max_prefill_tokens_per_step=st.none() | st.integers(1, 999),
    linger_s=st.sampled_from([0.0, 2.0]),
    stand_aside=st.booleans(),
    borrow=st.booleans(),
)
tables = st.dictionaries(st.sampled_from(["default", "chat", "batch", "bulk"]), rows, min_size=1)


def decided(policy, classes: dict[str, ClassPolicy]) -> dict[str, ClassPolicy]:
    """The class table that a policy wants in force."""
    policy.observe(Fleet(), Tables(classes), 0.0)
    return dict(policy.decide(0.0).classes)


def same_but(one: ClassPolicy, other: ClassPolicy, *fields: str) -> bool:
    """Whether two rows say the same, these fields apart."""
    left, right = asdict(one), asdict(other)
    return all(left[name] == right[name] for name in left if name not in fields)


@given(tables)
def test_under_strict_every_class_ages_and_operators_keep_their_say(classes: dict[str, ClassPolicy]) -> None:
    """No class can starve for ever; the order of classes, caps and what a row says itself are left alone."""
    wanted = decided(Strict(Strict.Params(ageing_s=30.0)), classes)
    assert wanted.keys() == classes.keys()
    for name, row in classes.items():
        assert wanted[name].ageing_s == (30.0 if row.ageing_s is None else row.ageing_s)
        assert wanted[name].cut_in == ("slots" if row.cut_in == "off" else row.cut_in)
        assert same_but(wanted[name], row, "ageing_s", "cut_in")


@given(tables)
def test_colocate_binds_batch_only_while_somebody_interactive_is_there(
    classes: dict[str, ClassPolicy],
) -> None:
    """The best class is bound by nothing new; the others get a budget, may borrow, and no cap."""
    wanted = decided(Colocate(Colocate.Params(prefill_tokens=100, linger_s=3.0)), classes)
    best = min(row.position for row in classes.values())
    for name, row in classes.items():
        new = wanted[name]
        if row.position == best:
            assert same_but(new, row, "cut_in")
            assert new.cut_in != "off"
        else:
            assert same_but(new, row, "borrow", "max_prefill_tokens_per_step", "linger_s")
            assert new.borrow
            assert new.linger_s > 0.0
            assert new.max_prefill_tokens_per_step == (row.max_prefill_tokens_per_step or 100)


def test_a_table_that_did_not_change_is_not_written_anew() -> None:
    """Equal tables make equal directives, the same object: nothing to compare."""
    seen = Tables({"default": ClassPolicy()})
    for policy in (Strict(Strict.Params()), Colocate(Colocate.Params())):
        policy.observe(Fleet(), seen, 0.0)
        first = policy.decide(0.0)
        policy.observe(Fleet(), seen, 0.1)
        assert policy.decide(0.1) is first
