"""What a controller counts of itself, and its page of it: `cox controller --metrics`. Names: `schemas/metrics.py`.

`Meter` is plain numbers: the daemon adds to them as things happen, at no cost worth measuring, asked or not.
prometheus_client is imported only to serve them, from a thread of its own: a slow reader delays no step.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any, Final

from coxswain import __version__
from coxswain.control.errors import ControlError
from coxswain.control.fleet import Fleet
from coxswain.schemas import metrics as names
from coxswain.schemas.errors import Code
from coxswain.schemas.metrics import Metric
from coxswain.schemas.names import OTHER
from coxswain.schemas.policy import Epoch

STEP_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
LAG_BUCKETS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
NOBODY: Final = "none"
"""The code of commands that nobody answered."""
CODES: Final = frozenset(map(int, Code))

Sample = tuple[Metric, float, tuple[str, ...]]


class PortTakenError(ControlError):
    """The address for `/metrics` cannot be listened on."""


class Histogram:
    """Counts by bucket."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Note a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, int]]:
        """As Prometheus wants them: upper bound, and how many are not above it."""
        bounds = [*map(str, self.bounds), "+Inf"]
        return list(zip(bounds, accumulate(self.counts), strict=True))


class Meter:
    """What happened in one controller since it started.

    Args:
        fleet: the fleet's name.
        controller: ours.
        policy: the policy's.
        view: what it sees of workers.
    """

    def __init__(self, fleet: str, controller: str, policy: str, view: Fleet) -> None:
        self.connected = False
        self.steps = Histogram(STEP_BUCKETS_S)
        self.lags = Histogram(LAG_BUCKETS_S)
        self.frames = 0
        self.lost = Counter({"impostor": 0, "unreadable": 0})
        """Frames, by why they were not taken."""
        self.sent: Counter[str] = Counter()
        """Commands, by verb."""
        self.refused: Counter[tuple[str, str]] = Counter()
        """Commands, by verb and code."""
        self.ranks = self.terms = self.policy_failures = 0
        self.rows: dict[str, tuple[int, int]] = {}
        """By table: rows in force, and refused."""
        self._who = (controller, policy, __version__)
        self._fleet = fleet
        self._view = view
        self._epoch: Epoch | None = None
        self._since = 0.0

    def lead(self, epoch: Epoch | None) -> None:
        """We lead with this epoch, or do not; call at every step."""
        if epoch != self._epoch:
            self._epoch, self._since = epoch, time.monotonic()
            self.terms += epoch is not None

    def refuse(self, verb: str, code: int | None) -> None:
        """A command was refused, or not answered; of what workers answer there are no more codes than we know of."""
        label = NOBODY if code is None else str(code) if code in CODES else OTHER
        self.refused[verb, label] += 1

    def samples(self) -> Iterator[Sample]:
        """Every value but those of histograms. Called from another thread."""
        yield names.CONTROLLER_INFO, 1, self._who
        yield names.CONTROLLER_CONNECTED, self.connected, ()
        leading = self._epoch is not None
        yield names.CONTROLLER_LEADING, leading, ()
        yield names.CONTROLLER_LEADING_SECONDS, time.monotonic() - self._since if leading else 0.0, ()
        yield names.CONTROLLER_TERMS, self.terms, ()
        views = list(self._view.workers.values())
        alive = Counter(self._view.liveness(view) for view in views)
        for liveness in ("live", "stale", "gone"):
            yield names.CONTROLLER_WORKERS, alive[liveness], (liveness,)
        live = [view.frame for view in views if self._view.liveness(view) == "live"]
        for state in ("queued", "running", "held"):
            yield names.CONTROLLER_REQUESTS, sum(getattr(frame, state) for frame in live), (state,)
        yield names.CONTROLLER_TENANTS, len(self._view.busy()), ()
        yield names.CONTROLLER_FRAMES, self.frames, ()
        yield from _split(names.CONTROLLER_FRAMES_LOST, self.lost)
        yield from _split(names.CONTROLLER_COMMANDS, self.sent)
        for (verb, code), count in sorted(self.refused.copy().items()):
            yield names.CONTROLLER_REFUSED, count, (verb, code)
        yield names.CONTROLLER_RANKS, self.ranks, ()
        yield names.CONTROLLER_POLICY_FAILURES, self.policy_failures, ()
        for table, (good, refused) in sorted(self.rows.copy().items()):
            yield names.CONTROLLER_TABLE_ROWS, good, (table,)
            yield names.CONTROLLER_TABLE_REFUSED, refused, (table,)

    def describe(self) -> list[Any]:
        """Nothing: prometheus_client would collect at registration to learn names."""
        return []

    def collect(self) -> Iterator[Any]:
        """Families of prometheus_client."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        families: dict[str, Any] = {}
        for metric, value, labels in self.samples():
            if metric.name not in families:
                made = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                families[metric.name] = made(metric.name, metric.help, labels=metric.labels)
            families[metric.name].add_metric((self._fleet, *labels), value)
        yield from families.values()
        for metric, histogram in (
            (names.CONTROLLER_STEP, self.steps),
            (names.CONTROLLER_FRAME_LAG, self.lags),
        ):
            family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
            family.add_metric((self._fleet,), histogram.buckets(), histogram.sum)
            yield family


def _split(metric: Metric, counts: Mapping[str, int]) -> Iterator[Sample]:
    for label, count in sorted(dict(counts).items()):
        yield metric, count, (label,)


def serve(meter: Meter, host: str, port: int) -> Callable[[], None]:
    """Serve the meter, and what the process uses, on `http://host:port/metrics`; call what is returned to stop.

    Raises:
        PortTakenError: if the address cannot be listened on.
    """
    from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

    registry = CollectorRegistry()
    registry.register(meter)
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(port, host, registry)
    except (OSError, OverflowError) as error:
        raise PortTakenError(f"metrics cannot be served on {host}:{port}: {error}") from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(5)

    return stop
