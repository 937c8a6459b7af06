"""Andes: what quality is, what serving is worth, and that the batch fits."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coxswain.control.estimates.qoe import Reader, quality
from coxswain.control.fleet import Fleet
from coxswain.control.policies.andes import FULL, LATER, NOW, Andes
from coxswain.control.policy import Tables
from coxswain.schemas.policy import ClassPolicy
from coxswain.schemas.status import KvBlocks, Slots
from tests.support.frames import frame, request, row

gaps = st.lists(st.floats(0.0, 3.0), min_size=1, max_size=30)


def test_a_stream_that_is_never_late_has_quality_one() -> None:
    """Being faster than the reader brings nothing more."""
    assert quality([0.5, 0.6, 0.7], ttft_s=1.0, speed=2.0) == 1.0
    assert quality([1.0, 1.5, 2.0], ttft_s=1.0, speed=2.0) == 1.0


def test_quality_by_hand() -> None:
    """Two tokens 3 s late at one per second: (3 − …) areas counted by hand: 3 of 9 token-seconds are left."""
    # Expected at 1 and 2, read at 4 and 5, end 6: read (6 − 4) + (6 − 5) = 3 of (6 − 1) + (6 − 2) = 9.
    assert quality([4.0, 4.0], ttft_s=1.0, speed=1.0) == pytest.approx(3.0 / 9.0)


@given(gaps, st.floats(0.1, 5.0))
def test_a_stream_that_comes_later_is_no_better(times: list[float], by: float) -> None:
    """Quality is between 0 and 1, and delay of all of it costs or costs nothing."""
    at, arrivals = 0.0, []
    for gap in times:
        at += gap
        arrivals.append(at)
    before = quality(arrivals, ttft_s=1.0, speed=2.0)
    after = quality([each + by for each in arrivals], ttft_s=1.0, speed=2.0)
    assert 0.0 < after <= before + 1e-9 <= 1.0 + 1e-9


@given(st.lists(st.tuples(st.floats(0.0, 2.0), st.integers(0, 8)), max_size=20))
def test_a_reader_reads_no_faster_than_it_can_and_no_more_than_there_is(events: list) -> None:
    """At every look what was read is within what was delivered and what the speed allows."""
    reader, at, delivered = Reader(1.0, 4.0), 0.0, 0
    for took, tokens in events:
        at += took
        delivered += tokens
        reader.look(at, delivered)
        assert reader.read <= reader.delivered + 1e-9
        assert reader.read <= 4.0 * at + 1e-9
        assert reader.read_area <= 4.0 * at**2 / 2.0 + 1e-9


@given(st.floats(0.0, 20.0), st.floats(0.0, 20.0), st.integers(0, 100))
def test_who_has_more_to_read_gains_less(more: float, at: float, tokens: int) -> None:
    """The worth of serving falls with what lies ready, and is between 0 and 1."""
    short, long = Reader(1.0, 4.0), Reader(1.0, 4.0)
    short.look(at, tokens)
    long.look(at, tokens + more)
    assert 0.0 <= long.gain(5.0) <= short.gain(5.0) <= 1.0


def choose(*requests: Any, slots: int, blocks: int, queued: int = 1, **settings: Any) -> dict[str, int]:
    """What andes makes of one worker at 100 s, by request."""
    policy, fleet = Andes(Andes.Params(every_s=0.0, **settings)), Fleet()
    fleet.merge(
        frame(
            "w1", "01A", 1, row("a", queued=queued), requests=requests, queued=queued,
            slots=Slots(active=slots, total=slots, running=0, held=0),
            kv_blocks=KvBlocks(total=blocks, used=0, held=0),
        ), 100.0,
    )  # fmt: skip
    fleet.age(100.0)
    policy.observe(fleet, Tables({"default": ClassPolicy()}), 100.0)
    return {key[0]: each for key, each in policy.decide(100.0).priorities["w1"].items()}


def test_who_is_ahead_of_its_reader_makes_way() -> None:
    """A running request with a minute's reading ready gives its place to one that has nothing."""
    ahead = request("ahead", arrived_at=95.0, output_tokens=300)
    new = request("new", arrived_at=99.5, state="queued")
    assert choose(ahead, new, slots=1, blocks=1_000) == {"ahead": LATER, "new": NOW}


def test_without_anybody_waiting_nobody_is_moved() -> None:
    """Preemption is for when there is not room for all: priorities stay as requests come with them."""
    ahead = request("ahead", arrived_at=95.0, output_tokens=300)
    assert choose(ahead, slots=1, blocks=1_000, queued=0) == {"ahead": LATER}


sizes = st.lists(
    st.tuples(st.integers(1, 300), st.integers(0, 200), st.sampled_from(["running", "held", "queued"])),
    min_size=1,
    max_size=12,
)


@given(sizes, st.integers(1, 6), st.integers(1, 40))
def test_the_batch_fits(these: list, slots: int, blocks: int) -> None:
    """No more than there are slots; nobody without KV is let in beyond what KV there is."""
    requests = [
        request(
            f"r{n}", prompt_tokens=prompt, output_tokens=tokens, arrived_at=90.0,
            state=state, kv="parked" if state == "held" else "none",
        )
        for n, (prompt, tokens, state) in enumerate(these)
    ]  # fmt: skip
    chosen = choose(*requests, slots=slots, blocks=blocks)
    batch = [each for each in requests if chosen[each.request] == NOW]
    assert len(batch) <= slots
    new = [each for each in batch if each.state == "queued"]
    size = {each.request: each.prompt_tokens + each.output_tokens + 1 for each in requests}
    assert sum(size[each.request] for each in new) <= FULL * blocks * 16


def test_a_full_cache_lets_nobody_in() -> None:
    """A newcomer waits while others have the KV, though it is worth more: theirs would be computed again some day."""
    new = request("new", arrived_at=99.5, prompt_tokens=100, state="queued")
    old = [
        request(f"r{n}", arrived_at=50.0, prompt_tokens=100, output_tokens=300, state="held", kv="parked")
        for n in range(4)
    ]
    assert choose(*old, new, slots=6, blocks=100)["new"] == LATER
    assert choose(*old, new, slots=6, blocks=200)["new"] == NOW
