"""What was served of late: service and output tokens per tenant and worker in a moving window. Pure.

Is told by a `Fleet` of every row that changes; called by `overview.py`.
"""

from collections import defaultdict, deque
from statistics import median
from typing import Final, NamedTuple

from coxswain.control.fleet import Fleet
from coxswain.schemas.status import Frame, TenantStatus

MAX_SAMPLES: Final = 256
"""First tokens remembered per tenant."""
TINY: Final = 1e-6


class Sums(NamedTuple):
    """What was served in some time."""

    service: defaultdict[str, float]
    """Per tenant: tokens × price."""
    tokens: defaultdict[str, float]
    """Per tenant: output tokens."""
    by_worker: defaultdict[str, float]
    """Per worker: output tokens."""


def _nothing() -> Sums:
    return Sums(defaultdict(float), defaultdict(float), defaultdict(float))


class Recent:
    """A window of `window_s` seconds over what the workers charged and delivered."""

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self.sums = _nothing()
        """Of the window."""
        self._part = _nothing()
        """Since the last look."""
        self._parts: deque[tuple[float, Sums]] = deque()
        self._began: float | None = None

    def take(self, worker: str, row: TenantStatus, old: TenantStatus) -> None:
        """A worker says so of a tenant, and said something else before."""
        part = self._part
        # `charged` is divided by the weight in force, so that times it is what the work costs.
        part.service[row.tenant] += (row.charged - old.charged) * row.weight
        tokens = row.output_tokens_total - old.output_tokens_total
        part.tokens[row.tenant] += tokens
        part.by_worker[worker] += tokens

    def look(self, now: float) -> None:
        """Count what was taken since the last look, and forget what is too old."""
        if self._began is None:
            self._began = now
        part, self._part = self._part, _nothing()
        self._parts.append((now, part))
        self._add(part, 1.0)
        while self._parts[0][0] <= now - self.window_s:
            self._add(self._parts.popleft()[1], -1.0)

    def span_s(self, now: float) -> float:
        """How much of the window we have seen."""
        return 0.0 if self._began is None else min(self.window_s, now - self._began)

    def _add(self, part: Sums, sign: float) -> None:
        for mine, its in zip(self.sums, part, strict=True):
            for name, amount in its.items():
                mine[name] += sign * amount
                if abs(mine[name]) < TINY:  # nothing, but for the rounding of sums
                    del mine[name]


class FirstTokens:
    """Time to first token as frames show it: exact to the time between two frames."""

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self._seen: dict[str, deque[tuple[float, float]]] = {}

    def observe(self, fleet: Fleet, frame: Frame, now: float) -> None:
        """Look at a frame before the fleet merges it: who had said nothing in the last one, and has now?"""
        view = fleet.workers.get(frame.worker)
        if view is None or view.incarnation != frame.incarnation:
            return
        for row in frame.requests:
            if not row.output_tokens:
                continue
            old = view.requests.get((row.request, row.child))
            if old is not None and not old.output_tokens:
                seen = self._seen.setdefault(row.tenant, deque(maxlen=MAX_SAMPLES))
                seen.append((now, max(0.0, frame.sent_at - row.arrived_at)))

    def median_s(self, tenant: str, now: float) -> float | None:
        """The median of those of late; None if there was none."""
        seen = self._seen.get(tenant)
        while seen and seen[0][0] <= now - self.window_s:
            seen.popleft()
        if not seen:
            self._seen.pop(tenant, None)
            return None
        return median(ttft_s for _, ttft_s in seen)
