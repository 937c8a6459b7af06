"""How fast each worker works, from its cumulative totals. Pure; called by policies that estimate time."""

from math import exp
from typing import Final, NamedTuple

from coxswain.control.fleet import Fleet, WorkerView

SMOOTH_S: Final = 5.0
"""Time constant of the average: a few times what one request lasts would hide a change for too long."""


class Mark(NamedTuple):
    """How much an incarnation had delivered when it was last heard of."""

    incarnation: str
    at: float
    tokens: int


class Rates:
    """Output tokens per second of each worker while anything waits there: what it can do, not what is asked of it."""

    def __init__(self) -> None:
        self._rate: dict[str, float] = {}
        self._marks: dict[str, Mark] = {}

    def observe(self, fleet: Fleet) -> None:
        """Take what the workers delivered since the last look; call at every look."""
        for worker in self._marks.keys() - fleet.workers.keys():
            del self._marks[worker]
            self._rate.pop(worker, None)
        for view in fleet.workers.values():
            if view.complete:
                self._look(view)

    def _look(self, view: WorkerView) -> None:
        worker, before = view.worker, self._marks.get(view.worker)
        if before is not None and before.at == view.heard_at:
            return
        tokens = sum(row.output_tokens_total for row in view.rows.values())
        self._marks[worker] = Mark(view.incarnation, view.heard_at, tokens)
        if before is None or before.incarnation != view.incarnation or not view.waiting:
            return
        since = view.heard_at - before.at
        rate, old_rate = (tokens - before.tokens) / since, self._rate.get(worker)
        share = 1.0 if old_rate is None else 1.0 - exp(-since / SMOOTH_S)
        self._rate[worker] = rate if old_rate is None else old_rate + (rate - old_rate) * share

    def of(self, worker: str) -> float | None:
        """Tokens per second; None before the worker was seen busy."""
        return self._rate.get(worker) or None
