"""How often status comes, by what it costs."""

from itertools import pairwise
from math import inf

import pytest

from coxswain.service.scheduler.cadence import MAX_FULL_S, STATUS_SHARE, Cadence


class Busy:
    """An engine that looks every 5 ms whether a frame is due, for ten minutes.

    Args:
        cost_s: of what changed.
        full_cost_s: of everything.
        share: what frames may take.
    """

    def __init__(self, cost_s: float, full_cost_s: float, share: float = STATUS_SHARE) -> None:
        cadence = Cadence(0.05, 1.0, share)
        self.frames: list[float] = []
        self.full: list[float] = []
        self.spent_s = 0.0
        for tick in range(120_000):
            now = 1_000.0 + tick * 0.005
            if now < cadence.at:
                continue
            self.frames.append(now)
            full = cadence.full(now, idle=False)
            if full:
                self.full.append(now)
            self.spent_s += cost_s + full * full_cost_s
            cadence.sent(now, cost_s, full_cost_s if full else None)

    @property
    def share(self) -> float:
        """What frames took."""
        return self.spent_s / (self.frames[-1] - self.frames[0])


def longest(times: list[float]) -> float:
    """The longest time from one to the next."""
    return max(later - earlier for earlier, later in pairwise(times))


@pytest.mark.parametrize("full_cost_s", [0.0, 0.001, 0.01, 0.07, 0.25])
@pytest.mark.parametrize("cost_s", [0.0, 0.0002, 0.001, 0.008])
def test_frames_take_their_share_at_most(cost_s: float, full_cost_s: float) -> None:
    """However many rows a full frame has, and however much changes: 2 %, but for the first."""
    engine = Busy(cost_s, full_cost_s)
    assert engine.share <= STATUS_SHARE + (cost_s + full_cost_s) / 300
    assert longest(engine.frames) <= 1.0


def test_cheap_frames_come_every_50_ms_and_full_ones_every_second() -> None:
    """What a worker with some hundred requests and tenants has: nothing is put off."""
    engine = Busy(0.0003, 0.003)
    assert longest(engine.frames) == pytest.approx(0.05, abs=0.006)
    assert longest(engine.full) == pytest.approx(1.0, abs=0.06)


def test_dear_full_frames_come_seldom_and_put_off_no_other() -> None:
    """65,000 tenants that were served once cost 70 ms: everything every 7 s, and what changes as soon as ever."""
    engine = Busy(0.0003, 0.07)
    assert longest(engine.full) == pytest.approx(7.0, abs=0.06)
    assert longest(engine.frames) == pytest.approx(0.05, abs=0.006)
    assert longest(Busy(0.0003, 5.0).full) == pytest.approx(MAX_FULL_S, abs=0.06)


def test_a_share_without_bound_is_a_clockwork() -> None:
    """Whatever frames cost in real time, in virtual time each comes when it is due."""
    engine = Busy(0.5, 0.5, share=inf)
    assert longest(engine.frames) == pytest.approx(0.05, abs=0.006)
    assert longest(engine.full) == pytest.approx(1.0, abs=0.06)


def test_an_engine_that_goes_to_sleep_repeats_everything_once_it_is_paid_for() -> None:
    """Its bus needs a full frame to repeat; until one is paid for it says once a second that it lives."""
    cadence = Cadence(0.05, 1.0)
    cadence.sent(100.0, 0.0001, 0.002)
    assert not cadence.full(100.1, idle=True)
    assert cadence.full(100.2, idle=True)
    assert not cadence.full(100.2, idle=False)
    assert cadence.wake_at(changed=False) == pytest.approx(100.2)
    assert cadence.wake_at(changed=True) == pytest.approx(100.05)
    cadence.sent(101.0, 0.0001, 0.07)
    assert cadence.wake_at(changed=False) == pytest.approx(102.0)
    cadence.sent(107.5, 0.0001, None)
    assert cadence.wake_at(changed=False) == pytest.approx(108.0)
