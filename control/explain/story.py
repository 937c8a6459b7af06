"""The story of one request, from the event log: what happened, behind whom it waited and why, what it cost. Pure.

Feed it every event of the log from before the request came, of all workers: those of others are what explains it.
Called by `cox explain REQUEST`.
"""

from typing import Any, Final

import msgspec

from coxswain.control.explain.ahead import Ahead, Classes, Overtakers
from coxswain.control.explain.life import PHASES, Life
from coxswain.schemas import events as ev
from coxswain.schemas.request_id import normalise

MAX_EVENTS: Final = 1_000
"""Of one child; the rest are counted."""

AnyEvent = ev.Event | dict[str, Any]
"""What a log gives: an event, or a plain dict of a later version's kind."""


class ChildStory(msgspec.Struct, frozen=True, kw_only=True):
    """One child on one worker."""

    worker: str
    child: int
    tenant: str
    class_: str = msgspec.field(name="class")
    priority: int
    phase: str
    """`queued`, `running`, `held`, `finished`, or `lost` where its worker ended first."""
    queued_s: float
    running_s: float
    held_s: float
    """Time in each state so far."""
    ttft_s: float | None
    ahead: tuple[Ahead, ...]
    """Who was admitted on its worker while it waited."""
    finished: ev.Finished | None
    """Its bill: what was computed, found, recomputed, reloaded, discarded."""
    events: tuple[ev.Event, ...]
    """About it, and what happened to its worker's leader and limits in its time; oldest first."""
    events_omitted: int


class Story(msgspec.Struct, frozen=True, kw_only=True):
    """What `cox explain REQUEST --json` prints."""

    request: str
    at: float
    """As of when (Unix s)."""
    children: tuple[ChildStory, ...]
    events_missing: int
    """Events of its workers that the log lacks, by the gaps in their numbers: they were dropped or have expired."""


class _Child:
    def __init__(self, event: ev.Event, classes: Classes) -> None:
        self.life = Life(event)
        self.overtakers = Overtakers(classes)
        self.events: list[ev.Event] = []
        self.omitted = 0
        self.ttft_s: float | None = None

    def feed(self, event: ev.Event) -> None:
        self.note(event)
        self.life.feed(event)
        if isinstance(event, ev.FirstToken):
            self.ttft_s = event.ttft_s

    def note(self, event: ev.Event) -> None:
        if len(self.events) >= MAX_EVENTS and not isinstance(event, ev.Finished):
            self.omitted += 1
            return
        self.events.append(event)


class Teller:
    """Reads a log and tells the story of one request.

    Args:
        request: its public id, or the `id` in the response's body.
        classes: the class table as it is now, if it is known.
    """

    def __init__(self, request: str, classes: Classes) -> None:
        self.request = normalise(request)
        self._classes = classes
        self._children: dict[tuple[str, str, int], _Child] = {}
        self.gaps = Gaps()

    def feed(self, event: AnyEvent) -> None:
        """Take the next event of the log."""
        if isinstance(event, dict):
            return
        self.gaps.feed(event)
        for child in self._children.values():
            if child.life.worker == event.worker and child.life.incarnation < event.incarnation:
                child.life.lose(event.at)
        if event.request == self.request:
            key = (event.worker, event.incarnation, event.child or 0)
            if key not in self._children:
                self._children[key] = _Child(event, self._classes)
            self._children[key].feed(event)
        elif isinstance(event, ev.Admitted):
            for child in self._of(event):
                if child.life.phase == "queued":
                    child.overtakers.add(event, child.life)
        elif isinstance(event, ev.LeaderChanged | ev.Limited):
            for child in self._of(event):
                if child.life.phase is not None:
                    child.note(event)

    def _of(self, event: ev.Event) -> list[_Child]:
        return [
            child
            for (worker, incarnation, _), child in self._children.items()
            if (worker, incarnation) == (event.worker, event.incarnation)
        ]

    def ended_at(self) -> float | None:
        """When the last of those that we know ended; None if one goes on, or none came yet."""
        lives = [child.life for child in self._children.values()]
        if not lives or any(life.phase is not None for life in lives):
            return None
        return max(life.phases[-1].end or 0.0 for life in lives)

    def story(self, now: float) -> Story:
        """The story so far."""
        workers = {(worker, incarnation) for worker, incarnation, _ in self._children}
        return Story(
            request=self.request,
            at=now,
            children=tuple(_told(child, now) for _, child in sorted(self._children.items())),
            events_missing=sum(self.gaps.missing.get(each, 0) for each in workers),
        )


class Gaps:
    """Counts what a log lacks: `seq` counts every event of an incarnation, so a gap is one that was lost."""

    def __init__(self) -> None:
        self.missing: dict[tuple[str, str], int] = {}
        """Per worker and incarnation."""
        self._last: dict[tuple[str, str], int] = {}

    def feed(self, event: ev.Event) -> None:
        """Take the next event."""
        key = (event.worker, event.incarnation)
        last = self._last.get(key)
        if last is not None and event.seq > last + 1:
            self.missing[key] = self.missing.get(key, 0) + event.seq - last - 1
        self._last[key] = max(event.seq, last or 0)


def _told(child: _Child, now: float) -> ChildStory:
    life = child.life
    queued_s, running_s, held_s = (life.seconds(phase, 0.0, now) for phase in PHASES)
    return ChildStory(
        worker=life.worker,
        child=life.child,
        tenant=life.tenant,
        class_=life.class_,
        priority=life.priority,
        phase=life.phase or ("lost" if life.lost else "finished"),
        queued_s=queued_s,
        running_s=running_s,
        held_s=held_s,
        ttft_s=child.ttft_s,
        ahead=child.overtakers.groups(),
        finished=life.finished,
        events=tuple(child.events),
        events_omitted=child.omitted,
    )
