"""How many requests may run so that their KV lasts: what keeps vLLM from preempting what it has just admitted. Pure.

vLLM lets a request in when its prompt fits. Output comes later: with a queue that never ends the pool is always full,
and every request that grows throws another one out, whose work is done again. Here as many may run as have a part of
the pool together, by what one of those that run has had on average lately. A worker is bounded once it loses KV, until
its queue has ended. What that takes is the head of its frames: nobody looks at single requests for it. Called by
`policies.vtc`.

Workers bound classes, not the sum of them, so what may run is divided between classes. A share changes only when
somebody waits at it: at each look half of what others leave unused goes there, so that they keep some for who comes;
and if they leave nothing, a place of the worst class that is admitted after it. Classes that may cut in are not
bounded, since a cap is what nobody cuts in on; what they run is taken from what the others may.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Final

from coxswain.control.fleet import WorkerView
from coxswain.schemas.policy import ClassPolicy

SPAN_S: Final = 30.0
"""Over which time what a request has is averaged: requests that came together have little, later much."""
CALM_S: Final = 60.0
"""A worker on which nobody has waited for so long is bounded no more."""
STEADY: Final = 1.0
NEAR: Final = 0.1
"""A cap moves when what it should be is further off than `STEADY`, or than that part of it if this is less: it does not
follow every request that ends, and one or two places more are much where there are few."""
FEW: Final = 4
"""Below so many, what may run is rounded up: where two nearly fit, one alone would leave half of the pool unused."""
LOOK_S: Final = 5.0
"""What is seen stands for no longer than this, however long nobody looked, or wherever the clock jumped."""
PLAIN: Final = ClassPolicy()


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
        frame, passed, self.at = view.frame, min(LOOK_S, now - self.at), now
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
        if known.cap is not None:
            off = min(STEADY, NEAR * known.cap)
            if _places(wanted - off) <= known.cap <= _places(wanted + off):
                return known.cap
        known.cap = _places(wanted)
        return known.cap

    def shares(self, view: WorkerView, table: Mapping[str, ClassPolicy]) -> dict[str, int]:
        """How many of each class may run on a worker: of all together as many as `cap`, and one of each in any case.

        Args:
            view: the worker.
            table: the class table. Classes that may cut in are not bounded.
        """
        if (most := self.cap(view)) is None:
            self._shares.pop(view.worker, None)
            return {}
        rows = {name: table.get(name, PLAIN) for name in view.classes}
        best_first = sorted(rows, key=lambda name: (rows[name].position, name))
        order = [name for name in best_first if rows[name].cut_in == "off"]
        if not order:
            return {}
        running = {name: view.classes[name].running for name in order}
        most -= sum(view.classes[name].running for name in rows if name not in running)
        old = self._shares.get(view.worker, running)
        shares = self._shares[view.worker] = {name: old.get(name, 0) for name in order}
        waits = [
            name
            for name in order
            if view.classes[name].queued
            and running[name] >= max(1, shares[name])
            and not _at(rows[name].max_running, running[name])
        ]
        _fit(shares, running, most, waits)
        if waits:
            _give(shares, running, waits)
        return {name: max(1, share) for name, share in shares.items()}


def _places(wanted: float) -> int:
    return max(1, int(wanted) if wanted >= FEW else ceil(wanted))


def _at(cap: int | None, running: int) -> bool:
    """Whether it is the operators' cap that keeps more from running, so that a larger share is of no use."""
    return cap is not None and running >= cap


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
