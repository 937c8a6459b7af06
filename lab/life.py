"""What became of a request: when it got its first token, when it ended, and in which state it was when.

Pure data, filled by `engine`, read by `metrics`, `report` and `plots`. Times in seconds since traffic began.
"""

from typing import Final

import msgspec

from coxswain.lab.trace import Arrival

QUEUED: Final = "queued"
RUNNING: Final = "running"
HELD: Final = "held"
ENDED: Final = "ended"


class Life(msgspec.Struct, kw_only=True):
    """One request, from arrival to end."""

    arrival: Arrival
    worker: str = ""
    """Which engine had it; empty for one that was refused."""
    tokens: int = 0
    """Output tokens delivered."""
    first_token_s: float | None = None
    finished_s: float | None = None
    refused: bool = False
    """Turned away or aborted: it is not done, whatever it got."""
    preempted: int = 0
    """Times that it lost its place while running."""
    states: list[tuple[float, str]] = []
    """Since when it was in which state, in order."""

    @property
    def done(self) -> bool:
        """Whether it was delivered all that it asked for."""
        return self.finished_s is not None and not self.refused

    @property
    def ttft_s(self) -> float | None:
        """First-token latency."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival.at_s

    @property
    def latency_s(self) -> float | None:
        """From arrival to the last token."""
        return None if self.finished_s is None else self.finished_s - self.arrival.at_s

    def enter(self, at_s: float, state: str) -> None:
        """It is in this state from now on."""
        if not self.states or self.states[-1][1] != state:
            if state == QUEUED and self.states and self.states[-1][1] == RUNNING:
                self.preempted += 1
            self.states.append((at_s, state))

    def spans(self) -> list[tuple[float, float, str]]:
        """From, until, state: all but the end."""
        ends = [at_s for at_s, _ in self.states[1:]]
        return [(since, until, state) for (since, state), until in zip(self.states, ends, strict=False)]
