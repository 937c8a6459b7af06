"""VTC's theorems on runs of the real scheduler, and what steering adds to VTC there."""

from itertools import pairwise

import msgspec
import numpy as np
import pytest

from coxswain.control.policy import Tables
from coxswain.lab.bound import gap
from coxswain.lab.devices import DEVICES
from coxswain.lab.experiment import run
from coxswain.lab.life import Life
from coxswain.lab.metrics import measure
from coxswain.lab.setup import Setup
from coxswain.lab.suites import SUITES, adversary, poisson, steady
from coxswain.lab.trace import Arrival, ordered
from coxswain.schemas.policy import ClassPolicy, TenantPolicy

pytestmark = pytest.mark.vllm

WEIGHTS = Tables(tenants={f"c{n}": TenantPolicy(weight=n + 1.0) for n in range(4)})


def small(kv_tokens):
    """The device of the suites with a smaller pool: what takes minutes there takes seconds here."""
    device = DEVICES["vtc-a10g"]
    return msgspec.structs.replace(device, preset=msgspec.structs.replace(device.preset, kv_tokens=kv_tokens))


def overload(duration_s, rates, **settings):
    """Tenants that ask for more than there is, 256 tokens in and out; and how it went."""
    arrivals = ordered(steady(rates, duration_s)(np.random.RandomState(42)))
    setup = Setup(admission="reserve", device=small(4_000), **settings)
    outcome = run(arrivals, setup)
    assert all(life.done for life in outcome.lives)
    return gap(outcome.lives, setup)


def life(tenant, *states, tokens=10, prompt=5):
    """A request that was in these states, and got its first token when it ran first."""
    runs = [at_s for at_s, state in states if state == "running"]
    return Life(
        arrival=Arrival(at_s=states[0][0], tenant=tenant, prompt_tokens=prompt, output_tokens=tokens),
        tokens=tokens, first_token_s=runs[0], finished_s=states[-1][0], states=list(states),
    )  # fmt: skip


QUEUE = (
    life("a", (0.0, "queued"), (1.0, "running"), (9.0, "ended")),
    life("a", (0.0, "queued"), (10.1, "running"), (12.0, "ended")),
    life("b", (0.5, "queued"), (10.0, "running"), (12.0, "ended")),
)


# The measure


def test_who_waits_while_another_is_served_falls_behind_by_that():
    """By hand: b waits from 0.5 to 10, in which a gets 5 in and 10 out, and has another that waits."""
    found = gap(QUEUE, Setup())
    assert (found.most, found.between) == (5 + 2 * 10, ("a", "b"))
    assert (found.together_s, found.uneven) == (9.5, 1.0)


def test_what_is_got_alone_counts_for_nothing():
    """Nobody is unfair to who does not wait."""
    lives = [
        life("a", (0.0, "queued"), (0.1, "running"), (9.0, "ended")),
        life("b", (2.0, "queued"), (2.1, "running"), (9.0, "ended")),
    ]
    assert gap(lives, Setup()).between is None


def test_a_weight_divides_what_was_served():
    """25 with weight 5 is 5."""
    tables = Tables(tenants={"a": TenantPolicy(weight=5.0)})
    assert gap(QUEUE, Setup(tables=tables)).most == 25 / 5


def test_nothing_is_served_while_held():
    """Of 10 tokens 5 came before a hold of 90 s and 5 after it: b, who waits in it alone with a, sees none of them."""
    held = life(
        "a", (0.0, "queued"), (1.0, "running"), (6.0, "held"), (96.0, "running"), (101.0, "ended"), prompt=1
    )
    lives = [
        held,
        life("a", (7.0, "queued"), (95.0, "running"), (99.0, "ended")),
        life("b", (7.0, "queued"), (95.0, "running"), (99.0, "ended")),
    ]
    assert gap(lives, Setup()).most == pytest.approx(0.0, abs=1e-6)


# The theorems


@pytest.mark.parametrize("policy", ["vtc", "vtc-oracle"])
def test_backlogged_tenants_are_never_further_apart_than_2u(policy):
    """Theorem 4.4; with an oracle they are within what two requests cost, where all cost the same."""
    found = overload(30, (1.0, 2.0), policy=policy)
    assert found.between == ("c0", "c1")
    assert found.together_s > 30
    assert 0 < found.most <= found.bound == 2 * 2 * 4_000
    if policy == "vtc-oracle":
        assert found.most <= 2 * (256 + 2 * 256)


def test_fcfs_breaks_the_bound():
    """Else the check would say nothing: it serves by what is asked."""
    found = overload(25, (0.5, 5.0), policy="fcfs")
    assert found.most > found.bound == 16_000


def test_service_is_in_proportion_to_weights_while_all_are_backlogged():
    """1 : 2 : 3 : 4 within 2 %."""
    found = overload(50, (0.4, 0.8, 1.2, 1.6), tables=WEIGHTS, policy="vtc", settings=("predict=average",))
    assert found.together_s > 60
    assert found.uneven <= 0.02


def test_who_cannot_preempt_shows_what_theorem_4_8_says_and_who_can_does_not():
    """A tenant comes when another has just filled the batch: wq × M without preemption, a fraction with it."""
    suite = SUITES["adversary"]
    arrivals = ordered(adversary(25, (1, 256))(np.random.RandomState(1)))
    found, speed = {}, {}
    for settings in ((), ("preempt_gap=500",)):
        setup = Setup(policy="vtc", settings=settings, device=DEVICES[suite.device])
        lives = run(arrivals, setup).lives
        assert all(each.done for each in lives)
        found[settings], speed[settings] = gap(lives, setup), measure(lives).throughput
    without, preempting = found.values()
    # But for the one token of input that a request must have.
    assert without.most >= without.lower * 0.99
    assert preempting.most < without.lower / 3
    assert preempting.bound == without.bound


# What steering adds


def test_a_bounded_crowd_keeps_its_kv():
    """Short prompts with long outputs: vLLM lets all in and throws them out again; bounded, it hardly has to.

    The more of the pool is left for what those that run will have, the fewer lose theirs, and the fewer run.
    """
    arrivals = [
        Arrival(at_s=0.3 * n, tenant="ab"[n % 2], prompt_tokens=20, output_tokens=150 + 50 * (n % 5))
        for n in range(80)
    ]
    runs = {
        settings: measure(run(arrivals, Setup(policy="vtc", settings=settings, device=small(4_000))).lives)
        for settings in ((), ("fill=0.85",), ("fill=0.75",))
    }
    free, bounded, low = runs.values()
    assert free.done == bounded.done == low.done == 80
    assert free.preempted > 20
    assert bounded.preempted < free.preempted / 2
    assert bounded.throughput > 0.98 * free.throughput
    assert low.preempted < free.preempted / 10
    assert low.throughput > 0.95 * free.throughput


def test_a_bound_on_several_classes_holds_hardly_anybody():
    """Chat and a batch share it: bounded by what the other runs at the moment, they would be held in turns.

    A bound that stops at what runs is older than what has entered since: that one is held for a moment.
    """
    names = ("chat", "bulk")
    arrivals = [
        Arrival(at_s=number / 6, tenant=tenant, class_=tenant, prompt_tokens=128, output_tokens=192)
        for number in range(160)
        for tenant in ((names[0],) if number % 3 == 0 else (names[1],) * (number % 3))
    ]
    tables = Tables(
        {name: ClassPolicy(position=place) for place, name in enumerate(names)},
        {name: TenantPolicy(class_=name) for name in names},
    )
    setup = Setup(policy="vtc", settings=("fill=0.75",), device=DEVICES["vtc-a10g"], tables=tables)
    outcome = run(arrivals, setup)
    assert all(life.done for life in outcome.lives)
    assert sum(state == "held" for life in outcome.lives for _, _, state in life.spans()) < 10
    assert measure(outcome.lives).held_s < 2.0


def test_with_prediction_short_outputs_are_not_served_in_bursts_between_long_ones():
    """Charged ahead whole, long ones are let in together until they have all slots, and end together."""
    arrivals = ordered(poisson((20.0, 4.0), 12, (128, 8), (8, 128))(np.random.RandomState(42)))
    pauses = {}
    for settings in ((), ("predict=average",)):
        setup = Setup(policy="vtc", settings=settings, admission="reserve", device=small(1_500))
        lives = run(arrivals, setup).lives
        assert all(each.done for each in lives)
        short, long = (
            sorted(each.first_token_s for each in lives if each.arrival.tenant == name)
            for name in ("c0", "c1")
        )
        pauses[settings] = max(later - at for at, later in pairwise(short) if later <= long[-1])
    plain, predicting = pauses.values()
    assert predicting < 1.5 * plain


def test_prediction_costs_nobody_who_asks_for_less_than_its_share():
    """It comes back again and again to a tenant that is charged ahead, and waits no longer for that than without."""
    arrivals = ordered(steady((0.25, 1.0), 80)(np.random.RandomState(42)))
    waits, apart = {}, {}
    for settings in ((), ("predict=average",)):
        setup = Setup(policy="vtc", settings=settings, admission="reserve", device=small(4_000))
        lives = run(arrivals, setup).lives
        assert all(each.done for each in lives)
        waits[settings] = measure(lives).tenants["c0"].mean_s
        apart[settings] = gap(lives, setup).most
    plain, predicting = waits.values()
    assert predicting < 1.1 * plain
    assert apart["predict=average",] <= apart[()]
