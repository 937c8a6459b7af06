"""VTC over a fleet, against workers that charge and lift by the scheduler's own rule."""

import random as randomness
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coxswain.control.core import ControlCore, Inputs, Send
from coxswain.control.estimates.predict import MovingAverage
from coxswain.control.estimates.victims import Victims
from coxswain.control.fleet import Fleet
from coxswain.control.policies.vtc import KEEP, Vtc
from coxswain.control.policy import Tables
from coxswain.schemas.policy import TenantPolicy
from tests.support.frames import SmallWorker, frame, request, row

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
        for worker in self.workers:
            self.core.hear(self.now, worker.frame())
        inputs = Inputs(classes={}, tenants=self.tenants, epoch=EPOCH, answers=self._answers)
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


# Prediction


@settings(max_examples=60, deadline=None)
@given(periods, st.integers(1, 3))
def test_expectations_are_settled_in_the_end(script: list, workers: int) -> None:
    """Algorithm 3: whatever was expected, once all ended tenants were charged what they had (and lifts)."""
    fleet = [SmallWorker(f"w{n}", slots=2) for n in range(workers)]
    loop = Loop(fleet)
    loop.policy = loop.core.policy = Vtc(Vtc.Params(predict="average"))
    for number, (arrivals, steps) in enumerate(script):
        for tenant, input_tokens, output_tokens, times in arrivals:
            fleet[number % workers].arrive(tenant, input_tokens, output_tokens, times=times)
        loop.turn(steps)
    while any(worker.busy for worker in fleet):
        loop.turn(5)
    loop.turn(0)
    for tenant, virtual in loop.virtual.items():
        charged = sum(worker.account(tenant).charged for worker in fleet)
        had = sum(worker.account(tenant).input_tokens for worker in fleet)
        had += 2 * sum(worker.account(tenant).output_tokens for worker in fleet)
        assert charged == pytest.approx(had)
        # What is in V beyond the charges are lifts, and these never take anything away.
        assert virtual >= charged - 1e-6


def test_workers_are_told_what_to_expect_of_each_tenant() -> None:
    """After one request has ended the next is charged whole when it is admitted; little changes are not told."""
    worker = SmallWorker(slots=1)
    loop = Loop([worker])
    loop.policy = loop.core.policy = Vtc(Vtc.Params(predict="average"))
    worker.arrive("a", 10, 20, times=3)
    worker.arrive("b", 1, 1)
    loop.turn(19)
    loop.turn(1)
    loop.turn(1)
    expected = worker.account("a").expected_output
    assert 18 <= expected <= 20
    assert worker.account("b").expected_output == expected, "not known yet, so it is like the others"
    told = len(worker.got)
    loop.policy.lengths._expected["a"] *= 1.04
    loop.turn(0)
    assert not any(isinstance(each, Send) for each in worker.got[told:])
    loop.policy.lengths._expected["a"] *= 1.04
    loop.turn(0)
    assert worker.account("a").expected_output == pytest.approx(expected * 1.04**2)


def test_the_moving_average_learns_from_what_ended() -> None:
    """p = (4p + length) / 5, from the first length on."""
    average = MovingAverage()
    assert average.expect("a") == 0.0
    for length in (100, 50):
        average.learn(request("r", "a", output_tokens=length))
    assert average.expect("a") == (4 * 100 + 50) / 5


def test_who_is_not_known_yet_is_expected_to_be_like_the_others() -> None:
    """The mean of tenants, not of requests: one that asks often is one of them."""
    average = MovingAverage()
    for tenant, length in (("a", 100), ("a", 100), ("b", 50), ("a", 50)):
        average.learn(request("r", tenant, output_tokens=length))
    assert average.expect("b") == 50.0
    assert average.expect("new") == (90.0 + 50.0) / 2


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 1_000)), max_size=40), st.integers(1, 4))
def test_of_many_tenants_those_heard_of_last_have_an_average_of_their_own(
    ended: list[tuple[str, int]], known: int
) -> None:
    """Whoever is forgotten is like a new one, for all that follows; what is kept never grows beyond the bound."""
    average, lengths = MovingAverage(known), dict[str, float]()
    for tenant, length in ended:
        average.learn(request("r", tenant, output_tokens=length))
        old = lengths.pop(tenant, None)
        lengths[tenant] = float(length) if old is None else (4.0 * old + length) / 5.0
        lengths = dict(list(lengths.items())[-known:])
        mean = sum(lengths.values()) / len(lengths)
        for each in "abcde":
            assert average.expect(each) == pytest.approx(lengths.get(each, mean), abs=1e-6)


def test_long_outputs_are_charged_ahead_no_further_than_short_ones_wait() -> None:
    """Beside a tenant whose own are short, twice those; whole when it waits alone."""
    policy, fleet = _two_workers(long=0.0, short=0.0)
    policy.lengths = MovingAverage()
    for tenant, length in (("long", 500), ("short", 20)):
        policy.lengths.learn(request("r", tenant, output_tokens=length))
    rows = row("long", queued=1), row("short", queued=1)
    for seq, waiting, expected in ((2, rows, 2 * 20.0), (3, rows[:1], 500.0)):
        _observe(policy, fleet, seq / 10, frame("w1", "01A", seq, *waiting))
        assert policy.decide(seq / 10).ranks["w1"]["long"].expected_output == expected


# Preemption


def test_with_preemption_the_bound_of_who_cannot_is_beaten() -> None:
    """Theorem 4.8: another arrives when the batch is full of one tenant. By holding they differ by less than wq × M."""
    length, slots = 200, 4
    differ = {}
    for gap in (None, 20.0):
        worker = SmallWorker(slots=slots)
        loop = Loop([worker])
        loop.policy = loop.core.policy = Vtc(Vtc.Params(preempt_gap=gap))
        worker.arrive("first", 1, 1)
        loop.turn(2)
        worker.arrive("hog", 1, length, times=40)
        loop.turn(1)
        worker.arrive("late", 1, length, times=40)
        begin = {name: worker.account(name).charged for name in ("hog", "late")}
        gaps = []
        for _ in range(length):
            loop.turn(1)
            served = {name: worker.account(name).charged - begin[name] for name in begin}
            gaps.append(abs(served["hog"] - served["late"]))
        differ[gap] = max(gaps)
    assert differ[None] >= 2 * slots * (length - 5)
    assert differ[20.0] < differ[None] / 4


def test_who_is_held_goes_on_when_nobody_waits() -> None:
    """A hold serves somebody who waits; without such a one there is none."""
    worker = SmallWorker(slots=1)
    loop = Loop([worker])
    loop.policy = loop.core.policy = Vtc(Vtc.Params(preempt_gap=5.0))
    worker.arrive("hog", 1, 100)
    loop.turn(20)
    worker.arrive("late", 1, 3)
    for _ in range(10):
        loop.turn(1)
    assert worker.account("late").output_tokens == 3
    assert worker.account("hog").output_tokens < 100
    for _ in range(8):
        loop.turn(20)
    assert not worker.busy


def test_of_a_request_with_several_children_all_are_held_or_none() -> None:
    """The one with the least KV in all of its children is chosen, with all of them: a worker holds them together."""
    fleet = Fleet()
    rows = [request("two", "hog", child=n, output_tokens=4) for n in range(2)]
    rows += [request("one", "hog", output_tokens=30), request("new", "late", state="queued")]
    tenants = (row("hog", running=2), row("late", queued=1))
    fleet.merge(frame("w1", "01A", 1, *tenants, requests=tuple(rows)), 0.0)
    assert Victims(5.0).choose(fleet, {"hog": 9.0, "late": 0.0}) == {
        "w1": {("two", 0): "keep", ("two", 1): "keep"}
    }


# A fleet


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_shares_hold_over_eight_workers_with_skewed_arrivals(weight: float) -> None:
    """Two tenants backlogged on each of 8 workers, nine of ten requests of each on its own half: service by weight."""
    fleet = [SmallWorker(f"w{n}", slots=SLOTS) for n in range(8)]
    loop = Loop(fleet, {"heavy": TenantPolicy(weight=weight)})
    loop.turn()
    for number, worker in enumerate(fleet):
        many, few = ("heavy", "light") if number < 4 else ("light", "heavy")
        worker.arrive(many, INPUT, OUTPUT, times=9_000)
        worker.arrive(few, INPUT, OUTPUT, times=1_000)
    for _ in range(1_200):
        loop.turn()
    served = {
        name: sum(
            worker.account(name).input_tokens + 2 * worker.account(name).output_tokens for worker in fleet
        )
        for name in ("heavy", "light")
    }
    assert all(worker.account(name).queue for worker in fleet for name in ("heavy", "light"))
    assert served["heavy"] / served["light"] == pytest.approx(weight, rel=0.03)


frames_of = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from("ab"), st.integers(1, 50), st.integers(0, 9)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=120, deadline=None)
@given(frames_of, st.randoms(use_true_random=False))
def test_counters_survive_a_hostile_transport(script: list, random: randomness.Random) -> None:
    """Loss, repetition, reordering, delay and restarts: V ends as the sum of what all incarnations charged.

    Both tenants have something queued all the time, so that nothing but charges moves V. The last frame of each
    incarnation arrives: what a worker did after the last that was heard of it, and died, nobody can know.
    """
    policy, fleet = vtc(), Fleet()
    now, expected = 0.0, dict.fromkeys("ab", 0.0)
    lives: list[dict[str, float]] = [dict.fromkeys("ab", 0.0) for _ in range(3)]
    births, seqs = [0, 0, 0], [1, 1, 1]
    backlog: list = []

    def status(worker: int):
        rows = [row(name, charged=charged, queued=1) for name, charged in lives[worker].items()]
        seqs[worker] += 1
        return frame(f"w{worker}", f"01{births[worker]}", seqs[worker], *rows)

    _observe(policy, fleet, now, *(status(worker) for worker in range(3)))
    for worker, tenant, cost, fate in script:
        now += 0.05
        lives[worker][tenant] += cost
        expected[tenant] += cost
        last = status(worker)
        backlog.append(last)
        restarts = fate == 0 and worker > 0  # worker 0 keeps both tenants active throughout
        delivered = [last] if restarts or fate > 3 else []
        delivered += random.choices(backlog, k=fate % 3)
        if restarts:
            delivered.sort(key=lambda each: each is last)  # and nothing of it is newer
            births[worker] += 1
            lives[worker], seqs[worker] = dict.fromkeys("ab", 0.0), 0
        else:
            random.shuffle(delivered)
        _observe(policy, fleet, now, *delivered)
        fleet.validate()
    _observe(policy, fleet, now + 0.05, *(status(worker) for worker in range(3)))
    _observe(policy, fleet, now + 0.10, *random.choices(backlog, k=5))
    assert policy.virtual == pytest.approx(expected)
