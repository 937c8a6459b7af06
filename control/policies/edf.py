"""Earliest deadline first, with QLM's estimate of who can still make it (SoCC'24, arXiv 2407.00047).

A request's deadline is for its first token: its arrival + the `slo_s` of its class. QLM estimates how long a request
waits from what waits ahead of it,

    W = Σ over requests ahead of expected output tokens ÷ Θ,        Θ: the worker's output tokens per second,

and keeps requests that cannot make it from ruining others. QLM solves a linear program over groups; for one queue
Moore's algorithm (Management Science 15, 1968) gives the most requests in time, exactly: go through them by due
time, and whenever one would be late, the longest so far is given up. Here, per worker:

    priority = deadline, in whole seconds, for requests that can make it     (negative)
               deadline, after all of these, for those that cannot           (positive)

Classes would run one after the other, so those that wait are moved into a class of their own, `line`, which comes
first and whose order is priority. There the priority *is* the deadline: whoever takes over reads it off the workers.
Whoever has none stays in its class, behind. Expected output is a moving average per tenant.

A class with caps of its own (of the table, or by `limit`) keeps them: its requests stay in it, by deadline among
themselves, behind the line. Moved, they would be bound by none of them.
"""

from collections.abc import Iterable
from typing import Annotated, ClassVar, Final, NamedTuple

import msgspec
from msgspec.structs import replace

from coxswain.control.estimates.predict import MovingAverage
from coxswain.control.estimates.rates import Rates
from coxswain.control.fleet import Fleet, RequestKey, WorkerView
from coxswain.control.policy import Directives, Sees, Tables
from coxswain.schemas.names import Token
from coxswain.schemas.policy import ClassPolicy, CutIn
from coxswain.schemas.status import ClassStatus, RequestStatus

SPAN: Final = 2**30
"""Priorities of deadlines: −SPAN … −1 in time, 1 … SPAN given up. They begin again every 34 years."""
RETURN: Final = 0.8
"""A request that was given up is taken back if it makes it in this part of the time: no flipping at the edge."""


def capped(row: ClassPolicy | ClassStatus) -> bool:
    """Whether a class may not have as many requests, or as long prompts, as it likes."""
    caps = row.max_running, row.max_queued, getattr(row, "max_prefill_tokens_per_step", None)
    return any(cap is not None for cap in caps)


class Job(NamedTuple):
    """A request as the algorithm sees it. Times in seconds from now."""

    key: RequestKey
    deadline: float
    """Its first token is due by then."""
    length: float
    """How long it takes the worker."""

    @property
    def due(self) -> float:
        """When it must end to have begun in time."""
        return self.deadline + self.length


def late(jobs: list[Job]) -> set[RequestKey]:
    """Moore's algorithm: who is given up so that the fewest begin after their deadline, one after the other."""
    kept: list[Job] = []
    given_up: set[RequestKey] = set()
    ahead = 0.0
    for job in sorted(jobs, key=lambda job: (job.due, job.key)):
        kept.append(job)
        ahead += job.length
        if ahead > job.due:
            longest = max(kept, key=lambda each: (each.length, each.due))
            kept.remove(longest)
            ahead -= longest.length
            given_up.add(longest.key)
    return given_up


class Edf:
    """Deadlines, as many as can be met."""

    name: ClassVar[str] = "edf"
    sees: ClassVar[Sees] = "queue"

    class Params(msgspec.Struct, frozen=True, kw_only=True):
        """How urgent requests get in, and what to expect of unknown ones."""

        cut_in: CutIn = "slots"
        """What a request may take from running ones with later deadlines, or with none."""
        line: Token = "deadline"
        """Name of the class in which they all wait."""
        expected_tokens: Annotated[float, msgspec.Meta(ge=1, le=1e9)] = 256.0
        """Output tokens of a request before any has ended."""
        every_s: Annotated[float, msgspec.Meta(ge=0, le=60)] = 0.2
        """How often the queue is looked through."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self._lengths = MovingAverage()
        self._rates = Rates()
        self._given_up: dict[str, set[RequestKey]] = {}
        self._tables = Tables()
        self._fleet = Fleet()
        self._directives = Directives()
        self._decided_at = float("-inf")

    def observe(self, fleet: Fleet, tables: Tables, now: float) -> None:  # noqa: ARG002
        """Learn how fast workers are and how long requests."""
        self._fleet, self._tables = fleet, tables
        self._rates.observe(fleet)
        for view in fleet.live():
            for row in view.left:
                self._lengths.learn(row)

    def decide(self, now: float) -> Directives:
        """A place in the line for everything that waits and has a deadline."""
        if now - self._decided_at >= self.params.every_s:
            self._decided_at = now
            views = [view for view in self._fleet.live() if view.complete]
            self._given_up = {view.worker: self._late_on(view, now) for view in views}
            self._directives = Directives(
                classes=self._classes(views),
                priorities={view.worker: self._priorities(view, now) for view in views},
                moves={view.worker: self._moves(view, now) for view in views},
            )
        return self._directives

    def _classes(self, views: Iterable[WorkerView]) -> dict[str, ClassPolicy]:
        """The table with our line before all others."""
        stay = set().union(*map(self._capped, views))
        rows = dict(self._tables.classes)
        best = replace(rows.get(self.params.line, ClassPolicy()), position=0, slo_s=None)
        # Only the order of positions counts: numbered anew they leave room for the line, whatever the table uses.
        places = sorted({row.position for row in rows.values()})
        behind = {
            name: replace(
                row,
                position=1 + places.index(row.position),
                order="priority" if name in stay else row.order,
            )
            for name, row in rows.items()
        }
        return {**behind, self.params.line: replace(best, order="priority", cut_in=self.params.cut_in)}

    def _moves(self, view: WorkerView, now: float) -> dict[RequestKey, str]:
        """Into the line with all that wait, but for those of classes with caps."""
        stay = self._capped(view)
        return {
            key: self.params.line
            for key, (row, _) in self._waiting(view, now).items()
            if row.class_ not in stay
        }

    def _capped(self, view: WorkerView) -> set[str]:
        """Classes with caps in the table or in force on the worker."""
        table = {name for name, row in self._tables.classes.items() if capped(row)}
        return (table | {name for name, row in view.classes.items() if capped(row)}) - {self.params.line}

    def _waiting(self, view: WorkerView, now: float) -> dict[RequestKey, tuple[RequestStatus, float]]:
        """What waits for its first token and has a deadline, with that."""
        found = {}
        for row in view.known():
            if row.state == "queued" and not row.output_tokens:
                deadline_s = self._deadline(row, now)
                if deadline_s is not None:
                    found[row.request, row.child] = row, deadline_s
        return found

    def _deadline(self, row: RequestStatus, now: float) -> float | None:
        return _deadline(row.priority, now) if row.class_ == self.params.line else row.deadline_s

    def _late_on(self, view: WorkerView, now: float) -> set[RequestKey]:
        """Requests of this worker that cannot begin in time, or would keep more others from it."""
        speed = self._rates.of(view.worker)
        if speed is None:
            return set()
        before, stay = self._given_up.get(view.worker, set()), self._capped(view)
        jobs = [
            Job(key, (deadline_s - now) * (RETURN if key in before else 1.0), self._length(row) / speed)
            for key, (row, deadline_s) in self._waiting(view, now).items()
            if row.class_ not in stay
        ]
        past = {job.key for job in jobs if job.deadline < 0.0}
        return past | late([job for job in jobs if job.key not in past])

    def _length(self, row: RequestStatus) -> float:
        return max(1.0, self._lengths.expect(row.tenant) or self.params.expected_tokens)

    def _priorities(self, view: WorkerView, now: float) -> dict[RequestKey, int]:
        given_up = self._given_up[view.worker]
        return {
            key: _priority(deadline_s, in_time=key not in given_up)
            for key, (_, deadline_s) in self._waiting(view, now).items()
        }


def _priority(deadline_s: float, *, in_time: bool) -> int:
    place = int(deadline_s) % SPAN
    return place - SPAN if in_time else place + 1


def _deadline(priority: int, now: float) -> float:
    """What `_priority` was made of: of all times with this place, the one nearest to now."""
    place = priority + SPAN if priority < 0 else priority - 1
    ahead = (place - int(now)) % SPAN
    return float(int(now) + (ahead if ahead < SPAN // 2 else ahead - SPAN))
