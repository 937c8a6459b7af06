"""What one worker was told by this leader, and patience with it. Pure; called by `core` and `requests`.

Status says what a worker has; it may be a frame period and more behind a command that was just applied. Until it
could show it, what was told counts as there.
"""

from collections import defaultdict
from typing import Final

import msgspec

from coxswain.control.fleet import RequestKey
from coxswain.control.policy import Cap, Group, Kv
from coxswain.schemas.policy import Prices, TenantRank

ECHO_S: Final = 1.5
"""How long a worker's status may lag behind a command that it applied; a full frame comes every second."""
ANSWER_S: Final = 2.0
"""A command without an answer by then counts as failed."""
FIRST_RETRY_S: Final = 0.25
MAX_RETRY_S: Final = 4.0
"""Bounds of the doubling wait after a command that failed."""


class Retry(msgspec.Struct):
    """Patience about one verb: how many are in flight since when, and how long to wait after a failure."""

    pending: int = 0
    sent_at: float = 0.0
    failed: bool = False
    ready_at: float = 0.0
    wait_s: float = FIRST_RETRY_S

    def ready(self, now: float) -> bool:
        """Whether more commands may go out; no answer for too long is a failure."""
        if self.pending and now - self.sent_at > ANSWER_S:
            self._close(now, ok=False)
        return not self.pending and now >= self.ready_at

    def sent(self, now: float) -> None:
        """One more is under way."""
        self.pending += 1
        self.sent_at = now

    def answered(self, now: float, *, ok: bool) -> None:
        """Take an answer; the last one decides when the next command may go."""
        if not self.pending:
            return  # too late: it was given up
        self.pending -= 1
        self.failed |= not ok
        if not self.pending:
            self._close(now, ok=not self.failed)

    def _close(self, now: float, *, ok: bool) -> None:
        self.pending, self.failed = 0, False
        self.ready_at = now if ok else now + self.wait_s
        self.wait_s = FIRST_RETRY_S if ok else min(MAX_RETRY_S, self.wait_s * 2)


class Said(msgspec.Struct, frozen=True, gc=False):
    """A rank, and when it was told."""

    rank: TenantRank
    at: float


class Told(msgspec.Struct):
    """What one incarnation of a worker was told by this leader; each with the time when."""

    incarnation: str
    ranks: dict[str, Said] = {}
    prices: Prices | None = None
    config: tuple[str, float] = ("", 0.0)
    """Digest of the tables."""
    ranked_at: float = float("-inf")
    places: dict[RequestKey, tuple[int, str, float]] = {}
    """Priority and class."""
    holds: dict[RequestKey, tuple[Kv | None, float]] = {}
    """None: it was continued."""
    caps: dict[Group, tuple[Cap, float]] = {}
    inherited: bool = True
    """Whether caps of an earlier leader may still be in force there."""
    asked_at: float = float("-inf")
    """For its queue."""
    retries: defaultdict[str, Retry] = msgspec.field(default_factory=lambda: defaultdict(Retry))
    """Per verb."""

    def failed(self, verb: str) -> None:
        """A command was not applied, or nobody knows: what it told counts as never said."""
        match verb:
            case "configure":
                self.config = ("", 0.0)
            case "rank":
                self.ranks.clear()
                self.prices = None
            case "prioritize":
                self.places.clear()
            case "preempt" | "continue":
                self.holds.clear()
            case "limit":
                self.caps.clear()
                self.inherited = True

    def validate(self) -> None:
        """Check every invariant; raises AssertionError."""
        assert self.incarnation
        for retry in self.retries.values():
            assert retry.pending >= 0
            assert FIRST_RETRY_S <= retry.wait_s <= MAX_RETRY_S
