"""Whom to hold so that a tenant far behind may run: preemption for policies that count service. Pure.

VTC's bound holds for engines that cannot preempt: a tenant that arrives waits until something of the others ends
(OSDI'24, theorem 4.8: any such scheduler can be made to differ by wq × M). An engine that can hold need not.
Called by `policies.vtc`.
"""

from collections.abc import Mapping
from typing import Final

from coxswain.control.fleet import Fleet, RequestKey, WorkerView
from coxswain.control.policy import Kv
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
        least = min(virtual.get(tenant, 0.0) for tenant in view.waiting)
        ahead = [
            (virtual.get(row.tenant, 0.0) - least, key, row)
            for key, row in view.requests.items()
            if row.state != "queued"
        ]
        held: dict[RequestKey, Kv] = {
            key: "keep" for by, key, row in ahead if CONTROLLER in row.held_by and by > CALM * self.gap
        }
        # The one with the least KV: it keeps the least from others, or loses the least if it must give that up.
        running = [
            (row.prompt_tokens + row.output_tokens, key)
            for by, key, row in ahead
            if row.state == "running" and by > self.gap
        ]
        if running:
            held[min(running)[1]] = "keep"
        return held
