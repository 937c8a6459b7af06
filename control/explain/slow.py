"""Why a tenant is slow, from the event log: where its requests' time went, who went first, who held them. Pure.

Feed it every event of a stretch of the log, of all tenants, and some of what was before: a request that waited through
the whole of it has no event in it. Called by `cox explain --tenant`.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from coxswain.control.explain.ahead import Ahead, Classes, Overtakers
from coxswain.control.explain.life import Life
from coxswain.control.explain.story import AnyEvent, Gaps
from coxswain.schemas import events as ev

AT_ONCE_S: Final = 0.05
"""Whoever waited less for admission did not wait: that is a step or two."""

Caps = Mapping[str, int]
"""Per worker: the most requests that the tenant may have running there."""


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of so many values, in s; null where there are none."""

    count: int
    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quantiles":
        """By nearest rank: the least of the values that so many percent of them do not exceed."""
        ordered = sorted(values)

        def rank(percent: int) -> float | None:
            return ordered[-(-percent * len(ordered) // 100) - 1] if ordered else None

        return cls(count=len(ordered), p50=rank(50), p90=rank(90), p99=rank(99))


class HoldCount(msgspec.Struct, frozen=True, kw_only=True):
    """Holds of one role, for one reason."""

    by: str
    reason: str
    count: int


class Slow(msgspec.Struct, frozen=True, kw_only=True):
    """What `cox explain --tenant T --json` prints."""

    tenant: str
    since: float
    until: float
    requests: int
    """Seen in that time; children count."""
    finished: dict[str, int]
    """By reason."""
    queued_s: float
    running_s: float
    held_s: float
    """Time of all its requests together in each state."""
    wait: Quantiles
    """From arrival to admission."""
    waited: int
    """Admissions that had to wait."""
    ttft: Quantiles
    ahead: tuple[Ahead, ...]
    """Who was admitted while any of its requests waited on the same worker."""
    admitted: int
    """Its own admissions meanwhile."""
    holds: tuple[HoldCount, ...]
    preempted: int
    """Times that it lost its KV and its turn, to cut-in or for want of blocks."""
    at_cap_s: dict[str, float]
    """Per worker with a cap: time in which it waited while as many ran as may."""
    limits: tuple[ev.Limited, ...]
    """Changes of caps on it, or on a class of its requests."""
    output_tokens: int
    recomputed_tokens: int
    restored_tokens: int
    reloaded_tokens: int
    """Of its requests that ended."""
    events_missing: int


class Investigator:
    """Reads a stretch of the log about one tenant.

    Args:
        tenant: which.
        since: from when on time and events count (Unix s); earlier ones tell who was there already.
        classes: the class table as it is now, if it is known.
        caps: the caps on its running requests as they are now, if they are known.
    """

    def __init__(self, tenant: str, since: float, classes: Classes, caps: Caps) -> None:
        self.tenant = tenant
        self.since = since
        self._lives: dict[tuple[str, str, str, int], Life] = {}
        self._overtakers = Overtakers(classes)
        self._caps = caps
        self._gaps = Gaps()
        self._waits: list[float] = []
        self._ttfts: list[float] = []
        self._holds: Counter[tuple[str, str]] = Counter()
        self._preempted = self._admitted = 0
        self._limits: list[ev.Limited] = []
        self._waiting: dict[str, dict[Life, None]] = {}
        """Per worker, those of its requests that wait, the first one first."""
        self._running: Counter[str] = Counter()
        self._full_since: dict[str, float] = {}
        self._incarnations: dict[str, str] = {}
        self._at_cap_s: defaultdict[str, float] = defaultdict(float)

    def feed(self, event: AnyEvent) -> None:
        """Take the next event of the log."""
        if isinstance(event, dict):
            return
        self._gaps.feed(event)
        if event.incarnation > self._incarnations.get(event.worker, ""):
            self._incarnations[event.worker] = event.incarnation
            self._restarted(event)
        if event.tenant == self.tenant and event.request is not None:
            self._own(event, event.request)
        elif event.at < self.since:
            return
        elif isinstance(event, ev.Admitted):
            if waiting := self._waiting.get(event.worker):
                self._overtakers.add(event, next(iter(waiting)))
        elif isinstance(event, ev.Limited) and self._concerns(event):
            self._limits.append(event)

    def _restarted(self, event: ev.Event) -> None:
        for life in self._lives.values():
            if life.worker == event.worker and life.incarnation < event.incarnation:
                before = life.phase
                life.lose(event.at)
                self._moved(life, before, event.at)

    def _concerns(self, event: ev.Limited) -> bool:
        if event.tenant is not None:
            return event.tenant == self.tenant
        return event.class_ is None or any(life.class_ == event.class_ for life in self._lives.values())

    def _own(self, event: ev.Event, request: str) -> None:
        key = (event.worker, event.incarnation, request, event.child or 0)
        life = self._lives.get(key)
        if life is None:
            life = self._lives[key] = Life(event)
        before = life.phase
        life.feed(event)
        self._moved(life, before, event.at)
        if event.at < self.since:
            return
        match event:
            case ev.Admitted():
                self._admitted += 1
                if not event.resumed:
                    self._waits.append(event.queued_s)
            case ev.FirstToken():
                self._ttfts.append(event.ttft_s)
            case ev.Held():
                self._holds[event.by, event.reason.partition(" for ")[0]] += 1
            case ev.Preempted():
                self._preempted += 1

    def _moved(self, life: Life, before: str | None, at: float) -> None:
        worker, after = life.worker, life.phase
        waiting = self._waiting.setdefault(worker, {})
        if before == after:
            return
        if before == "queued":
            waiting.pop(life, None)
        if after == "queued":
            waiting[life] = None
        self._running[worker] += (after == "running") - (before == "running")
        cap = self._caps.get(worker)
        full = cap is not None and self._running[worker] >= cap and bool(waiting)
        if full:
            self._full_since.setdefault(worker, at)
        elif worker in self._full_since:
            self._at_cap_s[worker] += max(0.0, at - max(self.since, self._full_since.pop(worker)))

    def result(self, until: float) -> Slow:
        """What was found, time counted until then."""
        lives = [
            life
            for life in self._lives.values()
            if life.phase is not None or (life.phases[-1].end or 0.0) >= self.since
        ]
        ended = [life.finished for life in lives if life.finished is not None]
        at_cap_s = {worker: self._at_cap_s[worker] for worker in self._caps}
        for worker, since in self._full_since.items():
            at_cap_s[worker] += until - max(self.since, since)
        holds = [HoldCount(by=by, reason=reason, count=n) for (by, reason), n in self._holds.most_common()]
        return Slow(
            tenant=self.tenant,
            since=self.since,
            until=until,
            requests=len(lives),
            finished=dict(Counter(event.reason for event in ended)),
            queued_s=sum(life.seconds("queued", self.since, until) for life in lives),
            running_s=sum(life.seconds("running", self.since, until) for life in lives),
            held_s=sum(life.seconds("held", self.since, until) for life in lives),
            wait=Quantiles.of(self._waits),
            waited=sum(wait > AT_ONCE_S for wait in self._waits),
            ttft=Quantiles.of(self._ttfts),
            ahead=self._overtakers.groups(),
            admitted=self._admitted,
            holds=tuple(holds),
            preempted=self._preempted,
            at_cap_s=at_cap_s,
            limits=tuple(self._limits),
            output_tokens=sum(event.output_tokens for event in ended),
            recomputed_tokens=sum(event.recomputed_tokens for event in ended),
            restored_tokens=sum(event.restored_tokens for event in ended),
            reloaded_tokens=sum(event.reloaded_tokens for event in ended),
            events_missing=sum(self._gaps.missing.values()),
        )
