"""Steering's numbers on vLLM's own `/metrics`, from the status frames of the workers behind a server.

The engine does nothing for it, and the server keeps only the last frames, which it decodes when somebody asks. Where
vLLM runs several API server processes any of them may be asked: they share what was counted by a file in the folder
where prometheus_client's processes share theirs.

Called by `status.py` (frames) and `asgi.py` (requests for the page).
"""

import asyncio
import contextlib
import fcntl
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from coxswain.common.logs import get_logger
from coxswain.schemas import metrics as names
from coxswain.schemas.errors import UNREADABLE
from coxswain.schemas.metrics import LONG_SILENT_S, Metric
from coxswain.schemas.names import OTHER
from coxswain.schemas.parts import Assembler, Parts
from coxswain.schemas.status import Frame, decode_glance
from coxswain.service.edge.tally import TENANT_FIELDS, Life, Tally
from coxswain.service.edge.views import EdgeFrame

STATES: Final = ("serving", "draining", "paused")
MAX_LIVES: Final = 4
"""Incarnations of a worker that may end between two visits and still be counted to their last full frame."""

UNTOLD: Final = b"# Families of tenants are shown to an API key made with --metrics.\n"

Raw = tuple[float, list[bytes]]
"""A full frame in its parts, and when it came (Unix s)."""

_read_tally: Final = msgspec.msgpack.Decoder(Tally).decode


class Latest:
    """The last full frame of each incarnation and what came after it, as bytes: what it costs while nobody asks."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[tuple[str, int], Raw]] = {}
        """The last frame of each worker, of any kind: its incarnation and number, and itself."""
        self._lives: dict[tuple[str, str], Raw] = {}
        self._parts: defaultdict[str, Parts[bytes]] = defaultdict(Parts)

    def keep(self, seen: EdgeFrame, payload: bytes, now: float) -> None:
        """Note a frame that came at `now` (Unix s); one in parts when its last is there."""
        number = (seen.incarnation, seen.seq)
        if seen.worker not in self._said or number >= self._said[seen.worker][0]:
            self._said[seen.worker] = number, (now, [payload])
        if not seen.full:
            return
        parts = self._parts[seen.worker].add(seen, payload)
        if parts is None:
            return
        key = (seen.worker, seen.incarnation)
        self._lives.pop(key, None)
        self._lives[key] = (now, parts)
        mine = [each for each in self._lives if each[0] == seen.worker]
        for each in mine[:-MAX_LIVES]:
            del self._lives[each]

    def take(self) -> tuple[list[Raw], list[Raw]]:
        """Full frames, oldest first, and each worker's last of any kind. Decode them elsewhere.

        Incarnations that have ended are not kept after that.
        """
        taken = list(self._lives.values())
        newest = {worker: (worker, incarnation) for worker, incarnation in self._lives}
        self._lives = {key: self._lives[key] for key in newest.values()}
        return taken, [raw for _, raw in self._said.values()]


class EdgeMetrics:
    """The page.

    Args:
        fleet: the fleet's name.
        server: the workers' name without a rank.
        tenants: how many have a series of their own.
        shared: a folder shared by all API server processes, or None if there is one.
        log: a structlog logger; our own by default.
    """

    def __init__(
        self, fleet: str, server: str, tenants: int, shared: Path | None = None, log: Any = None
    ) -> None:
        self.latest = Latest()
        self.connected = False
        self._fleet = fleet
        self._server = server
        self._file = None if shared is None else shared / "coxswain-tally"
        self._tally = Tally(tenants)
        self._lock = threading.Lock()
        """Two may ask at once."""
        self._log = log or get_logger(fleet=fleet)
        self._failing = False

    async def page(self, *, tenants: bool = True) -> bytes:
        """All families in Prometheus's text format, made in a thread: tokens are streamed meanwhile.

        Without `tenants` a comment stands for theirs. Nothing where they cannot be made: it is logged once, and what
        is vLLM's is answered all the same.
        """
        try:
            made = await asyncio.to_thread(self._page, *self.latest.take(), tenants=tenants)
        except Exception:  # noqa: BLE001 - whatever it was, vLLM's page must not go with ours
            if not self._failing:
                self._log.exception("metrics.failed")
            self._failing = True
            return b""
        self._failing = False
        return made

    def _page(self, taken: list[Raw], said: list[Raw], *, tenants: bool) -> bytes:
        from prometheus_client import generate_latest

        now = time.time()
        with self._lock:
            tally = self._count(list(_whole(taken)), list(_decoded(said)), now)
            families = _families(
                tally, self._fleet, self._server, now, connected=self.connected, tenants=tenants
            )
            return generate_latest(_Families(families)) + (b"" if tenants else UNTOLD)

    def _count(self, frames: list[tuple[float, Frame]], said: list[tuple[float, Frame]], now: float) -> Tally:
        """The tally with what came since, this process's or that of all."""
        if self._file is None:
            self._tally.take(frames, now)
            self._tally.hear(said)
            return self._tally
        lock, new = self._file.with_suffix(".lock"), self._file.with_suffix(".new")
        with os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)) as locked:
            fcntl.flock(locked, fcntl.LOCK_EX)
            if self._file.exists():
                self._tally = self._read(self._file)
            self._tally.take(frames, now)
            self._tally.hear(said)
            # Beside it, then in its place: a full disk, or a process that is killed here, leaves what was there before.
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(msgspec.msgpack.encode(self._tally))
            new.replace(self._file)
        return self._tally

    def _read(self, file: Path) -> Tally:
        """What all processes counted; if the file is damaged, what this one knows of it."""
        try:
            return _read_tally(file.read_bytes())
        except UNREADABLE as error:
            self._log.warning("metrics.damaged", file=str(file), error=str(error))
            return self._tally


class _Families:
    """As much of a registry as `generate_latest` asks for."""

    def __init__(self, families: Iterator[Any]) -> None:
        self._families = families

    def collect(self) -> Iterator[Any]:
        """The families."""
        return self._families


def _decoded(taken: list[Raw]) -> Iterator[tuple[float, Frame]]:
    """Frames and parts of frames; without those of a version that cannot be read."""
    for heard_at, parts in taken:
        for part in parts:
            with contextlib.suppress(*UNREADABLE):
                yield heard_at, decode_glance(part)


def _whole(taken: list[Raw]) -> Iterator[tuple[float, Frame]]:
    """Whole frames."""
    assembler: Assembler[Frame] = Assembler()
    for heard_at, part in _decoded(taken):
        if whole := assembler.add(part):
            yield heard_at, whole


def _families(
    tally: Tally, fleet: str, server: str, now: float, *, connected: bool, tenants: bool
) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    families: dict[str, Any] = {}

    def put(metric: Metric, value: float, *labels: str) -> None:
        if "tenant" in metric.labels and not tenants:
            return
        family = families.get(metric.name)
        if family is None:
            made = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = families[metric.name] = made(metric.name, metric.help, labels=metric.labels)
        family.add_metric((fleet, *labels), value)

    put(names.EDGE_CONNECTED, connected, server)
    for worker, life in sorted(tally.workers.items()):
        _counters(put, worker, life)
        silent_s = max(0.0, now - life.heard_at)
        put(names.WORKER_STATUS_AGE, silent_s, worker)
        if silent_s <= LONG_SILENT_S:
            _levels(put, worker, life.head, silent_s)
            _class_levels(put, worker, life.frame, tally)
            _tenant_levels(put, worker, life.frame, tally)
    yield from families.values()


def _counters(put: Any, worker: str, life: Life) -> None:
    put(names.WORKER_RESTARTS, life.restarts, worker)
    for name, value in life.counts.items():
        put(names.ALL[name], value, worker)
    for (verb, outcome), count in sorted(life.commands.items()):
        put(names.WORKER_COMMANDS, count, worker, verb, outcome)
    for label, served in sorted(life.served.items()):
        for metric in TENANT_FIELDS:
            put(metric, served.get(metric.name, 0), worker, label)


def _levels(put: Any, worker: str, frame: Frame, age_s: float) -> None:
    put(names.WORKER_INFO, 1, worker, frame.model, frame.vllm_version)
    for state in STATES:
        put(names.WORKER_STATE, frame.state == state, worker, state)
    put(names.WORKER_STEP, frame.step_s, worker)
    put(names.WORKER_ACTIVE_SLOTS, frame.slots.active, worker)
    put(names.WORKER_RUNNER_SLOTS, frame.slots.total, worker)
    put(names.WORKER_USED_SLOTS, frame.slots.running, worker, "running")
    put(names.WORKER_USED_SLOTS, frame.slots.held, worker, "held")
    put(names.WORKER_KV_BLOCKS, frame.kv_blocks.total, worker)
    put(names.WORKER_USED_KV_BLOCKS, frame.kv_blocks.used, worker)
    put(names.WORKER_HELD_KV_BLOCKS, frame.kv_blocks.held, worker)
    put(names.WORKER_WAITING_EVENTS, frame.events_waiting, worker)
    put(
        names.WORKER_OLDEST_EVENT,
        frame.events_waiting_s + age_s * bool(frame.events_waiting),
        worker,
    )
    put(names.WORKER_QUEUED_COMMANDS, frame.commands.queue_depth, worker)
    for state in ("queued", "running", "held"):
        put(names.WORKER_REQUESTS, getattr(frame, state), worker, state)
    if frame.leader.age_s is not None:
        put(names.WORKER_LEADER_AGE, frame.leader.age_s + age_s, worker)


def _class_levels(put: Any, worker: str, frame: Frame, tally: Tally) -> None:
    _grouped(
        put, worker, ((tally.class_label(row.class_), row) for row in frame.classes),
        names.CLASS_REQUESTS, names.CLASS_OLDEST_QUEUED,
    )  # fmt: skip


def _tenant_levels(put: Any, worker: str, frame: Frame, tally: Tally) -> None:
    _grouped(
        put, worker, ((tally.label(row.tenant), row) for row in frame.tenants),
        names.TENANT_REQUESTS, names.TENANT_OLDEST_QUEUED,
    )  # fmt: skip
    for row in frame.tenants:
        if tally.label(row.tenant) != OTHER:
            put(names.TENANT_WEIGHT, row.weight, worker, row.tenant)


def _grouped(put: Any, worker: str, rows: Any, requests: Metric, oldest: Metric) -> None:
    """Requests summed by label and state, and the longest wait of each."""
    counts: dict[str, list[int]] = {}
    waits: dict[str, float] = {}
    for label, row in rows:
        sums = counts.setdefault(label, [0, 0, 0])
        for place, count in enumerate((row.queued, row.running, row.held)):
            sums[place] += count
        waits[label] = max(waits.get(label, 0.0), row.oldest_queued_s)
    for label, sums in sorted(counts.items()):
        for state, count in zip(("queued", "running", "held"), sums, strict=True):
            put(requests, count, worker, label, state)
        put(oldest, waits[label], worker, label)
