"""When status frames are due: what costs little comes often, what costs much seldom. Pure: times are arguments.

What a frame costs the engine is what changed since the last one, whatever a worker has. Called by `steered.py`. When a
frame has everything is the bus's to say (`bus/board.py`): the engine tells nothing for it.
"""

from typing import Final

STATUS_SHARE: Final = 0.02
"""Part of the engine's time that status may take."""


class Cadence:
    """Says when a frame is due, from what the last one cost.

    Args:
        interval_s: least time between two frames.
        longest_s: most time between two that are wanted, whatever they cost.
        share: part of the engine's time that frames may take.
    """

    def __init__(self, interval_s: float, longest_s: float, share: float = STATUS_SHARE) -> None:
        self._interval_s = interval_s
        self._longest_s = longest_s
        self._share = share
        self.at = 0.0
        """When the next frame may come (Unix s)."""

    def sent(self, now: float, cost_s: float) -> None:
        """A frame that was begun `now` went out, and took so much of the engine's thread."""
        self.at = now + max(self._interval_s, min(cost_s / self._share, self._longest_s))
