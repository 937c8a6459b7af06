"""How many requests may run so that their KV lasts: what keeps vLLM from preempting what it has just admitted. Pure.

vLLM lets a request in when its prompt fits. Output comes later: with a queue that never ends the pool is always full,
and every request that grows throws another one out, whose work is done again. Here as many may run as have a part of
the pool together, by what one of those that run has had on average lately. A worker is bounded once it loses KV, until
its queue has ended. What that takes is the head of its frames: nobody looks at single requests for it. Called by
`policies.vtc`.

Workers bound classes, not the sum of them, so what may run is divided between classes. A share changes only when
somebody waits at it: at each look half of what others leave unused goes there, so that they keep some for who comes;
and if they leave nothing, a place of the worst class that is admitted after it.
"""

from collections.abc import Sequence
from typing import Final

from coxswain.control.fleet import WorkerView

SPAN_S: Final = 30.0
"""Over which time what a request has is averaged: requests that came together have little, later much."""
CALM_S: Final = 60.0
"""A worker on which nobody has waited for so long is bounded no more."""
STEADY: Final = 1.0
"""A cap moves when what it should be is further off than this: it does not follow every request that ends."""


class _Worker:
    """What is known of one incarnation of a worker."""

    __slots__ = ("at", "blocks", "cap", "crowded_at", "incarnation", "lost_total", "running", "since")

    def __init__(self, view: WorkerView, now: float) -> None:
        self.incarnation = view.incarnation
        self.since = self.at = now
        self.blocks = self.running = 0.0
        """Means over the last `SPAN_S` in which anything ran: blocks of those that run, and how many they are."""
        self.lost_total = view.frame.preempted_total
        self.crowded_at: float | None = None
        """When somebody last waited, since it lost KV; None: it has lost none."""
        self.cap: int | None = None

    def look(self, view: WorkerView, now: float) -> None:
        frame, passed, self.at = view.frame, now - self.at, now
        lost, self.lost_total = frame.preempted_total != self.lost_total, frame.preempted_total
        if lost or (self.crowded_at is not None and frame.queued):
            self.crowded_at = now
        elif self.crowded_at is not None and now - self.crowded_at > CALM_S:
            self.crowded_at = self.cap = None
        if frame.running and passed > 0:
            part = passed / max(passed, min(SPAN_S, now - self.since))
            self.blocks += part * (frame.kv_blocks.used - frame.kv_blocks.held - self.blocks)
            self.running += part * (frame.running - self.running)


class Crowd:
    """Bounds how many run on each worker that loses KV, until nobody waits there.

    Args:
        fill: the part of the pool that those who run may have together on average; the rest is for when they have more.
    """

    def __init__(self, fill: float) -> None:
        self.fill = fill
        self._workers: dict[str, _Worker] = {}
        self._shares: dict[str, dict[str, int]] = {}
        """Per worker, what of its cap each class has."""

    def look(self, view: WorkerView, now: float) -> None:
        """Take note of what a worker's last frame says of its KV."""
        known = self._workers.get(view.worker)
        if known is None or known.incarnation != view.incarnation:
            known = self._workers[view.worker] = _Worker(view, now)
        known.look(view, now)

    def forget(self, worker: str) -> None:
        """The worker is gone for good."""
        self._workers.pop(worker, None)
        self._shares.pop(worker, None)

    def cap(self, view: WorkerView) -> int | None:
        """How many may run on a worker; None while it is not bounded."""
        known = self._workers.get(view.worker)
        if known is None or known.crowded_at is None or known.blocks <= 0:
            return None
        wanted = self.fill * view.frame.kv_blocks.total * known.running / known.blocks
        cap = known.cap
        if cap is None or not cap - STEADY < wanted < cap + 1 + STEADY:
            known.cap = cap = max(1, int(wanted))
        return cap

    def shares(self, view: WorkerView, order: Sequence[str]) -> dict[str, int]:
        """How many of each class may run on a worker: of all together as many as `cap`, and one of each in any case.

        Args:
            view: the worker.
            order: its classes, the best first.
        """
        if (most := self.cap(view)) is None:
            self._shares.pop(view.worker, None)
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
