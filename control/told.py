"""What one worker was told by this leader, and patience with it. Pure; called by `core` and `requests`.

Status says what a worker has; it may be a frame period and more behind a command that was just applied. Until it
could show it, what was told counts as there.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Final

import msgspec

from coxswain.control.policy import Cap, Group, Kv
from coxswain.schemas.policy import Prices, TenantRank

ECHO_S: Final = 1.5
"""How long a worker's status may lag behind a command that it applied: what changed is said within a second."""
ANSWER_S: Final = 2.0
"""A command without an answer by then counts as failed."""
FIRST_RETRY_S: Final = 0.25
MAX_RETRY_S: Final = 4.0
"""Bounds of the doubling wait after a command that failed."""


class Retry(msgspec.Struct):
    """Patience about one verb: the commands in flight, since when, and how long to wait after a failure."""

    pending: set[str] = set()
    """Their ids."""
    sent_at: float = 0.0
    failed: bool = False
    ready_at: float = 0.0
    wait_s: float = FIRST_RETRY_S

    def overdue(self, now: float) -> bool:
        """Whether there was no answer for too long."""
        return bool(self.pending) and now - self.sent_at > ANSWER_S

    def close(self, now: float, *, ok: bool) -> None:
        """Nothing is in flight any more."""
        self.pending.clear()
        self.failed = False
        self.ready_at = now if ok else now + self.wait_s
        self.wait_s = FIRST_RETRY_S if ok else min(MAX_RETRY_S, self.wait_s * 2)


class Told(msgspec.Struct):
    """What one incarnation of a worker was told by this leader; each with the time when."""

    incarnation: str
    ranks: dict[str, TenantRank] = {}
    ranks_at: dict[str, float] = {}
    """When each was told."""
    prices: Prices | None = None
    config: tuple[str, float] = ("", 0.0)
    """Digest of the tables."""
    part: tuple[str, str] = ("", "")
    """Tables of which it took all but fields that it does not know: their digest, and the one that it reports since,
    empty until its status could show it."""
    ranked_at: float = float("-inf")
    places: dict[str, tuple[int, str, float]] = {}
    """Per request, priority and class."""
    holds: dict[str, tuple[Kv | None, float]] = {}
    """Per request. None: it was continued."""
    caps: dict[Group, tuple[Cap | None, float]] = {}
    inherited: bool = True
    """Whether caps of an earlier leader may still be in force there."""
    asked_at: float = float("-inf")
    """For its queue."""
    retries: defaultdict[str, Retry] = msgspec.field(default_factory=lambda: defaultdict(Retry))
    """Per verb."""

    def told_at(self, tenant: str) -> float:
        """When its rank was told last."""
        return self.ranks_at.get(tenant, float("-inf"))

    def rank(self, rows: Mapping[str, TenantRank], now: float) -> None:
        """These ranks are told."""
        self.ranks.update(rows)
        self.ranks_at.update(dict.fromkeys(rows, now))

    def wants(self, config: str, reported: str, now: float) -> bool:
        """Whether these tables would be news to a worker that reports others."""
        if self.config[0] == config and now - self.config[1] < ECHO_S:
            return False
        if self.part[0] != config:
            return True
        self.part = (config, self.part[1] or reported)
        return self.part[1] != reported

    def ready(self, verb: str, now: float) -> bool:
        """Whether more commands of the verb may go out; those that nobody answers for too long have failed."""
        retry = self.retries[verb]
        if retry.overdue(now):
            retry.close(now, ok=False)
            self._failed(verb)
        return not retry.pending and now >= retry.ready_at

    def sent(self, verb: str, command_id: str, now: float) -> None:
        """One more is under way."""
        retry = self.retries[verb]
        retry.pending.add(command_id)
        retry.sent_at = now

    def answered(self, verb: str, command_id: str, now: float, *, ok: bool, partly: bool = False) -> None:
        """Take an answer; the last one decides when the next command may go. One that comes too late says nothing.

        Args:
            verb: of the command, as are the id and the answer.
            command_id: its.
            now: when it came.
            ok: whether the command was applied.
            partly: but for fields that the worker does not know.
        """
        retry = self.retries[verb]
        if command_id not in retry.pending:
            return
        retry.pending.discard(command_id)
        retry.failed |= not ok
        if not retry.pending:
            retry.close(now, ok=not retry.failed)
        if not ok:
            self._failed(verb)
        elif partly and verb == "configure":
            self.part = (self.config[0], "")

    def _failed(self, verb: str) -> None:
        """A command was not applied, or nobody knows: what it told counts as never said."""
        match verb:
            case "configure":
                self.config = ("", 0.0)
            case "rank":
                self.ranks.clear()
                self.ranks_at.clear()
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
        assert self.ranks.keys() == self.ranks_at.keys()
        for retry in self.retries.values():
            assert FIRST_RETRY_S <= retry.wait_s <= MAX_RETRY_S
