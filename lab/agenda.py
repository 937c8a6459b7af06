"""Virtual time: what happens next, and what time it is then.

Pure: no sleeping, no clock of the machine. Everything else in the laboratory is a callback that stands here for a
moment to come. Two of the same moment run in the order in which they were entered, so a run is the same each time.
"""

import heapq
from collections.abc import Callable
from typing import Final

START: Final = float(2**20)
"""Virtual Unix seconds when traffic begins. Not 0, so that no timestamp is false; a power of two, so that times
keep their digits."""


class Agenda:
    """Moments to come, in order.

    Args:
        now: the time when it is made, in virtual Unix seconds.
    """

    def __init__(self, now: float) -> None:
        self.now = now
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._entered = 0

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Run `call` at that time; now, if that has passed."""
        self._entered += 1
        heapq.heappush(self._heap, (max(when, self.now), self._entered, call))

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Run `call` when that much time has passed."""
        self.at(self.now + delay_s, call)

    def step(self) -> bool:
        """Let the next thing happen; False if there is none."""
        if not self._heap:
            return False
        self.now, _, call = heapq.heappop(self._heap)
        call()
        return True
