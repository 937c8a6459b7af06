"""How many requests may run so that their KV lasts: what keeps vLLM from preempting what it has just admitted. Pure.

vLLM lets a request in when its prompt fits. Output comes later: with a queue that never ends the pool is always full,
and every request that grows throws another one out, whose work is done again. Here those that run leave a part of the
pool for what they will have. Below a low mark, as many more may run as the room below it holds of the size of those
that run; above a high mark, no more than run then; between the two, the number stays. So few caps are sent, and
requests that came together do not end together for ever, as they do under a constant cap: while they are small, others
come between them. A worker is bounded once it loses KV, until its queue has ended. What that takes is the head of its
frames: nobody looks at single requests for it. Called by `policies.vtc`.

Workers bound classes, not the sum of them, so what may run is divided between classes. A share changes only when
somebody waits at it: at each look half of what others leave unused goes there, so that they keep some for who comes;
and if they leave nothing, a place of the worst class that is admitted after it. Classes that may cut in are not
bounded, since a cap is what nobody cuts in on; what they run is taken from what the others may.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from coxswain.control.fleet import WorkerView
from coxswain.schemas.policy import INT32_MAX, ClassPolicy

CALM_S: Final = 60.0
"""A worker on which nobody has waited for so long is bounded no more."""
PLAIN: Final = ClassPolicy()


class _Worker:
    """What is known of one incarnation of a worker."""

    __slots__ = ("cap", "crowded_at", "incarnation", "lost_total")

    def __init__(self, view: WorkerView) -> None:
        self.incarnation = view.incarnation
        self.lost_total = view.frame.preempted_total
        self.crowded_at: float | None = None
        """When somebody last waited, since it lost KV; None: it has lost none."""
        self.cap: int | None = None

    def look(self, view: WorkerView, now: float) -> None:
        frame = view.frame
        lost, self.lost_total = frame.preempted_total != self.lost_total, frame.preempted_total
        if lost or (self.crowded_at is not None and frame.queued):
            self.crowded_at = now
        elif self.crowded_at is not None and now - self.crowded_at > CALM_S:
            self.crowded_at = self.cap = None


class Crowd:
    """Bounds how many run on each worker that loses KV, until nobody waits there.

    Args:
        fill: the low mark, as a part of the pool; the high one is halfway between it and the whole.
    """

    def __init__(self, fill: float) -> None:
        self.low = fill
        self.high = (1.0 + fill) / 2
        self._workers: dict[str, _Worker] = {}
        self._shares: dict[str, dict[str, int]] = {}
        """Per worker, what of its cap each class has."""

    def look(self, view: WorkerView, now: float) -> None:
        """Take note of what a worker's last frame says of its KV."""
        known = self._workers.get(view.worker)
        if known is None or known.incarnation != view.incarnation:
            known = self._workers[view.worker] = _Worker(view)
        known.look(view, now)

    def forget(self, worker: str) -> None:
        """The worker is gone for good."""
        self._workers.pop(worker, None)
        self._shares.pop(worker, None)

    def cap(self, view: WorkerView) -> int | None:
        """How many may run on a worker; None while it is not bounded."""
        known, frame = self._workers.get(view.worker), view.frame
        if known is None or known.crowded_at is None:
            return None
        used, total = frame.kv_blocks.used - frame.kv_blocks.held, frame.kv_blocks.total
        if frame.running and used > 0:
            if known.cap is None or used > self.high * total:
                known.cap = frame.running
            if (room := self.low * total - used) > 0:
                more = int(room * frame.running / used)
                known.cap = min(INT32_MAX, max(known.cap, frame.running + more))
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
