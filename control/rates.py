"""How fast each worker works, from its cumulative totals. Pure; called by policies that estimate time."""

from math import exp
from typing import Final

from coxswain.control.fleet import Fleet

SMOOTH_S: Final = 5.0
"""Time constant of the average: a few times what one request lasts would hide a change for too long."""


class Rates:
    """Output tokens per second of each worker while anything waits there: what it can do, not what is asked of it."""

    def __init__(self) -> None:
        self._rate: dict[str, float] = {}
        self._at: dict[str, float] = {}

    def observe(self, fleet: Fleet, now: float) -> None:
        """Take what the workers delivered since the last look; call at every look."""
        for worker in self._at.keys() - fleet.workers.keys():
            del self._at[worker]
            self._rate.pop(worker, None)
        for worker, tenants in fleet.changed.items():
            view = fleet.workers.get(worker)
            if view is None or not view.complete:
                continue
            tokens = sum(
                view.tenants[tenant].output_tokens_total - old.output_tokens_total
                for tenant, old in tenants.items()
                if old is not None
            )
            since = now - self._at.get(worker, now)
            self._at[worker] = now
            if since <= 0.0 or not view.waiting:
                continue
            rate, old_rate = tokens / since, self._rate.get(worker)
            share = 1.0 if old_rate is None else 1.0 - exp(-since / SMOOTH_S)
            self._rate[worker] = rate if old_rate is None else old_rate + (rate - old_rate) * share

    def of(self, worker: str) -> float | None:
        """Tokens per second; None before the worker was seen busy."""
        return self._rate.get(worker) or None
