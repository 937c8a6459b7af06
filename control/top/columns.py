"""What the tables of `cox top` show, and by what they sort. Pure: rows of a picture in, cells out.

Called by `app.py`; the table itself (`cli/grid.py`) drops and cuts columns where the terminal is narrow.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from rich.text import Text

from coxswain.control.cli.grid import Cell, Column
from coxswain.control.cli.view_requests import state as request_state
from coxswain.control.cli.words import count, printable, share, span
from coxswain.control.view.picture import ClassRow, RequestRow, TenantRow, WorkerRow
from coxswain.schemas.policy import LEADER_LEASE_S

GAUGE: Final = 12
"""Cells of the bar that shows a share against what is due."""
OFF: Final = 0.1
"""A share that differs from what is due by more than this is coloured."""

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Sort(Generic[R]):
    """One order of a table: by `key`, the largest first if `falling`."""

    name: str
    key: Callable[[R], Any]
    falling: bool = True


@dataclass(frozen=True, kw_only=True)
class Spec(Generic[R]):
    """One table: its columns, what a row is called, and what it shows.

    Attributes:
        title: above the table.
        columns: as `cli.grid` has them.
        cells: a row's cells; the second argument is the time (Unix s).
        key: what stays the same when the row's numbers change.
        words: what a filter looks at.
        sorts: orders, the first is how the table begins.
    """

    title: str
    columns: Sequence[Column]
    cells: Callable[[R, float], list[Cell]]
    key: Callable[[R], str]
    words: Callable[[R], str]
    sorts: Sequence[Sort[R]]

    def arrange(self, rows: Sequence[R], *, sort: Sort[R], turned: bool, wanted: str) -> list[R]:
        """The rows that have all words of `wanted`, in order; of equals, in the order in which they came."""
        words = wanted.casefold().split()
        kept = (
            [row for row in rows if all(word in self.words(row).casefold() for word in words)]
            if words
            else [*rows]
        )
        kept.sort(key=sort.key, reverse=sort.falling != turned)
        return kept


def gauge(part: float, due: float, cells: int = GAUGE) -> Text:
    """A bar of a share, 0 to 1, with a mark at what is due."""
    full = min(cells, round(part * cells))
    mark = min(cells - 1, round(due * cells))
    style = "green" if abs(part - due) <= OFF else "yellow"
    bar = Text()
    for place in range(cells):
        if place == mark and due > 0:
            bar.append("┃", style="bold")
        else:
            bar.append("━" if place < full else "╌", style=style if place < full else "dim")
    return bar


def _count(number: int, style: str = "") -> Text:
    return Text(count(number), style=style if number else "dim")


def _percent(part: float) -> str:
    return f"{100 * part:.0f}%"


def _wait(queued: int, oldest_queued_s: float) -> Text:
    return Text(span(oldest_queued_s)) if queued else Text("-", style="dim")


def _caps(running: int | None, queued: int | None) -> str:
    return "/".join("-" if cap is None else count(cap) for cap in (running, queued))


_LIVENESS: Final = {"stale": "bold red", "gone": "dim"}
_STATE: Final = {"serving": "green", "draining": "yellow", "paused": "yellow"}


def _worker(row: WorkerRow, _now: float) -> list[Cell]:
    silent = row.liveness != "live"
    state = Text(
        f"silent {span(row.silent_s)}" if silent else row.state,
        style=_LIVENESS.get(row.liveness, "") or _STATE[row.state],
    )
    leader = Text("none", style="dim")
    if row.leader_age_s is not None:
        style = "red" if row.leader_age_s > LEADER_LEASE_S else ""
        leader = Text(printable(f"{row.leader_policy or '?'} {span(row.leader_age_s)}"), style=style)
    return [
        row.worker,
        state,
        row.model.rstrip("/").rsplit("/", 1)[-1],
        _count(row.queued),
        _count(row.running, "green"),
        _count(row.held, "yellow"),
        f"{row.running_slots}/{row.active_slots}" + (f"+{row.held_slots}" if row.held_slots else ""),
        share(row.kv_used, 1.0) + (f" ({share(row.kv_held, 1.0)})" if row.kv_held else ""),
        span(row.step_s) if row.step_s else "-",
        count(row.output_tokens_per_s),
        count(row.applied_total),
        _count(row.rejected_total, "red"),
        leader,
    ]


WORKERS: Final[Spec[WorkerRow]] = Spec(
    title="Workers",
    columns=(
        Column(title="WORKER", cut=12),
        Column(title="STATE"),
        Column(title="MODEL", cut=12, drop=3),
        Column(title="QUEUED", right=True),
        Column(title="RUN", right=True),
        Column(title="HELD", right=True),
        Column(title="SLOTS", right=True),
        Column(title="KV (HELD)", right=True),
        Column(title="STEP", right=True, drop=1),
        Column(title="TOK/S", right=True),
        Column(title="CMDS", right=True, drop=2),
        Column(title="REFUSED", right=True, drop=2),
        Column(title="LEADER", cut=8),
    ),
    cells=_worker,
    key=lambda row: row.worker,
    words=lambda row: f"{row.worker} {row.state} {row.model} {row.liveness}",
    sorts=(
        Sort(name="name", key=lambda row: row.worker, falling=False),
        Sort(name="queued", key=lambda row: row.queued),
        Sort(name="kv", key=lambda row: row.kv_used),
        Sort(name="tok/s", key=lambda row: row.output_tokens_per_s),
    ),
)


def _tenant(row: TenantRow, _now: float) -> list[Cell]:
    off = row.due - row.share > OFF and row.queued > 0
    return [
        row.tenant,
        row.class_,
        f"{row.weight:g}",
        _count(row.queued),
        _count(row.running, "green"),
        _count(row.held, "yellow"),
        _wait(row.queued, row.oldest_queued_s),
        "-" if row.ttft_s is None else span(row.ttft_s),
        Text(_percent(row.share), style="yellow" if off else ""),
        _percent(row.due),
        gauge(row.share, row.due),
        count(row.output_tokens_per_s),
        _caps(row.max_running, row.max_queued),
        count(row.virtual_time),
        count(row.recomputed_tokens_total),
        count(row.finished_total),
    ]


TENANTS: Final[Spec[TenantRow]] = Spec(
    title="Tenants",
    columns=(
        Column(title="TENANT", cut=10),
        Column(title="CLASS", cut=7),
        Column(title="WEIGHT", right=True, drop=2),
        Column(title="QUEUED", right=True),
        Column(title="RUN", right=True),
        Column(title="HELD", right=True),
        Column(title="WAIT", right=True),
        Column(title="TTFT", right=True),
        Column(title="SHARE", right=True),
        Column(title="DUE", right=True),
        Column(title="", drop=4),
        Column(title="TOK/S", right=True),
        Column(title="CAPS", right=True, drop=3),
        Column(title="V-TIME", right=True, drop=5),
        Column(title="RECOMPUTED", right=True, drop=6),
        Column(title="FINISHED", right=True, drop=6),
    ),
    cells=_tenant,
    key=lambda row: row.tenant,
    words=lambda row: f"{row.tenant} {row.class_}",
    sorts=(
        Sort(name="share", key=lambda row: row.share),
        Sort(name="name", key=lambda row: row.tenant, falling=False),
        Sort(name="queued", key=lambda row: row.queued),
        Sort(name="wait", key=lambda row: row.oldest_queued_s if row.queued else -1.0),
        Sort(name="ttft", key=lambda row: -1.0 if row.ttft_s is None else row.ttft_s),
        Sort(name="owed", key=lambda row: row.due - row.share),
        Sort(name="held", key=lambda row: row.held),
    ),
)


def _class(row: ClassRow, _now: float) -> list[Cell]:
    return [
        row.class_,
        _count(row.queued),
        _count(row.running, "green"),
        _count(row.held, "yellow"),
        _wait(row.queued, row.oldest_queued_s),
        _percent(row.share),
        _caps(row.max_running, row.max_queued),
    ]


CLASSES: Final[Spec[ClassRow]] = Spec(
    title="Classes",
    columns=(
        Column(title="CLASS", cut=10),
        Column(title="QUEUED", right=True),
        Column(title="RUN", right=True),
        Column(title="HELD", right=True),
        Column(title="WAIT", right=True),
        Column(title="SHARE", right=True),
        Column(title="CAPS", right=True, drop=1),
    ),
    cells=_class,
    key=lambda row: row.class_,
    words=lambda row: row.class_,
    sorts=(
        Sort(name="name", key=lambda row: row.class_, falling=False),
        Sort(name="share", key=lambda row: row.share),
        Sort(name="queued", key=lambda row: row.queued),
    ),
)


def request_key(row: RequestRow) -> str:
    """What names a request on the screen: worker, id and child."""
    return f"{row.worker} {row.status.request} {row.status.child}"


def _request(row: RequestRow, now: float) -> list[Cell]:
    status = row.status
    due = "-" if status.deadline_s is None else span(status.deadline_s - now)
    return [
        request_state(status),
        status.tenant,
        status.class_,
        str(status.priority),
        span(max(0.0, now - status.arrived_at)),
        count(status.prompt_tokens),
        count(status.cached_tokens),
        count(status.output_tokens),
        Text(due, style="red" if due.startswith("-") and due != "-" else ""),
        row.worker,
        status.request + (f" #{status.child}" if status.child else ""),
    ]


REQUESTS: Final[Spec[RequestRow]] = Spec(
    title="Requests",
    columns=(
        Column(title="STATE"),
        Column(title="TENANT", cut=8, drop=3),
        Column(title="CLASS", cut=7),
        Column(title="PRIO", right=True),
        Column(title="AGE", right=True),
        Column(title="PROMPT", right=True),
        Column(title="CACHED", right=True, drop=2),
        Column(title="OUTPUT", right=True),
        Column(title="DUE", right=True),
        Column(title="WORKER", cut=8),
        Column(title="REQUEST", cut=12, drop=4),
    ),
    cells=_request,
    key=request_key,
    words=lambda row: (
        f"{row.status.request} {row.status.tenant} {row.status.class_} {row.status.state} {row.status.kv} "
        f"{'+'.join(row.status.held_by)} {row.worker}"
    ),
    sorts=(
        Sort(name="turn", key=lambda _: 0, falling=False),
        Sort(name="age", key=lambda row: row.status.arrived_at, falling=False),
        Sort(name="output", key=lambda row: row.status.output_tokens),
        Sort(name="prompt", key=lambda row: row.status.prompt_tokens),
        Sort(name="priority", key=lambda row: row.status.priority, falling=False),
    ),
)
