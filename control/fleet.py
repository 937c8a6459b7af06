"""The fleet as its status frames tell it: one view per worker, totals per tenant.

Frames may be lost, repeated, late or out of order: values are absolute and totals cumulative per incarnation,
so the next full frame repairs everything. Totals only grow: those of an ended incarnation are kept as sums.
Pure: the clock is passed in. Called by `core`; policies read it and never change it.
"""

from collections import deque
from collections.abc import Iterator
from typing import Final, Literal

import msgspec

from coxswain.control.parts import Assembler
from coxswain.schemas.status import Frame, RequestStatus, TenantStatus

STALE_S: Final = 3.0
"""A worker that is silent for longer is not counted; it publishes at least once a second."""
GONE_S: Final = 30.0
"""A worker that is silent for longer is not listed any more; its totals stay."""
MAX_WORKERS: Final = 1_024
"""Views kept; beyond, the totals of the longest silent worker that is gone are added to the sums."""
MAX_RETIRED: Final = 8
"""Ended incarnations remembered per worker, so that their late frames change nothing."""

Liveness = Literal["live", "stale", "gone"]


class Totals(msgspec.Struct, kw_only=True):
    """What a tenant was served. Only grows."""

    charged: float = 0.0
    """Weighted cost: tokens × price ÷ weight, as the workers charged it."""
    uncached_input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0
    recomputed_tokens: int = 0
    finished: int = 0

    def add(self, row: TenantStatus) -> None:
        """Add one incarnation's totals."""
        self.charged += row.charged
        self.uncached_input_tokens += row.uncached_input_tokens_total
        self.cached_input_tokens += row.cached_input_tokens_total
        self.output_tokens += row.output_tokens_total
        self.recomputed_tokens += row.recomputed_tokens_total
        self.finished += row.finished_total


class WorkerView:
    """One worker as last heard: `frame` for everything but rows, which are merged here."""

    def __init__(self, frame: Frame, now: float) -> None:
        self.worker = frame.worker
        self.incarnation = frame.incarnation
        self.frame = frame
        self.since = now
        self.heard_at = now
        self.complete = False
        """Whether a full frame was merged: until then tenants may be missing."""
        self.tenants: dict[str, TenantStatus] = {}
        self.requests: dict[tuple[str, int], RequestStatus] = {}
        self._assembler = Assembler()
        self._heard: tuple[int, frozenset[int]] = (-1, frozenset())

    def merge(self, frame: Frame, now: float) -> set[str]:
        """Take a frame of this incarnation; returns the tenants whose rows changed. Older ones: none."""
        seq, parts = self._heard
        if frame.seq < seq or (frame.seq == seq and frame.part in parts):
            return set()
        self._heard = (frame.seq, (parts if frame.seq == seq else frozenset()) | {frame.part})
        self.heard_at = now
        self.frame = frame
        if not frame.full:
            return self._merge_delta(frame)
        whole = self._assembler.add(frame)
        return self._merge_full(whole) if whole else set()

    def _merge_delta(self, frame: Frame) -> set[str]:
        changed = {row.tenant for row in frame.tenants if self.tenants.get(row.tenant) != row}
        self.tenants.update((row.tenant, row) for row in frame.tenants)
        self.requests.update(((row.request, row.child), row) for row in frame.requests)
        for gone in frame.gone:
            self.requests.pop((gone.request, gone.child), None)
        return changed

    def _merge_full(self, frame: Frame) -> set[str]:
        tenants = {row.tenant: row for row in frame.tenants}
        changed = {name for name, row in tenants.items() if self.tenants.get(name) != row}
        changed |= self.tenants.keys() - tenants.keys()
        if not self.complete:
            changed |= tenants.keys()
        # A tenant that a worker stops listing keeps what it was served.
        for name in self.tenants.keys() - tenants.keys():
            tenants[name] = msgspec.structs.replace(self.tenants[name], queued=0, running=0, held=0)
        self.tenants = tenants
        self.requests = {(row.request, row.child): row for row in frame.requests}
        self.complete = True
        return changed


class Fleet:
    """Every worker heard of, and what every tenant was served by all of them."""

    def __init__(self) -> None:
        self.now = 0.0
        """The time of the last `merge` or `age` (Unix s)."""
        self.workers: dict[str, WorkerView] = {}
        self.ended: dict[str, Totals] = {}
        """Per tenant, the totals of incarnations that ended."""
        self.changed: set[tuple[str, str]] = set()
        """(worker, tenant) whose rows, or whose worker's liveness, changed since `settle`."""
        self.rivals: dict[str, str] = {}
        """Workers of which a second incarnation is alive under the same name, and that incarnation."""
        self._retired: dict[str, deque[str]] = {}
        self._liveness: dict[str, Liveness] = {}

    def merge(self, frame: Frame, now: float) -> bool:
        """Take a frame; False if it is of an ended incarnation, or of a second process under a live name."""
        self.now = max(self.now, now)
        view = self.workers.get(frame.worker)
        if view is None or view.incarnation != frame.incarnation:
            if not self._succeeds(view, frame):
                return False
            if view is not None:
                self._end(view)
            view = self.workers[frame.worker] = WorkerView(frame, now)
        changed = view.merge(frame, now)
        self.changed.update((frame.worker, tenant) for tenant in changed)
        return True

    def age(self, now: float) -> None:
        """Let time pass: silent workers become stale, then gone."""
        self.now = max(self.now, now)
        for worker, view in self.workers.items():
            liveness = self.liveness(view)
            if self._liveness.get(worker) != liveness:
                self._liveness[worker] = liveness
                self.changed.update((worker, tenant) for tenant in view.tenants)
        gone = [view for view in self.workers.values() if self.liveness(view) == "gone"]
        for view in sorted(gone, key=lambda view: view.heard_at)[: max(0, len(self.workers) - MAX_WORKERS)]:
            self._end(view)

    def settle(self) -> None:
        """Everything that changed was seen by who needs it."""
        self.changed.clear()

    def liveness(self, view: WorkerView) -> Liveness:
        """Whether the worker was heard of lately."""
        silent_s = self.now - view.heard_at
        return "live" if silent_s <= STALE_S else "stale" if silent_s <= GONE_S else "gone"

    def live(self) -> Iterator[WorkerView]:
        """Workers that were heard of lately."""
        return (view for view in self.workers.values() if self.liveness(view) == "live")

    def tenants(self) -> set[str]:
        """Every tenant ever heard of."""
        return set(self.ended).union(*(view.tenants for view in self.workers.values()))

    def totals(self, tenant: str) -> Totals:
        """What a tenant was served by all workers and incarnations heard of."""
        ended = self.ended.get(tenant)
        totals = msgspec.structs.replace(ended) if ended else Totals()
        for view in self.workers.values():
            if row := view.tenants.get(tenant):
                totals.add(row)
        return totals

    def waits_on(self, tenant: str) -> frozenset[str]:
        """The live workers, of those heard in full, on which the tenant has anything queued."""
        return frozenset(
            view.worker
            for view in self.live()
            if view.complete and (row := view.tenants.get(tenant)) and row.queued
        )

    def _succeeds(self, view: WorkerView | None, frame: Frame) -> bool:
        """Whether a frame of an incarnation that is not the current one begins a new one.

        Incarnations are ULIDs, so of two that live the later started wins; the other is reported as a rival.
        """
        ended = frame.incarnation in self._retired.get(frame.worker, ())
        if view is None:
            return not ended
        if not ended and (frame.incarnation > view.incarnation or self.liveness(view) != "live"):
            return True
        # A frame that is merely late is no rival.
        if self.now - view.since > STALE_S:
            self.rivals[frame.worker] = frame.incarnation
        return False

    def _end(self, view: WorkerView) -> None:
        self._retired.setdefault(view.worker, deque(maxlen=MAX_RETIRED)).append(view.incarnation)
        if len(self._retired) > 2 * MAX_WORKERS:
            del self._retired[next(name for name in self._retired if name not in self.workers)]
        for tenant, row in view.tenants.items():
            self.ended.setdefault(tenant, Totals()).add(row)
            self.changed.add((view.worker, tenant))
        del self.workers[view.worker]
        self._liveness.pop(view.worker, None)

    def validate(self) -> None:
        """Check every invariant; raises AssertionError."""
        for worker, view in self.workers.items():
            assert view.worker == worker
            assert view.incarnation not in self._retired.get(worker, ())
            assert all(name == row.tenant for name, row in view.tenants.items())
            assert view.heard_at <= self.now
        assert all(len(retired) <= MAX_RETIRED for retired in self._retired.values())
