"""Groups of requests that have caps: a tenant over all its classes, a class over all its tenants. Pure.

Here: the counts by state, how long the oldest has waited, and the caps in force. Who sets the caps is `limits.py`; who
counts is `roster.py`. A tenant's group is its account (`tenants.py`); a class's is `ClassGroup`.
"""

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from coxswain.schemas.policy import ClassPolicy
from coxswain.service.scheduler.states import QUEUED

if TYPE_CHECKING:
    from coxswain.service.scheduler.lines import ClassLine
    from coxswain.service.scheduler.record import Record


class Caps(NamedTuple):
    """Caps on one tenant or class; None is no cap."""

    max_running: int | None = None
    max_queued: int | None = None
    max_prefill_tokens_per_step: int | None = None

    def strictest(self, other: "Caps") -> "Caps":
        """The lower of each."""
        return Caps(*(stricter(mine, theirs) for mine, theirs in zip(self, other, strict=True)))

    def difference(self, before: "Caps") -> str:
        """What is other than before, for people: `max_running=4 max_queued=none`."""
        return " ".join(
            f"{name}={'none' if value is None else value}"
            for name, value, old in zip(self._fields, self, before, strict=True)
            if value != old
        )


NO_CAPS = Caps()


def stricter(one: int | None, other: int | None) -> int | None:
    """The lower of two caps, of which None is none."""
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


class Group:
    """What a tenant's and a class's requests have in common: how many wait, run and are held, and how many may run."""

    __slots__ = (
        "_joined", "_since", "borrowing", "busy", "held", "max_prefill_tokens_per_step", "max_queued", "max_running",
        "name", "queued", "reordered", "running",
    )  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.queued = self.running = self.held = 0
        # Who joined and when, oldest first, in two rows for the memory's sake. An entry whose request left since, or
        # left and waits anew, is stale; one that was put back after a look has two entries that mean the same.
        self._joined: deque[Record] = deque()
        self._since: deque[float] = deque()
        self.reordered = False
        """Whether the entries may be in another order than that of time."""
        self.borrowing = 0
        """Those of the running whose class may borrow."""
        self.busy = False
        """Whether the prompts of it that run take all that a step may compute of its prompts."""
        self.put_caps(NO_CAPS)

    def put_caps(self, caps: Caps) -> None:
        """Put other caps in force."""
        self.max_running, self.max_queued, self.max_prefill_tokens_per_step = caps

    @property
    def caps(self) -> Caps:
        """The caps in force."""
        return Caps(self.max_running, self.max_queued, self.max_prefill_tokens_per_step)

    @property
    def full(self) -> bool:
        """Whether one more may not run."""
        cap = self.max_running
        return cap is not None and self.running >= cap

    @property
    def closed(self) -> bool:
        """Whether none of it should be admitted in this step: it is full, or busy."""
        cap = self.max_running  # without a call: every step asks
        return self.busy or (cap is not None and self.running >= cap)

    @property
    def excess(self) -> int:
        """How many more run than may."""
        cap = self.max_running
        return 0 if cap is None else max(0, self.running - cap)

    def joined(self, record: "Record") -> None:
        """One more of its requests waits, since `queued_since`."""
        self.queued += 1
        self._joined.append(record)
        self._since.append(record.queued_since)
        if len(self._joined) > 2 * self.queued + 64:
            self._rebuild()
            self.reordered = True  # others that were only looked at may be out at the moment

    def left(self) -> None:
        """One of its requests waits no more."""
        self.queued -= 1
        if not self.queued:
            self._joined.clear()
            self._since.clear()
            self.reordered = True  # what was only looked at may be put back in any order

    @property
    def oldest_since(self) -> float | None:
        """Since when its longest waiting request has waited (Unix s); None if none waits."""
        if self.reordered:
            self._rebuild()
        while self._joined:
            if self._waits(self._joined[0], self._since[0]):
                return self._since[0]
            self._joined.popleft()
            self._since.popleft()
        return None

    def _waits(self, record: "Record", since: float) -> bool:
        mine = self in (record.account, record.group)
        return mine and record.state is QUEUED and record.queued_since == since

    def _rebuild(self) -> None:
        entries = zip(self._joined, self._since, strict=True)
        members = dict.fromkeys(record for record, since in entries if self._waits(record, since))
        self._joined = deque(sorted(members, key=lambda record: record.queued_since))
        self._since = deque(record.queued_since for record in self._joined)
        self.reordered = False

    def validate(self) -> None:
        """Check every invariant; for tests."""
        entries = [entry for entry in zip(self._joined, self._since, strict=True) if self._waits(*entry)]
        assert len({record for record, _ in entries}) == self.queued, self
        assert self.oldest_since == min((since for _, since in entries), default=None), self


class ClassGroup(Group):
    """All requests of one class.

    Args:
        name: the class.
        policy: its row of the table in force.
        place: its place among all, 0 runs first.
    """

    __slots__ = ("line", "place", "policy")

    def __init__(self, name: str, policy: ClassPolicy, place: int) -> None:
        super().__init__(name)
        self.policy = policy
        self.place = place
        self.line: ClassLine
        """The queue's: those of it that wait."""

    def __repr__(self) -> str:
        return f"<ClassGroup {self.name!r} queued={self.queued} running={self.running} held={self.held}>"

    def oldest_queued_s(self, now: float) -> float:
        """How long its longest waiting request has waited; 0 if none waits."""
        since = self.oldest_since
        return 0.0 if since is None else max(0.0, now - since)
