"""How many requests may run so that their KV lasts: what keeps vLLM from preempting what it has just admitted. Pure.

vLLM lets a request in when its prompt fits. Output comes later: with a queue that never ends the pool is always full,
and every request that grows throws another one out, whose work is done again. Here as many may run as the pool holds
of what a request has over its life: its prompt and, on average, half of its output, where those that say much are there
for longer. By requests that ended lately. Called by `policies.vtc`.

Workers bound classes, not the sum of them, so what may run is divided between classes. A share changes only when
somebody waits at it: at each look half of what others leave unused goes there, so that they keep some for who comes;
and if they leave nothing, a place of the worst class that is admitted after it.
"""

from collections.abc import Sequence
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
        self._shares: dict[str, dict[str, int]] = {}
        """Per worker, what of its cap each class has."""

    def learn(self, row: RequestStatus) -> None:
        """A request ended; `row` is the last that was heard of it."""
        self._ended += 1
        part = max(1.0 - KEPT, 1.0 / self._ended)
        self._output += part * (row.output_tokens - self._output)
        steps = row.output_tokens * (row.prompt_tokens + row.output_tokens / 2)
        self._token_steps += part * (steps - self._token_steps)

    def forget(self, worker: str) -> None:
        """The worker is gone for good."""
        self._caps.pop(worker, None)
        self._shares.pop(worker, None)

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

    def shares(self, view: WorkerView, order: Sequence[str]) -> dict[str, int]:
        """How many of each class may run on a worker: of all together as many as `cap`, and one of each in any case.

        Args:
            view: the worker.
            order: its classes, the best first.
        """
        if (most := self.cap(view)) is None:
            return {}
        running = {name: view.classes[name].running for name in order}
        old = self._shares.get(view.worker, running)
        shares = self._shares[view.worker] = {name: old.get(name, 0) for name in order}
        waits = [
            name for name in order if view.classes[name].queued and running[name] >= max(1, shares[name])
        ]
        _fit(shares, running, most, waits)
        if waits:
            _give(shares, running, waits)
        return {name: max(1, share) for name, share in shares.items()}


def _fit(shares: dict[str, int], running: dict[str, int], most: int, waits: Sequence[str]) -> None:
    """Make them `most` together: more for who waits, or runs most; less from the worst, of what is unused first."""
    more = most - sum(shares.values())
    if more > 0:
        shares[waits[0] if waits else max(shares, key=running.__getitem__)] += more
    for keep in (running, dict.fromkeys(shares, 0)):
        for name in reversed(shares):
            less = max(0, min(-more, shares[name] - keep[name]))
            shares[name] -= less
            more += less


def _give(shares: dict[str, int], running: dict[str, int], waits: Sequence[str]) -> None:
    """Let the best that waits have half of what each other leaves unused; failing that, a place of the worst class."""
    best = waits[0]
    taken = {name: (shares[name] - running[name]) // 2 for name in shares if name not in waits}
    if not any(some > 0 for some in taken.values()):
        worst = next(name for name in reversed(shares) if name == best or shares[name] > 1)
        taken = {} if worst == best else {worst: 1}
    for name, some in taken.items():
        shares[name] -= max(0, some)
        shares[best] += max(0, some)
