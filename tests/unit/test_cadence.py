"""How often status comes, by what it costs the engine, and everything of it by what that costs the bus."""

from itertools import pairwise
from math import inf

import pytest

from coxswain.service.bus.board import FULL_SHARE, MAX_FULL_S, Board
from coxswain.service.scheduler.cadence import STATUS_SHARE, Cadence
from tests.support.engine import draft, frame


class Busy:
    """An engine that looks every 5 ms whether a frame is due, for ten minutes, and its bus.

    Args:
        cost_s: of what changed, to the engine.
        full_cost_s: of everything, to the bus.
        share: what frames may take of the engine.
    """

    def __init__(self, cost_s: float, full_cost_s: float, share: float = STATUS_SHARE) -> None:
        cadence, board = Cadence(0.05, 1.0, share), Board(1.0)
        board.take(draft(frame(), 1))
        self.frames: list[float] = []
        self.full: list[float] = []
        for tick in range(120_000):
            now = 1_000.0 + tick * 0.005
            if now < cadence.at:
                continue
            self.frames.append(now)
            cadence.sent(now, cost_s)
            if board.due(now):
                self.full.append(now)
                board.paid(now, full_cost_s)
        self.share = len(self.frames) * cost_s / (self.frames[-1] - self.frames[0])
        self.full_share = len(self.full) * full_cost_s / (self.full[-1] - self.full[0])


def longest(times: list[float]) -> float:
    """The longest time from one to the next."""
    return max(later - earlier for earlier, later in pairwise(times))


@pytest.mark.parametrize("full_cost_s", [0.0, 0.001, 0.01, 0.07, 1.0])
@pytest.mark.parametrize("cost_s", [0.0, 0.0002, 0.001, 0.008])
def test_frames_take_their_share_at_most(cost_s: float, full_cost_s: float) -> None:
    """However many rows a full frame has, and however much changes: 2 % of the engine, 5 % of the bus."""
    engine = Busy(cost_s, full_cost_s)
    assert engine.share <= STATUS_SHARE + cost_s / 300
    assert engine.full_share <= FULL_SHARE + full_cost_s / 300
    assert longest(engine.frames) <= 1.0


def test_cheap_frames_come_every_50_ms_and_full_ones_every_second() -> None:
    """What a worker with some hundred requests and tenants has: nothing is put off."""
    engine = Busy(0.0003, 0.003)
    assert longest(engine.frames) == pytest.approx(0.05, abs=0.006)
    assert longest(engine.full) == pytest.approx(1.0, abs=0.06)


def test_dear_full_frames_come_seldom_and_put_off_no_other() -> None:
    """65,000 tenants that were served once cost the bus 300 ms: everything every 6 s, what changes as soon as ever."""
    engine = Busy(0.0003, 0.3)
    assert longest(engine.full) == pytest.approx(6.0, abs=0.06)
    assert longest(engine.frames) == pytest.approx(0.05, abs=0.006)
    assert longest(Busy(0.0003, 5.0).full) == pytest.approx(MAX_FULL_S, abs=0.06)


def test_a_share_without_bound_is_a_clockwork() -> None:
    """Whatever frames cost in real time, in virtual time each comes when it is due."""
    engine = Busy(0.5, 0.0, share=inf)
    assert longest(engine.frames) == pytest.approx(0.05, abs=0.006)
    assert longest(engine.full) == pytest.approx(1.0, abs=0.06)
