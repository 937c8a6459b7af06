"""How many requests may run so that their KV lasts: what keeps vLLM from preempting what it has just admitted. Pure.

vLLM lets a request in when its prompt fits. Output comes later: with a queue that never ends the pool is always full,
and every request that grows throws another one out, whose work is done again. Here as many may run as the pool holds
of what a request has over its life: its prompt and, on average, half of its output, where those that say much are there
for longer. By requests that ended lately. Called by `policies.vtc`.
"""

from typing import Final

from coxswain.control.fleet import WorkerView
from coxswain.schemas.status import RequestStatus

KEPT: Final = 0.98
"""What of the mean is left after one more request ended: it is that of the last fifty or so."""
ENOUGH: Final = 20
"""Requests that must have ended before their mean says anything."""
STEADY: Final = 1.0
"""A cap moves when what it should be is further off than this: it does not follow every request that ends."""


class Crowd:
    """Bounds how many run on each worker.

    Args:
        fill: the part of the pool that those who run may have together on average; the rest is for when they have more.
    """

    def __init__(self, fill: float) -> None:
        self.fill = fill
        self._ended = 0
        self._output = 0.0
        """Mean output tokens of requests that ended: one a step, so that is for how long they were there."""
        self._token_steps = 0.0
        """Mean tokens that they had, summed over the steps of their lives."""
        self._caps: dict[str, int] = {}

    def learn(self, row: RequestStatus) -> None:
        """A request ended; `row` is the last that was heard of it."""
        self._ended += 1
        part = max(1.0 - KEPT, 1.0 / self._ended)
        self._output += part * (row.output_tokens - self._output)
        steps = row.output_tokens * (row.prompt_tokens + row.output_tokens / 2)
        self._token_steps += part * (steps - self._token_steps)

    def cap(self, view: WorkerView) -> int | None:
        """How many may run on a worker; None while there is no telling."""
        with_kv = [row for row in view.requests.values() if row.state == "running" or row.kv == "kept"]
        tokens = sum(row.prompt_tokens + row.output_tokens for row in with_kv)
        blocks = view.frame.kv_blocks
        if self._ended < ENOUGH or not tokens or not blocks.used or not self._token_steps:
            return self._caps.get(view.worker)
        # Blocks that a token takes are those that it takes now: with a cache and parts of blocks nobody can say.
        wanted = self.fill * blocks.total / (blocks.used / tokens * self._token_steps / self._output)
        cap = self._caps.get(view.worker)
        if cap is None or not cap - STEADY < wanted < cap + 1 + STEADY:
            self._caps[view.worker] = cap = max(1, int(wanted))
        return cap
