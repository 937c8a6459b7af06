"""`cox ps` for people: workers and tenants of a fleet as tables.

Pure: frames and the time in, text out; `FleetView` is also what `--json` prints. Called by `fleet.py`.
"""

import time
from collections.abc import Iterable, Mapping

import msgspec
from rich.text import Text

from coxswain.control.cli.grid import Cell, Column, Row, grid
from coxswain.control.cli.words import count, plural, printable, share, span
from coxswain.schemas.policy import LEADER_LEASE_S
from coxswain.schemas.status import Frame, Leader, TenantStatus

_STATE_STYLE = {"serving": "green", "draining": "yellow", "paused": "yellow"}

_WORKERS = (
    Column(title="WORKER", cut=16),
    Column(title="STATE"),
    Column(title="MODEL", cut=16, drop=2),
    Column(title="QUEUED", right=True),
    Column(title="RUN", right=True),
    Column(title="HELD", right=True),
    Column(title="SLOTS", right=True),
    Column(title="KV (HELD)", right=True),
    Column(title="STEP", right=True, drop=1),
    Column(title="LEADER"),
)
_TENANTS = (
    Column(title="TENANT", cut=16),
    Column(title="CLASS", cut=8),
    Column(title="WEIGHT", right=True),
    Column(title="QUEUED", right=True),
    Column(title="RUN", right=True),
    Column(title="HELD", right=True),
    Column(title="WAIT", right=True),
    Column(title="V-TIME", right=True),
    Column(title="INPUT", right=True, drop=3),
    Column(title="CACHED", right=True, drop=3),
    Column(title="OUTPUT", right=True, drop=1),
    Column(title="OUT%", right=True),
    Column(title="FINISHED", right=True, drop=2),
)


class TenantSum(msgspec.Struct, frozen=True, kw_only=True):
    """One tenant over all workers."""

    tenant: str
    classes: tuple[str, ...]
    weights: tuple[float, ...]
    """Each weight in force somewhere, lowest first; usually one."""
    queued: int
    running: int
    held: int
    oldest_queued_s: float
    virtual_time: float
    """The highest over workers: what the fleet has charged is at least that."""
    uncached_input_tokens_total: int
    cached_input_tokens_total: int
    output_tokens_total: int
    output_share: float
    """Of all output tokens of these workers so far, 0 to 1."""
    recomputed_tokens_total: int
    finished_total: int


class FleetView(msgspec.Struct, frozen=True, kw_only=True):
    """What `cox ps --json` prints."""

    fleet: str
    at: float
    workers: tuple[Frame, ...]
    tenants: tuple[TenantSum, ...]


def view(fleet: str, frames: Mapping[str, Frame], now: float) -> FleetView:
    """Everything `ps` shows, workers and tenants in order of their names."""
    workers = tuple(frames[name] for name in sorted(frames))
    return FleetView(fleet=fleet, at=now, workers=workers, tenants=_sums(workers))


def _sums(frames: Iterable[Frame]) -> tuple[TenantSum, ...]:
    rows: dict[str, list[TenantStatus]] = {}
    for frame in frames:
        for row in frame.tenants:
            rows.setdefault(row.tenant, []).append(row)
    output = sum(row.output_tokens_total for each in rows.values() for row in each)
    return tuple(_sum(tenant, rows[tenant], output) for tenant in sorted(rows))


def _sum(tenant: str, rows: list[TenantStatus], output: int) -> TenantSum:
    mine = sum(row.output_tokens_total for row in rows)
    return TenantSum(
        tenant=tenant,
        classes=tuple(sorted({row.class_ for row in rows})),
        weights=tuple(sorted({row.weight for row in rows})),
        queued=sum(row.queued for row in rows),
        running=sum(row.running for row in rows),
        held=sum(row.held for row in rows),
        oldest_queued_s=max(row.oldest_queued_s for row in rows),
        virtual_time=max(row.virtual_time for row in rows),
        uncached_input_tokens_total=sum(row.uncached_input_tokens_total for row in rows),
        cached_input_tokens_total=sum(row.cached_input_tokens_total for row in rows),
        output_tokens_total=mine,
        output_share=mine / output if output else 0.0,
        recomputed_tokens_total=sum(row.recomputed_tokens_total for row in rows),
        finished_total=sum(row.finished_total for row in rows),
    )


def text(fleet: FleetView, width: int) -> Text:
    """Both tables, at most `width` cells wide where possible."""
    if not fleet.workers:
        return Text(f"no workers in fleet {fleet.fleet}")
    parts = [_summary(fleet), grid(_WORKERS, [_worker_row(frame) for frame in fleet.workers], width)]
    if fleet.tenants:
        parts.append(grid(_TENANTS, [_tenant_row(row) for row in fleet.tenants], width))
    return Text("\n\n").join(parts)


def _summary(fleet: FleetView) -> Text:
    queued = sum(frame.queued for frame in fleet.workers)
    running = sum(frame.running for frame in fleet.workers)
    held = sum(frame.held for frame in fleet.workers)
    recomputed = sum(frame.recomputed_tokens_total for frame in fleet.workers)
    when = time.strftime("%H:%M:%S", time.localtime(fleet.at))
    return Text(
        f"fleet {fleet.fleet} at {when}: {plural(len(fleet.workers), 'worker')}, {count(queued)} queued, "
        f"{count(running)} running, {count(held)} held, {count(recomputed)} recomputed",
    )


def _worker_row(frame: Frame) -> Row:
    slots, blocks = frame.slots, frame.kv_blocks
    cells: list[Cell] = [
        frame.worker,
        Text(frame.state, style=_STATE_STYLE[frame.state]),
        frame.model.rstrip("/").rsplit("/", 1)[-1],
        count(frame.queued),
        count(frame.running),
        _held(frame.held),
        f"{slots.running}/{slots.active}" + (f"+{slots.held}" if slots.held else ""),
        share(blocks.used, blocks.total) + (f" ({share(blocks.held, blocks.total)})" if blocks.held else ""),
        span(frame.step_s) if frame.step_s else "-",
        _leader(frame.leader),
    ]
    return Row(cells=cells)


def _held(held: int) -> Text:
    return Text(count(held), style="yellow" if held else "")


def _leader(leader: Leader) -> Text:
    if leader.epoch is None or leader.age_s is None:
        return Text("none", style="dim")
    text = f"{printable(leader.policy or '?')} {span(leader.age_s)}"
    return Text(text, style="red" if leader.age_s > LEADER_LEASE_S else "")


def _tenant_row(row: TenantSum) -> Row:
    return Row(
        cells=[
            row.tenant,
            ",".join(row.classes),
            "…".join(f"{weight:g}" for weight in dict.fromkeys((row.weights[0], row.weights[-1]))),
            count(row.queued),
            count(row.running),
            _held(row.held),
            span(row.oldest_queued_s) if row.queued else "-",
            count(row.virtual_time),
            count(row.uncached_input_tokens_total),
            count(row.cached_input_tokens_total),
            count(row.output_tokens_total),
            f"{100 * row.output_share:.0f}%",
            count(row.finished_total),
        ],
    )
