"""One request's life from its events: which phase it is in, since when, what each phase cost. Pure.

Events tell transitions; what was before the first one that we read is taken from what it says of the past
(`queued_s`, `held_s`). Called by `story.py` and `slow.py`.
"""

from typing import Final, Literal

import msgspec

from coxswain.schemas import events as ev

PhaseName = Literal["queued", "running", "held"]
PHASES: Final[tuple[PhaseName, ...]] = ("queued", "running", "held")


class Phase(msgspec.Struct, kw_only=True):
    """A stretch of time in one state. `end` is null while it lasts."""

    phase: PhaseName
    begin: float
    end: float | None = None

    def seconds(self, since: float, until: float) -> float:
        """How much of it lies between two times (Unix s)."""
        return max(0.0, min(until, until if self.end is None else self.end) - max(since, self.begin))


class Life:
    """One child of a request on one worker, as far as events tell."""

    def __init__(self, event: ev.Event) -> None:
        self.worker = event.worker
        self.incarnation = event.incarnation
        self.request = event.request or ""
        self.child = event.child or 0
        self.tenant = event.tenant or ""
        self.class_ = event.class_ or ""
        self.priority = event.priority or 0
        self.virtual_time: float | None = None
        """Its tenant's, when last told."""
        self.phases: list[Phase] = []
        self.finished: ev.Finished | None = None
        self.lost = False
        """Whether its worker ended before it did."""
        self._keeps_slot = False
        """Held: whether it will run at once when continued."""

    @property
    def phase(self) -> PhaseName | None:
        """Where it is now; None when it has ended."""
        ended = self.lost or self.finished is not None
        return self.phases[-1].phase if self.phases and not ended else None

    def feed(self, event: ev.Event) -> None:
        """Take the next event about it."""
        self.class_ = event.class_ or self.class_
        self.priority = self.priority if event.priority is None else event.priority
        match event:
            case ev.Queued():
                self.virtual_time = event.virtual_time
                self._go("queued", event.at)
            case ev.Admitted():
                self.virtual_time = event.virtual_time
                self._before("queued", event.at, event.queued_s)
                self._go("running", event.at)
            case ev.Held():
                self._keeps_slot = event.kv == "kept"
                self._go("held", event.at)
            case ev.Parked() | ev.Dropped():
                self._keeps_slot = False
            case ev.Continued():
                self._before("held", event.at, event.held_s)
                self._go("running" if self._keeps_slot else "queued", event.at)
            case ev.Preempted():
                self._go("queued", event.at)
            case ev.Reprioritized():
                self.class_, self.priority = event.to_class, event.to_priority
            case ev.Finished():
                self._end(event)

    def lose(self, at: float) -> None:
        """Its worker has begun a new incarnation: whatever has not ended by then never will."""
        if self.finished is None:
            self.lost = True
            if self.phases and self.phases[-1].end is None:
                self.phases[-1].end = at

    def seconds(self, phase: PhaseName, since: float, until: float) -> float:
        """Time spent in a phase between two times (Unix s)."""
        return sum(each.seconds(since, until) for each in self.phases if each.phase == phase)

    def _before(self, phase: PhaseName, at: float, lasted_s: float) -> None:
        """What we did not read: it was in this phase until now."""
        if not self.phases:
            self.phases.append(Phase(phase=phase, begin=at - lasted_s))

    def _go(self, phase: PhaseName, at: float) -> None:
        last = self.phases[-1] if self.phases else None
        if last is not None and last.phase == phase:
            return
        if last is not None:
            last.end = at
        self.phases.append(Phase(phase=phase, begin=at))

    def _end(self, event: ev.Finished) -> None:
        if not self.phases:  # nothing else of it was read: its bill says how long, not when
            at = event.at
            for phase, lasted_s in (
                ("running", event.run_s),
                ("held", event.held_s),
                ("queued", event.queued_s),
            ):
                if lasted_s > 0:
                    self.phases.insert(0, Phase(phase=phase, begin=at - lasted_s, end=at))  # type: ignore[arg-type]
                    at -= lasted_s
        elif self.phases[-1].end is None:
            self.phases[-1].end = event.at
        self.finished = event
