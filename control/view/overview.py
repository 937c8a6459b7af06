"""A fleet as people look at it: status frames in, a picture out. Pure; the clock is passed in.

The one model behind `cox top`, its replay and whatever else draws a fleet. It reads nothing but status frames, so
what it shows of a recording is what it would have shown then. Call `feed` with every frame, `tick` about once a
second (for silence is news too), `picture` whenever something is to be drawn.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from coxswain.control.fleet import Fleet, RequestKey, WorkerView
from coxswain.control.view.chronicle import Chronicle
from coxswain.control.view.picture import (
    ClassRow,
    Happening,
    LeaderRow,
    Picture,
    RequestRow,
    TenantRow,
    WorkerRow,
)
from coxswain.control.view.recent import FirstTokens, Recent
from coxswain.schemas.status import ClassStatus, Frame, StoryLine, TenantStatus

WINDOW_S: Final = 30.0
"""What "of late" means."""
TICK_S: Final = 1.0
"""The grain of it."""
SHOWN: Final = 100
"""Happenings in a picture."""


class Overview:
    """Everything that frames say of a fleet.

    Args:
        fleet: its name, for the picture.
        window_s: over how long shares, rates and first tokens are taken.
    """

    def __init__(self, fleet: str, *, window_s: float = WINDOW_S) -> None:
        self.name = fleet
        self._recent = Recent(window_s)
        self.fleet = Fleet(self._recent.take)
        self.now = 0.0
        self._ticked = 0.0
        self._first_tokens = FirstTokens(window_s)
        self._chronicle = Chronicle()

    def feed(self, frame: Frame, now: float) -> None:
        """Take a frame that came at `now` (Unix s)."""
        self.now = max(self.now, now)
        new = frame.worker not in self.fleet.workers
        self._chronicle.before(self.fleet, frame, now)
        self._first_tokens.observe(self.fleet, frame, now)
        self.fleet.merge(frame, now)
        if new or self.now - self._ticked >= TICK_S:  # however fast a recording is played
            self.tick(now)

    def tick(self, now: float) -> None:
        """Let time pass: shares move on, silent workers become stale. Once a second will do."""
        self.now = self._ticked = max(self.now, now)
        self.fleet.age(self.now)
        self._chronicle.after(self.fleet, self.now)
        self._recent.look(self.now)
        self.fleet.settle()

    def note(self, happening: Happening) -> None:
        """Add what the viewer did itself, such as a command and its outcome."""
        self._chronicle.happenings.append(happening)

    def picture(self, now: float) -> Picture:
        """All rows as of now, in order of their names. O(workers × tenants)."""
        self.now = max(self.now, now)
        views = sorted(self.fleet.workers.values(), key=lambda view: view.worker)
        live = [view for view in views if self.fleet.liveness(view) == "live"]
        span_s = self._recent.span_s(self.now)
        service = sum(max(0.0, served) for served in self._recent.sums.service.values())
        tenants = self._tenants(live, service, span_s)
        return Picture(
            fleet=self.name,
            at=self.now,
            leader=self._leader(live),
            queued=sum(view.frame.queued for view in live),
            running=sum(view.frame.running for view in live),
            held=sum(view.frame.held for view in live),
            output_tokens_per_s=_per_s(sum(self._recent.sums.tokens.values()), span_s),
            workers=tuple(self._worker(view, span_s) for view in views if self._listed(view)),
            tenants=tenants,
            classes=self._classes(live, tenants),
            happenings=tuple(self._chronicle.happenings)[-SHOWN:],
        )

    def requests(self, wanted: Callable[[RequestRow], bool] = lambda _: True) -> list[RequestRow]:
        """The requests that frames list, of live workers: running, held, then queued in order."""
        rows = [
            RequestRow(worker=view.worker, status=status)
            for view in self.fleet.workers.values()
            if self.fleet.liveness(view) == "live"
            for status in view.requests.values()
        ]
        return sorted(filter(wanted, rows), key=_urgency)

    def trail(self, worker: str, key: RequestKey) -> tuple[StoryLine, ...]:
        """What frames told of a request since we look: its story, less what came and went between two frames."""
        return self._chronicle.trail(worker, key)

    def _listed(self, view: WorkerView) -> bool:
        return self.fleet.liveness(view) != "gone"

    def _leader(self, live: Iterable[WorkerView]) -> LeaderRow | None:
        heard = [view for view in live if view.frame.leader.epoch is not None]
        if not heard:
            return None
        newest = max(view.frame.leader.epoch for view in heard if view.frame.leader.epoch is not None)
        of_it = [view for view in heard if view.frame.leader.epoch == newest]
        policy = next((view.frame.leader.policy for view in of_it if view.frame.leader.policy), None)
        ages = [age for view in of_it if (age := self._leader_age_s(view)) is not None]
        return LeaderRow(epoch=newest, policy=policy, age_s=min(ages, default=0.0))

    def _leader_age_s(self, view: WorkerView) -> float | None:
        age_s = view.frame.leader.age_s
        return None if age_s is None else age_s + max(0.0, self.now - view.heard_at)

    def _worker(self, view: WorkerView, span_s: float) -> WorkerRow:
        frame = view.frame
        blocks, slots = frame.kv_blocks, frame.slots
        return WorkerRow(
            worker=view.worker,
            liveness=self.fleet.liveness(view),
            state=frame.state,
            model=frame.model,
            queued=frame.queued,
            running=frame.running,
            held=frame.held,
            active_slots=slots.active,
            running_slots=slots.running,
            held_slots=slots.held,
            kv_used=blocks.used / blocks.total if blocks.total else 0.0,
            kv_held=blocks.held / blocks.total if blocks.total else 0.0,
            step_s=frame.step_s,
            output_tokens_per_s=_per_s(self._recent.sums.by_worker.get(view.worker, 0.0), span_s),
            applied_total=frame.commands.applied_total,
            rejected_total=sum(frame.commands.rejected_total.values()),
            leader_policy=frame.leader.policy,
            leader_age_s=self._leader_age_s(view),
            silent_s=max(0.0, self.now - view.heard_at),
        )

    def _tenants(self, live: Iterable[WorkerView], service: float, span_s: float) -> tuple[TenantRow, ...]:
        rows: dict[str, list[TenantStatus]] = defaultdict(list)
        for view in live:
            for name, row in view.rows.items():
                rows[name].append(row)
        of_class: defaultdict[str, float] = defaultdict(float)
        weights: defaultdict[str, float] = defaultdict(float)
        for name, each in rows.items():
            served = max(0.0, self._recent.sums.service.get(name, 0.0))
            of_class[each[0].class_] += served
            if served > 0 or any(row.queued or row.running or row.held for row in each):
                weights[each[0].class_] += max(row.weight for row in each)
        return tuple(
            self._tenant(name, rows[name], service, of_class, weights, span_s) for name in sorted(rows)
        )

    def _tenant(
        self,
        name: str,
        rows: list[TenantStatus],
        service: float,
        of_class: dict[str, float],
        weights: dict[str, float],
        span_s: float,
    ) -> TenantRow:
        served = max(
            0.0, self._recent.sums.service.get(name, 0.0)
        )  # what was charged ahead may be given back
        class_ = rows[0].class_
        weight = max(row.weight for row in rows)
        queued, running, held = (
            sum(getattr(row, field) for row in rows) for field in ("queued", "running", "held")
        )
        wants = served > 0 or queued or running or held
        return TenantRow(
            tenant=name,
            class_=class_,
            weight=weight,
            queued=queued,
            running=running,
            held=held,
            oldest_queued_s=max(row.oldest_queued_s for row in rows),
            virtual_time=max(row.virtual_time for row in rows),
            share=served / service if service else 0.0,
            due=of_class[class_] / service * weight / weights[class_] if service and wants else 0.0,
            output_tokens_per_s=_per_s(self._recent.sums.tokens.get(name, 0.0), span_s),
            ttft_s=self._first_tokens.median_s(name, self.now),
            output_tokens_total=sum(row.output_tokens_total for row in rows),
            recomputed_tokens_total=sum(row.recomputed_tokens_total for row in rows),
            finished_total=sum(row.finished_total for row in rows),
            max_running=_strictest(row.max_running for row in rows),
            max_queued=_strictest(row.max_queued for row in rows),
        )

    def _classes(self, live: Iterable[WorkerView], tenants: Iterable[TenantRow]) -> tuple[ClassRow, ...]:
        rows: dict[str, list[ClassStatus]] = defaultdict(list)
        for view in live:
            for name, row in view.classes.items():
                rows[name].append(row)
        members: dict[str, list[TenantRow]] = defaultdict(list)
        for tenant in tenants:
            members[tenant.class_].append(tenant)
        return tuple(_class(name, rows[name], members[name]) for name in sorted(rows.keys() | members.keys()))


def _class(name: str, rows: list[ClassStatus], members: list[TenantRow]) -> ClassRow:
    """Of a worker that does not list classes, what its tenants have counts for their own class."""
    counted: Sequence[ClassStatus | TenantRow] = rows or members
    return ClassRow(
        class_=name,
        queued=sum(each.queued for each in counted),
        running=sum(each.running for each in counted),
        held=sum(each.held for each in counted),
        oldest_queued_s=max(each.oldest_queued_s for each in counted),
        share=sum(member.share for member in members),
        max_running=_strictest(row.max_running for row in rows),
        max_queued=_strictest(row.max_queued for row in rows),
    )


def _per_s(total: float, span_s: float) -> float:
    return max(0.0, total / span_s) if span_s > 0 else 0.0


def _strictest(caps: Iterable[int | None]) -> int | None:
    return min((cap for cap in caps if cap is not None), default=None)


_PLACES: Final = {"running": 0, "held": 1, "queued": 2}


def _urgency(row: RequestRow) -> tuple[int, int, float, str]:
    status = row.status
    return _PLACES[status.state], status.position or 0, status.arrived_at, status.request
