"""VTC over a fleet, against workers that charge and lift by the scheduler's own rule."""

import random as randomness
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coxswain.control.core import ControlCore, Inputs
from coxswain.control.fleet import Fleet
from coxswain.control.policies.vtc import KEEP, Vtc
from coxswain.control.policy import Tables
from coxswain.schemas.policy import TenantPolicy
from tests.support.frames import SmallWorker, frame, row

EPOCH = (1.0, 1)
INPUT, OUTPUT, SLOTS = 10, 5, 4
U = max(1 * INPUT, 2 * SLOTS * OUTPUT)
"""Lemma 4.3's bound: max(wp × longest input, wq × tokens of a full batch)."""


def vtc() -> Vtc:
    """VTC as it comes."""
    return Vtc(Vtc.Params())


class Loop:
    """Workers and a controller joined by a perfect transport; one `turn` is a frame period."""

    def __init__(
        self, workers: Sequence[SmallWorker], tenants: dict[str, TenantPolicy] | None = None
    ) -> None:
        self.workers = list(workers)
        self.policy = vtc()
        self.tenants = tenants or {}
        self.now = 0.0
        self._ids = iter(range(10**9))
        self.core = ControlCore(self.policy, "c", lambda: f"id{next(self._ids)}", cadence_s=0.0)
        self._answers: list = []

    def turn(self, steps: int = 1) -> None:
        """The workers run; then the controller hears them all, and they what it says."""
        for worker in self.workers:
            worker.step(steps)
        self.now += 0.05
        inputs = Inputs(
            frames=[worker.frame() for worker in self.workers],
            classes={}, tenants=self.tenants, epoch=EPOCH, answers=self._answers,
        )  # fmt: skip
        outgoing = self.core.step(self.now, inputs)
        self.core.validate()
        self._answers = [answer for worker in self.workers for answer in worker.obey(outgoing)]

    @property
    def virtual(self) -> dict[str, float]:
        """The fleet's counters."""
        return self.policy.virtual


visits = st.tuples(st.sampled_from("abcd"), st.integers(1, 30), st.integers(1, 6), st.integers(1, 4))
periods = st.lists(st.tuples(st.lists(visits, max_size=4), st.integers(0, 12)), min_size=1, max_size=30)


@settings(max_examples=120, deadline=None)
@given(periods)
def test_one_worker_keeps_its_own_order(script: list) -> None:
    """With a single worker V is its virtual time, whatever happens between two frames: no base is sent."""
    worker = SmallWorker(slots=2)
    loop = Loop([worker])
    for arrivals, steps in script:
        for tenant, input_tokens, output_tokens, times in arrivals:
            worker.arrive(tenant, input_tokens, output_tokens, times=times)
            worker.step()
        worker.step(steps)
        local = {name: account.virtual_time for name, account in worker.accounts.items()}
        loop.turn(0)
        assert loop.virtual == pytest.approx(local)
        assert all(account.base == 0.0 for account in worker.accounts.values())


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_counters_of_backlogged_tenants_stay_together(workers: int) -> None:
    """Lemma 4.3: while all have requests queued everywhere, no counter is further than U from another."""
    fleet = [SmallWorker(f"w{n}", slots=SLOTS) for n in range(workers)]
    loop = Loop(fleet)
    random = randomness.Random(7)
    gaps = []
    for _ in range(400):
        for worker in fleet:
            for tenant in "abc":
                missing = 8 - len(worker.account(tenant).queue)
                worker.arrive(
                    tenant, random.randint(1, INPUT), random.randint(1, OUTPUT), times=max(0, missing)
                )
        loop.turn()
        gaps.append(max(loop.virtual.values()) - min(loop.virtual.values()))
    # Several workers decide between two frames without knowing of each other: each adds its own U.
    assert max(gaps) <= U * workers
    assert min(loop.virtual.values()) > 10 * U


def test_a_flood_on_one_worker_counts_on_the_other() -> None:
    """A tenant that one worker serves alone stands back on the worker where another one waits."""
    left, right = SmallWorker("w1", slots=1), SmallWorker("w2", slots=1)
    loop = Loop([left, right])
    left.arrive("greedy", times=400)
    right.arrive("greedy", times=400)
    right.arrive("polite", times=400)
    for _ in range(200):
        loop.turn()
    assert abs(loop.virtual["greedy"] - loop.virtual["polite"]) <= 2 * U
    served = {name: right.account(name).charged for name in ("greedy", "polite")}
    assert served["polite"] > 10 * served["greedy"]


def test_weights_divide_what_is_charged() -> None:
    """A tenant of weight 3 gets three times the service of one of weight 1, over two workers."""
    fleet = [SmallWorker("w1"), SmallWorker("w2")]
    loop = Loop(fleet, {"heavy": TenantPolicy(weight=3.0)})
    loop.turn()
    for worker in fleet:
        worker.arrive("heavy", times=2000)
        worker.arrive("light", times=2000)
    for _ in range(300):
        loop.turn()
    tokens = {
        name: sum(worker.account(name).output_tokens for worker in fleet) for name in ("heavy", "light")
    }
    assert tokens["heavy"] / tokens["light"] == pytest.approx(3.0, rel=0.1)


def _observe(policy: Vtc, fleet: Fleet, now: float, *frames) -> None:
    for each in frames:
        fleet.merge(each, now)
    fleet.age(now)
    policy.observe(fleet, Tables(), now)
    fleet.settle()


def _two_workers(**rows) -> tuple[Vtc, Fleet]:
    """A fleet of w1, where `rows` are queued, and w2, where nobody is."""
    policy, fleet = vtc(), Fleet()
    _observe(policy, fleet, 0.0, frame("w1", "01A", 1), frame("w2", "01B", 1))
    queued = [row(name, queued=1, charged=charged) for name, charged in rows.items()]
    _observe(policy, fleet, 0.1, frame("w1", "01A", 2, *queued))
    return policy, fleet


def test_return_is_lifted_to_the_least_active_anywhere() -> None:
    """A tenant that comes to an idle worker is lifted to the least V of those that wait on another."""
    policy, fleet = _two_workers(a=500.0, b=300.0)
    _observe(policy, fleet, 0.2, frame("w2", "01B", 2, row("new", queued=1)))
    assert policy.virtual["new"] == 300.0


def test_a_visit_between_two_frames_is_a_return() -> None:
    """A request that was queued and admitted between two frames lifts its tenant, before it is charged."""
    policy, fleet = _two_workers(a=500.0, b=300.0)
    visit = row("new", running=1, charged=12.0, uncached_input_tokens_total=12)
    _observe(policy, fleet, 0.2, frame("w2", "01B", 2, visit))
    assert policy.virtual["new"] == 312.0


def test_a_tenant_that_waits_elsewhere_is_not_lifted() -> None:
    """A worker's own lift of a tenant that has requests queued on another worker does not move V."""
    policy, fleet = _two_workers(a=500.0, b=300.0)
    _observe(policy, fleet, 0.2, frame("w2", "01B", 2, row("b", queued=1, lift=450.0), row("a", queued=1)))
    assert policy.virtual == {"a": 500.0, "b": 300.0}
    assert policy.decide(0.2).ranks["w2"]["b"].base == 300.0 - 450.0


def test_a_worker_that_lifts_too_high_is_corrected() -> None:
    """A local lift above the fleet's floor is cut to the floor, and the base takes the rest back."""
    policy, fleet = _two_workers(a=500.0, b=300.0)
    _observe(policy, fleet, 0.2, frame("w2", "01B", 2, row("new", queued=1, lift=900.0)))
    assert policy.virtual["new"] == 300.0
    assert policy.decide(0.2).ranks["w2"]["new"].base == -600.0


def test_with_nobody_active_the_floor_is_who_left_last() -> None:
    """After everybody left, a newcomer starts where the last one to leave was."""
    policy, fleet = _two_workers(a=500.0, b=300.0)
    _observe(
        policy, fleet, 0.2, frame("w1", "01A", 3, row("a", charged=510.0), row("b", queued=1, charged=300.0))
    )
    _observe(policy, fleet, 0.3, frame("w1", "01A", 4, row("a", charged=510.0), row("b", charged=340.0)))
    _observe(policy, fleet, 0.4, frame("w2", "01B", 2, row("new", queued=1)))
    assert policy.virtual["new"] == 340.0


def test_a_restarted_worker_adds_and_never_subtracts() -> None:
    """A new incarnation counts from zero; V goes on from where it was, and the bases carry it over."""
    policy, fleet = _two_workers(a=500.0, b=300.0)
    _observe(policy, fleet, 1.0, frame("w1", "01C", 1), frame("w2", "01B", 2))
    assert policy.virtual == {"a": 500.0, "b": 300.0}
    assert {name: rank.base for name, rank in policy.decide(1.0).ranks["w1"].items()} == {
        "a": 500.0,
        "b": 300.0,
    }
    _observe(policy, fleet, 1.1, frame("w1", "01C", 2, row("a", base=500.0, charged=20.0, queued=1)))
    assert policy.virtual["a"] == 520.0


def test_a_new_leader_takes_over_the_order_that_workers_have() -> None:
    """A controller that starts later adopts the virtual times of ranked workers, lifts included."""
    policy, fleet = vtc(), Fleet()
    ranked = row("a", base=-40.0, charged=30.0, lift=90.0, queued=1)
    _observe(policy, fleet, 0.0, frame("w1", "01A", 5, ranked, row("b", base=7.0, charged=60.0, queued=1)))
    assert policy.virtual == {"a": 80.0, "b": 67.0}
    bases = {name: rank.base for name, rank in policy.decide(0.0).ranks["w1"].items()}
    assert bases == {"a": -40.0, "b": 7.0}


def test_idle_counters_below_the_floor_are_forgotten() -> None:
    """Tenants that nobody hears of any more do not fill memory; who is above the floor stays."""
    policy, fleet = vtc(), Fleet()
    _observe(policy, fleet, 0.0, frame("w1", "01A", 1))
    crowd = [row(f"t{n}", charged=1.0, uncached_input_tokens_total=1) for n in range(KEEP)]
    _observe(
        policy,
        fleet,
        0.1,
        frame("w1", "01A", 2, *crowd, row("rich", charged=90.0, uncached_input_tokens_total=1)),
    )
    assert len(policy.virtual) > KEEP
    busy = row("busy", queued=1, charged=50.0, uncached_input_tokens_total=1)
    _observe(policy, fleet, 0.2, frame("w1", "01A", 3, busy, full=False))
    assert set(policy.virtual) == {"rich", "busy"}
