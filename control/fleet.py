"""The fleet as its status frames tell it: one view per worker, and what tenants were charged.

Frames may be lost, repeated, late or out of order: values are absolute and totals cumulative per incarnation,
so the next full frame repairs everything. Of what an incarnation was charged each part is told once, in `served`.
A row of a tenant, class or request is taken in if there can be one of that name: a worker that was broken into says
what it likes, and whatever is in here may be named in commands to any worker.
Pure: the clock is passed in. Called by `core`; policies read it and never change it.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from sys import intern
from typing import Final, Literal

from msgspec.structs import replace

from coxswain.control.accounts import Accounts, Row, Rows, admitted
from coxswain.control.presence import Presence
from coxswain.schemas.names import is_class
from coxswain.schemas.parts import Assembler
from coxswain.schemas.request_id import MAX_CHARS
from coxswain.schemas.status import ClassStatus, Frame, RequestStatus, TenantStatus

STALE_S: Final = 3.0
"""A worker that is silent for longer is not counted; it publishes at least once a second."""
GONE_S: Final = 30.0
"""A worker that is silent for longer is not listed any more; what it said is kept."""
MAX_WORKERS: Final = 1_024
"""Views kept; beyond, that of the longest silent worker that is gone is forgotten."""
MAX_RETIRED: Final = 8
"""Incarnations that lost their turn, remembered per worker, so that what they served is not counted again: the last
that had it or spoke."""
MAX_LEFT: Final = 4_096
"""Requests that left, remembered per worker until `settle`."""

RequestKey = tuple[str, int]
"""A request and its child."""
Changed = dict[str, Row | None]
"""Tenants to whom more happened than being served, and what was kept of them before that."""
Charges = defaultdict[str, float]
"""Per tenant, the weighted cost that it was charged."""
Seen = Callable[[str, TenantStatus, TenantStatus], None]
"""Is told of a worker, a row that came from it, and the one that it replaces."""
Liveness = Literal["live", "stale", "gone"]


class WorkerView:
    """One worker as last heard: `frame` for everything but rows, which are merged here.

    Args:
        frame: the first of an incarnation.
        now: when it came.
        presence: keeps where tenants are.
        served: to which what tenants are charged is added, once the worker was heard in full.
        seen: is told of every row that replaces another, from then on. Needs rows.
        returned: whether the incarnation had its turn before.
        places: makes that only accounts of tenants are kept: see `Accounts`.
    """

    def __init__(
        self,
        frame: Frame,
        now: float,
        presence: Presence | None = None,
        served: Charges | None = None,
        seen: Seen | None = None,
        *,
        returned: bool = False,
        places: dict[str, int] | None = None,
    ) -> None:
        self.worker = frame.worker
        self.incarnation = frame.incarnation
        self.frame = frame
        self.since = now
        self.heard_at = now
        self.returned = returned
        """Whether it lost its turn to another incarnation and has it again: what it charged meanwhile nobody counts."""
        self.complete = False
        """Whether a full frame was merged: until then tenants may be missing."""
        self.rows = Rows(None if seen is None else self._saw)
        """Tenants' rows, where they are kept whole; none where only accounts are."""
        self.tenants: Rows | Accounts = self.rows if places is None else Accounts(places)
        """What is kept of tenants."""
        self.classes: dict[str, ClassStatus] = {}
        self.requests: dict[RequestKey, RequestStatus] = {}
        self.beyond: dict[RequestKey, RequestStatus] = {}
        """What waits behind those that frames list, when its queue was last asked for."""
        self.left: list[RequestStatus] = []
        """Requests that ran or were held and are listed no more, since `Fleet.settle`: ended, as a rule. With all
        of their output, if no frame was lost."""
        self.waiting: set[str] = set()
        """Tenants with anything queued here."""
        self.busy: set[str] = set()
        """Tenants with anything queued, running or held here."""
        self.counted = False
        """Whether `presence` has them: while the worker is live, and was heard in full."""
        self._presence = presence or Presence()
        self._served = Charges(float) if served is None else served
        self._seen = seen
        self._assembler: Assembler[Frame] = Assembler()
        self._seq = -1
        self._parts: set[int] = set()
        """Of the frame `_seq`: those that came."""

    def merge(self, frame: Frame, now: float, changed: Changed | None = None) -> None:
        """Take a frame of this incarnation, unless it is older than what we have; note in `changed` what happened."""
        if frame.seq < self._seq or (frame.seq == self._seq and frame.part in self._parts):
            return
        if frame.seq > self._seq:
            self._seq, self._parts = frame.seq, set()
        self._parts.add(frame.part)
        changed = {} if changed is None else changed
        self.heard_at = now
        # Rows are let go of while they are still at hand: a turn later, to find their memory would be to wait for it.
        self.frame = replace(frame, charged={}, bases={}, tenants=(), requests=(), gone=())
        if not frame.full:
            self._merge_delta(frame, changed)
        elif whole := self._assembler.add(frame):
            self._merge_full(whole, changed)

    def count(self, *, counted: bool) -> None:
        """Let `presence` have what is here, or take it out."""
        if counted == self.counted:
            return
        self.counted = counted
        for tenant in self.waiting:
            self._presence.note(tenant, self.worker, here=counted)

    def _merge_delta(self, frame: Frame, changed: Changed) -> None:
        # What a delta names has changed: that is why it is there.
        if frame.tenants:
            self._put(frame.tenants, changed)
        if isinstance(self.tenants, Accounts):  # whose reader may leave out the rows that say the same
            self.tenants.charge(frame.charged, self._served_now)
            self.tenants.rebase(frame.bases)
        self._put_classes(frame)
        if frame.requests:
            self.requests.update(_keyed(frame.requests))
        for gone in frame.gone:
            self._gone(self.requests.pop((gone.request, gone.child), None), gone.output_tokens)
        self._tidy(frame)

    def _merge_full(self, frame: Frame, changed: Changed) -> None:
        # A tenant that a worker stops listing keeps what it was served.
        gone = self.busy - {row.tenant for row in frame.tenants}
        self._put(self.tenants.differing(frame.tenants, self.busy), changed)
        self._put(map(self.tenants.idle, sorted(gone)), changed)
        self.classes = {}  # one that is listed no more was taken out of the table
        self._put_classes(frame)
        requests = _keyed(frame.requests)
        for key, row in self.requests.items():
            if key not in requests:
                self._gone(row)
        self.requests = requests
        self._tidy(frame)
        if not self.complete:
            self.complete = True
            changed.update(dict.fromkeys(self.tenants))
            if not self.returned:
                for name, known in self.tenants.items():
                    self._served[name] += known.charged

    def _put(self, rows: Iterable[TenantStatus], changed: Changed) -> None:
        for row, old in self.tenants.put(rows, self._served_now):
            self._happened(row, old, changed)

    @property
    def _served_now(self) -> Charges:
        """Where charges go: before the worker was heard in full, they are none of the fleet's."""
        return self._served if self.complete else Charges(float)

    def _saw(self, row: TenantStatus, old: TenantStatus) -> None:
        if self.complete and self._seen is not None:
            self._seen(self.worker, row, old)

    def _happened(self, row: TenantStatus, old: Row | None, changed: Changed) -> None:
        """A row says perhaps more than that its tenant was served."""
        presence, name = self._presence, intern(row.tenant)
        presence.meet(row.class_)
        waits, busy = row.queued > 0, bool(row.queued or row.running or row.held)
        if came_or_left := waits != (name in self.waiting):
            (self.waiting.add if waits else self.waiting.remove)(name)
            if self.counted:
                presence.note(name, self.worker, here=waits)
        if busied := busy != (name in self.busy):
            (self.busy.add if busy else self.busy.remove)(name)
        if came_or_left or busied or old is None or row.lift != old.lift or admitted(row, old):
            changed.setdefault(name, old)

    def known(self) -> Iterator[RequestStatus]:
        """Every request that we know of here: those that frames list, then what waits behind them."""
        yield from self.requests.values()
        yield from self.beyond.values()

    def request(self, key: RequestKey) -> RequestStatus | None:
        """The row of a request, if we know of it."""
        return self.requests.get(key) or self.beyond.get(key)

    @property
    def unlisted(self) -> int:
        """How many wait behind those that frames list."""
        return max(0, self.frame.queued - sum(row.state == "queued" for row in self.requests.values()))

    def _tidy(self, frame: Frame) -> None:
        """What waits behind is no longer what is listed now; and nothing is behind a queue that is listed whole."""
        if self.beyond:
            for row in frame.requests:
                self.beyond.pop((row.request, row.child), None)
            if not self.unlisted:
                self.beyond = {}

    def _put_classes(self, frame: Frame) -> None:
        for row in frame.classes:
            if is_class(row.class_):
                self.classes[row.class_] = row
                self._presence.meet(row.class_)

    def _gone(self, row: RequestStatus | None, tokens: int = 0) -> None:
        if row is not None and row.state != "queued" and len(self.left) < MAX_LEFT:
            if tokens > row.output_tokens:
                row = replace(row, output_tokens=tokens)
            self.left.append(row)


def _keyed(rows: Iterable[RequestStatus]) -> dict[RequestKey, RequestStatus]:
    """Those of requests that a command can name."""
    return {(row.request, row.child): row for row in rows if 0 < len(row.request) <= MAX_CHARS}


class Fleet:
    """Every worker heard of, and what every tenant was served by all of them.

    Args:
        seen: is told of every row of a worker that was heard in full and that replaces another.
        rows: whether tenants' rows are kept whole, and not only accounts of them.
    """

    def __init__(self, seen: Seen | None = None, *, rows: bool = True) -> None:
        self.now = 0.0
        """The time of the last `merge` or `age` (Unix s)."""
        self.workers: dict[str, WorkerView] = {}
        self.changed: dict[str, Changed] = {}
        """Per worker, the tenants that came, left, were lifted or had a request admitted since `settle`, and all if its
        liveness changed, with the row before: None where there was none, or the worker was not heard in full."""
        self.served: Charges = defaultdict(float)
        """What tenants were charged since `settle` by workers that were heard in full. What such a worker charged
        before it was heard of is in it once: when it is, unless it `returned`. Some are in it at zero."""
        self.presence = Presence()
        self.rivals: dict[str, str] = {}
        """Workers of which a second incarnation is alive under the same name, and that incarnation."""
        self.rows = rows
        self._seen = seen
        self._places: dict[str, int] | None = None if rows else {}
        self._retired: dict[str, deque[str]] = {}
        self._liveness: dict[str, Liveness] = {}

    def merge(self, frame: Frame, now: float) -> bool:
        """Take a frame; False if another incarnation speaks under that name, and goes before."""
        self.now = max(self.now, now)
        view = self.workers.get(frame.worker)
        if view is None or view.incarnation != frame.incarnation:
            if not self._succeeds(view, frame):
                return False
            if view is not None:
                self._end(view)
            view = self._begin(frame, now)
        view.merge(frame, now, self.changed.setdefault(frame.worker, {}))
        return True

    def age(self, now: float) -> None:
        """Let time pass: silent workers become stale, then gone."""
        self.now = max(self.now, now)
        gone = []
        for worker, view in self.workers.items():
            liveness = self.liveness(view)
            if self._liveness.get(worker) != liveness:
                self._liveness[worker] = liveness
                self._mark(view)
            view.count(counted=view.complete and liveness == "live")
            if liveness == "gone":
                gone.append(view)
        for view in sorted(gone, key=lambda view: view.heard_at)[: max(0, len(self.workers) - MAX_WORKERS)]:
            self._end(view)

    def settle(self) -> None:
        """Everything that changed was seen by who needs it."""
        self.changed.clear()
        # Who was charged will be again: sums that would have to grow anew each turn are a fiftieth of it.
        charged = {intern(name): 0.0 for name, charge in self.served.items() if charge}
        self.served.clear()
        self.served.update(charged)
        self.presence.moved.clear()
        for view in self.workers.values():
            if view.left:
                view.left.clear()

    def list_queue(self, worker: str, rows: Iterable[RequestStatus]) -> None:
        """Take a worker's whole queue, as asked for a moment ago."""
        if view := self.workers.get(worker):
            view.beyond = {key: row for key, row in _keyed(rows).items() if key not in view.requests}

    def liveness(self, view: WorkerView) -> Liveness:
        """Whether the worker was heard of lately."""
        silent_s = self.now - view.heard_at
        return "live" if silent_s <= STALE_S else "stale" if silent_s <= GONE_S else "gone"

    def live(self) -> Iterator[WorkerView]:
        """Workers that were heard of lately."""
        return (view for view in self.workers.values() if self.now - view.heard_at <= STALE_S)

    def busy(self) -> set[str]:
        """Tenants with anything queued, running or held on a worker that counts. Another thread may ask, too."""
        views = list(self.workers.values())
        return set().union(*(view.busy for view in views if view.counted))

    def _mark(self, view: WorkerView) -> None:
        """All of a worker's tenants deserve a look; rows that did not change are their own old ones."""
        self.changed[view.worker] = {**view.tenants, **self.changed.get(view.worker, {})}

    def _succeeds(self, view: WorkerView | None, frame: Frame) -> bool:
        """Whether a frame of an incarnation that is not the current one begins its turn.

        Incarnations are ULIDs, so of two that live the later started wins; the other is reported as a rival. After
        one that fell silent whoever speaks has the turn, also if it had it before: nobody is locked out for good.
        """
        if view is None or frame.incarnation > view.incarnation or self.liveness(view) != "live":
            return True
        # A frame that is merely late is no rival.
        if self.now - view.since > STALE_S:
            self.rivals[frame.worker] = frame.incarnation
        self._remember(frame)
        return False

    def _remember(self, frame: Frame) -> None:
        """One that speaks may have the turn again: whatever else restarts meanwhile, it is the last to be forgotten."""
        retired = self._retired.get(frame.worker)
        if retired is not None and frame.incarnation in retired:
            retired.remove(frame.incarnation)
            retired.append(frame.incarnation)

    def _begin(self, frame: Frame, now: float) -> WorkerView:
        retired = self._retired.get(frame.worker)
        if returned := retired is not None and frame.incarnation in retired:
            retired.remove(frame.incarnation)
        view = WorkerView(
            frame, now, self.presence, self.served, self._seen, returned=returned, places=self._places
        )
        self.workers[frame.worker] = view
        return view

    def _end(self, view: WorkerView) -> None:
        self._retired.setdefault(view.worker, deque(maxlen=MAX_RETIRED)).append(view.incarnation)
        if len(self._retired) > 2 * MAX_WORKERS:
            first = next(iter(self._retired))
            del self._retired[next((name for name in self._retired if name not in self.workers), first)]
        # Whatever succeeds it begins from nothing.
        self.changed[view.worker] = dict.fromkeys(view.tenants)
        view.count(counted=False)
        del self.workers[view.worker]
        self._liveness.pop(view.worker, None)

    def validate(self) -> None:
        """Check every invariant; raises AssertionError."""
        for worker, view in self.workers.items():
            assert view.worker == worker
            assert view.incarnation not in self._retired.get(worker, ())
            assert all(name == row.tenant for name, row in view.tenants.items())
            assert view.heard_at <= self.now
            assert view.waiting == view.tenants.waiting()
            assert view.waiting <= view.busy <= view.tenants.keys()
        counted = {view.worker: view.waiting for view in self.workers.values() if view.counted}
        assert self.presence.waiting == {
            name: {worker for worker, names in counted.items() if name in names}
            for name in set().union(*counted.values())
        }
        assert all(len(retired) <= MAX_RETIRED for retired in self._retired.values())
