"""Whom to hold so that a tenant far behind may run: preemption for policies that count service. Pure.

VTC's bound holds for engines that cannot preempt: a tenant that arrives waits until something of the others ends
(OSDI'24, theorem 4.8: any such scheduler can be made to differ by wq × M). An engine that can hold need not.
Called by `policies.vtc`.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Final

from coxswain.control.fleet import Fleet, RequestKey, WorkerView
from coxswain.control.policy import Kv
from coxswain.schemas.status import RequestStatus
from coxswain.schemas.subjects import CONTROLLER

CALM: Final = 0.5
"""A held request goes on once its tenant is ahead by no more than this part of the gap: nobody flips at its edge."""


class Victims:
    """Chooses requests to hold, one more per worker and look at most; who is held already stays in view.

    Args:
        gap: how far, in virtual time, a tenant must be ahead of one that waits on the same worker.
    """

    def __init__(self, gap: float) -> None:
        self.gap = gap

    def choose(self, fleet: Fleet, virtual: Mapping[str, float]) -> dict[str, dict[RequestKey, Kv]]:
        """Per live worker, the requests that should be held."""
        return {
            view.worker: chosen
            for view in fleet.live()
            if view.waiting and (chosen := self._on(view, virtual))
        }

    def _on(self, view: WorkerView, virtual: Mapping[str, float]) -> dict[RequestKey, Kv]:
        """Whole requests: one is held with all its children."""
        least = min(virtual.get(tenant, 0.0) for tenant in view.waiting)
        children: defaultdict[str, list[RequestStatus]] = defaultdict(list)
        for row in view.known():
            children[row.request].append(row)
        chosen: list[list[RequestStatus]] = []
        running: list[list[RequestStatus]] = []
        for rows in children.values():
            by = virtual.get(rows[0].tenant, 0.0) - least
            if by > CALM * self.gap and any(CONTROLLER in row.held_by for row in rows):
                chosen.append(rows)
            if by > self.gap and any(row.state == "running" for row in rows):
                running.append(rows)
        if running:
            chosen.append(min(running, key=_kv))
        return {(row.request, row.child): "keep" for rows in chosen for row in rows}


def _kv(rows: list[RequestStatus]) -> tuple[int, str]:
    """How much KV a request has: the one with the least keeps the least from others, or loses the least."""
    tokens = sum(row.prompt_tokens + row.output_tokens for row in rows if row.state == "running")
    return tokens, rows[0].request
