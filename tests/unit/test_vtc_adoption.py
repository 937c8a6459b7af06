"""Workers of which VTC hears for the first time: their order is taken over, their past charges nobody."""

import pytest

from coxswain.control.fleet import Fleet
from coxswain.control.policies.vtc import Vtc
from coxswain.control.policy import Tables
from coxswain.schemas.status import Frame
from tests.support.frames import frame, row


def heard(*frames: Frame) -> Vtc:
    """A controller that started on a running fleet, whose frames came one after the other."""
    policy, fleet = Vtc(Vtc.Params()), Fleet()
    for number, each in enumerate(frames):
        now = number / 10
        fleet.merge(each, now)
        fleet.age(now)
        policy.observe(fleet, Tables(), now)
        fleet.settle()
    return policy


def apart(policy: Vtc, *tenants: str) -> list[float]:
    """How far tenants are ahead of the least of them."""
    least = min(policy.virtual[tenant] for tenant in tenants)
    return [policy.virtual[tenant] - least for tenant in tenants]


def test_a_new_leader_takes_over_the_order_that_workers_have() -> None:
    """A controller that starts later adopts the virtual times of ranked workers, lifts included."""
    ranked = row("a", base=-40.0, charged=30.0, lift=90.0, queued=1)
    policy = heard(frame("w1", "01A", 5, ranked, row("b", base=7.0, charged=60.0, queued=1)))
    assert policy.virtual == {"a": 80.0, "b": 67.0}
    bases = {name: rank.base for name, rank in policy.decide(0.0).ranks["w1"].items()}
    assert bases == {"a": -40.0, "b": 7.0}


@pytest.mark.parametrize("order", [1, -1])
def test_the_first_controller_on_a_running_fleet_charges_nobody_for_the_past(order: int) -> None:
    """Workers lifted and charged by themselves: whose frame comes first and how far they got decides nothing."""
    lifted = row("b", charged=30.0, lift=780.0, queued=1)
    here = frame("w1", "01A", 9, row("a", charged=800.0, queued=1), lifted)
    idle = frame("w2", "01B", 9, row("b", charged=500.0))
    old = frame("w3", "01C", 9, row("b", charged=90_000.0, queued=1), row("c", charged=90_007.0, queued=1))
    policy = heard(*[here, idle, old][::order])
    assert apart(policy, "a", "b", "c") == [0.0, 10.0, 7.0]


@pytest.mark.parametrize("order", [1, -1])
def test_what_an_earlier_leader_ranked_keeps_its_order_over_all_workers(order: int) -> None:
    """It had one time for all of them; a worker that it never ranked joins without credit or debt."""
    one = frame("w1", "01A", 9, row("a", base=70.0, charged=900.0, queued=1))
    other = frame("w2", "01B", 9, row("b", base=200.0, charged=700.0, queued=1))
    own_time = frame("w3", "01C", 9, row("c", charged=5.0, queued=1))
    policy = heard(*[own_time, one, other][::order])
    assert apart(policy, "b", "a") == [0.0, 70.0]
    assert policy.virtual["b"] <= policy.virtual["c"] <= policy.virtual["a"]


def test_who_waits_on_a_worker_that_joins_stands_at_the_floor() -> None:
    """A worker may have requests when it is first heard of: that they are its first is no credit."""
    rows = row("a", charged=500.0, queued=1), row("b", charged=300.0, queued=1)
    joins = frame("w2", "01B", 1, row("new", charged=4.0, queued=1), row("a", charged=6.0, queued=1))
    assert heard(frame("w1", "01A", 1, *rows), joins).virtual == {"a": 500.0, "b": 300.0, "new": 300.0}


def test_what_a_worker_charges_after_it_was_heard_of_counts() -> None:
    """Also by its next incarnation, which begins from nothing."""
    life = (("01A", 1, 500.0), ("01A", 2, 520.0), ("01B", 1, 7.0))
    frames = [frame("w1", name, seq, row("a", charged=charged, queued=1)) for name, seq, charged in life]
    assert heard(*frames).virtual == {"a": 527.0}


def test_who_comes_to_a_worker_that_restarted_stands_where_others_were() -> None:
    """The only worker of a fleet forgot whom it served, so it lifts nobody: a newcomer would starve them all."""
    waits = frame("w1", "01A", 1, row("a", charged=400.0, queued=1))
    left = frame("w1", "01A", 2, row("a", charged=500.0))
    comes = frame("w1", "01B", 2, row("new", charged=3.0, queued=1, uncached_input_tokens_total=3))
    assert heard(waits, left, frame("w1", "01B", 1), comes).virtual == {"a": 500.0, "new": 503.0}


def test_what_a_process_charged_while_another_had_its_name_is_past() -> None:
    """When it has its turn again its order is taken over and what it charges from then on counts, as of a stranger."""
    policy, fleet = Vtc(Vtc.Params()), Fleet()
    hours = 90_000.0
    turns = (
        ("01A", 0.0, 500.0, 500.0), ("01B", 1.0, 7.0, 7.0),
        ("01A", 9.0, hours, hours + 4.0), ("01A", 10.0, hours + 20.0, hours + 4.0),
    )  # fmt: skip
    for seq, (incarnation, now, *charged) in enumerate(turns):
        rows = [row(name, charged=each, queued=1) for name, each in zip("ab", charged, strict=True)]
        fleet.merge(frame("w1", incarnation, seq, *rows), now)
        fleet.age(now)
        policy.observe(fleet, Tables(), now)
        fleet.settle()
    assert policy.virtual == {"a": 527.0, "b": 511.0}
