"""The lab's figures against cases worked by hand, and against the definition written out."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coxswain.lab.life import Life
from coxswain.lab.metrics import TICKS, acc_diffs, measure, service_diffs
from coxswain.lab.trace import Arrival


def life(tenant="a", at=0.0, first=None, end=None, prompt=100, output=100, **more):
    """A request that was served from `first` to `end`, in full."""
    arrival = Arrival(at_s=at, tenant=tenant, prompt_tokens=prompt, output_tokens=output)
    return Life(arrival=arrival, first_token_s=first, finished_s=end, tokens=output if end else 0, **more)


def test_the_moments_are_nineteen_from_28_5_to_541_5_seconds():
    """T = 600 s, 20 parts after a warm-up of 30 s, the first moment left out."""
    assert len(TICKS) == 19
    assert TICKS[0] == 28.5
    assert TICKS[-1] == pytest.approx(541.5)


def test_a_tenant_that_got_less_than_another_and_than_it_asked_for_counts_with_the_lesser_lack():
    """By hand: window 28.5 to 88.5 s; a gets 300 weighted tokens, b 150 of 600 asked for in it."""
    lives = [
        life("a", at=40, first=50, end=60),  # 100 + 2 × 100 = 300, all of it in the window
        life("b", at=40, first=78.5, end=98.5),  # 300, half of it in the window
        life("b", at=41, first=200, end=210),  # asked for in the window, served later
    ]
    # a: min(0, |5 − 5|) = 0.  b: min(5 − 2.5, |10 − 2.5|) = 2.5 per second.
    assert service_diffs(lives, [28.5])[0] == pytest.approx(2.5)


def test_a_tenant_that_got_all_it_asked_for_lacks_nothing():
    """What it did not ask for is not held against the others."""
    lives = [life("a", at=40, first=50, end=60), life("b", at=40, first=50, end=60, prompt=10, output=10)]
    assert service_diffs(lives, [28.5])[0] == 0


def test_service_counts_evenly_between_first_token_and_end_and_from_the_warm_up_on():
    """By hand: 300 tokens from 20 to 40 s are 150 after 30 s; the other tenant has 300 by then."""
    lives = [life("a", first=20, end=40), life("b", first=45, end=50)]
    assert acc_diffs(lives, [28.5])[0] == pytest.approx(150)
    assert acc_diffs(lives, [15.0])[0] == pytest.approx(150)  # until 45 s: a has 150, b none


def test_what_was_refused_counts_nowhere_but_in_n():
    """A refused request is not done, and changes no figure."""
    served = [life("a", at=40, first=50, end=60), life("b", at=40, first=50, end=60)]
    whole, more = measure(served), measure([*served, life("b", at=41, refused=True)])
    assert (more.n, more.done) == (3, 2)
    assert (more.max_diff, more.throughput, more.total_s) == (whole.max_diff, whole.throughput, whole.total_s)
    assert more.tenants["b"].n == 2
    assert more.tenants["b"].done == 1


def test_throughput_is_all_tokens_of_what_is_done_per_second_until_the_last():
    """By hand: two requests of 200 tokens each in 80 s."""
    assert measure([life("a", first=1, end=40), life("b", first=1, end=80)]).throughput == pytest.approx(
        400 / 80
    )


def test_first_token_latency_is_per_tenant_from_arrival():
    """By hand: 10 and 30 s for a; b waits for ever."""
    metrics = measure(
        [life("a", at=0, first=10, end=20), life("a", at=10, first=40, end=50), life("b", at=0)]
    )
    assert metrics.tenants["a"].mean_s == 20
    assert metrics.tenants["a"].p50_s == 20
    assert metrics.tenants["b"].mean_s is None


def test_an_empty_run_has_figures():
    """Nothing done is no division by nothing."""
    metrics = measure([life("a", refused=True)])
    assert (metrics.n, metrics.done, metrics.max_diff, metrics.throughput) == (1, 0, 0, 0)


def _written_out(lives, tick):
    """The definition, loop by loop, as in the authors' program."""
    low, high = tick + 30 - 30, tick + 30 + 30
    names = sorted({each.arrival.tenant for each in lives})
    served, asked = [], []
    for name in names:
        s = r = 0.0
        for each in lives:
            if each.arrival.tenant != name:
                continue
            if low <= each.arrival.at_s <= high:
                r += each.arrival.prompt_tokens + 2 * each.arrival.output_tokens
            if each.finished_s < 1 or each.finished_s - each.first_token_s < 1e-5:
                continue
            overlap = max(min(high, each.finished_s) - max(low, each.first_token_s), 0)
            s += each.arrival.cost * overlap / (each.finished_s - each.first_token_s)
        served.append(s / 60)
        asked.append(r / 60)
    total = 0.0
    for mine, wish in zip(served, asked, strict=True):
        total += min(max(served) - mine, mine - wish if wish < mine else wish - mine)
    return total


LIVES = st.lists(
    st.builds(
        lambda tenant, at, wait, run, prompt, output: life(
            tenant, at, at + wait, at + wait + run, prompt, output
        ),
        st.sampled_from("abc"),
        st.floats(0, 600),
        st.floats(0, 60),
        st.one_of(st.just(0.0), st.floats(0.01, 90)),
        st.integers(1, 1000),
        st.integers(1, 1000),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(LIVES)
def test_the_arrays_say_what_the_definition_says(lives):
    """Vectorised and written out agree at every moment, for any requests."""
    assert np.allclose(service_diffs(lives), [_written_out(lives, tick) for tick in TICKS])
    assert all(math.isfinite(value) for value in acc_diffs(lives))
