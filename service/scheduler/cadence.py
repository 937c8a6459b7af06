"""When status frames are due: what costs little comes often, what costs much seldom. Pure: times are arguments.

Frames with what changed are small whatever a worker has. A full one lists every tenant that was ever served, tens of
thousands perhaps: it repairs what somebody missed, and there is time for that. Called by `steered.py`.
"""

from typing import Final

STATUS_SHARE: Final = 0.02
"""Part of the engine's time that status may take, half of which full frames may."""
MAX_FULL_S: Final = 30.0
"""A full frame comes that often whatever it costs."""


class Cadence:
    """Says which frame is due, from what the last ones cost.

    Args:
        interval_s: least time between two frames.
        full_interval_s: least time between full ones of a busy engine, and most between any two that are wanted.
        share: part of the engine's time that frames may take.
    """

    def __init__(self, interval_s: float, full_interval_s: float, share: float = STATUS_SHARE) -> None:
        self._interval_s = interval_s
        self._full_interval_s = full_interval_s
        self._share = share
        self._full_share = 0.0
        """What full frames take of it now."""
        self._full_at = 0.0
        self._again_at = 0.0
        """When a full frame has been paid for, if an engine that goes to sleep wants the next sooner."""
        self._said_at = 0.0
        self.at = 0.0
        """When the next frame may come (Unix s)."""

    def full(self, now: float, *, idle: bool) -> bool:
        """Whether a full frame is due. A sleeping engine's is repeated by the bus: it wants one as it goes to sleep."""
        return now >= (self._again_at if idle else self._full_at)

    def sent(self, now: float, cost_s: float, full_cost_s: float | None) -> None:
        """A frame went out.

        Args:
            now: when it was begun.
            cost_s: what the part with what changed took of the engine's thread.
            full_cost_s: what the full one behind it took, if there was one.
        """
        self._said_at = now
        if full_cost_s is not None:
            rest_s = min(2 * full_cost_s / self._share, MAX_FULL_S)
            self._again_at = now + rest_s
            self._full_at = now + max(self._full_interval_s, rest_s)
            self._full_share = min(self._share / 2, full_cost_s / self._full_interval_s)
        rest_s = min(cost_s / (self._share - self._full_share), self._full_interval_s)
        self.at = now + max(self._interval_s, rest_s)

    def wake_at(self, *, changed: bool) -> float:
        """When an engine that sleeps without a full frame's having said so must say something.

        `changed`: something is unsaid.
        """
        soon = self._said_at + self._full_interval_s
        return self.at if changed else max(self.at, min(self._again_at, soon))
