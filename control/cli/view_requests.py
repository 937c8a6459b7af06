"""`cox requests` for people: the list of requests, and the story of one.

Pure: statuses and the time in, text out; `Listing` is also what `--json` prints. Called by `requests.py`.
"""

from collections.abc import Sequence

import msgspec
from rich.text import Text

from coxswain.control.cli.grid import Cell, Column, Row, grid, grid_width
from coxswain.control.cli.words import clock, count, plural, printable, span
from coxswain.control.view.picture import RequestRow
from coxswain.schemas.status import Child, RequestReport, RequestStatus

STATE_STYLE = {"running": "green", "held": "yellow", "queued": "cyan"}

_FACTS = (
    Column(title="STATE"),
    Column(title="TENANT", cut=12),
    Column(title="CLASS", cut=8),
    Column(title="PRIO", right=True),
    Column(title="AGE", right=True),
    Column(title="PROMPT", right=True),
    Column(title="CACHED", right=True, drop=1),
    Column(title="OUTPUT", right=True),
    Column(title="DUE", right=True),
    Column(title="WORKER", cut=10),
)
_REQUEST = Column(title="REQUEST")


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """What `cox requests --json` prints: running, then held, then queued, in the order of each queue."""

    at: float
    requests: tuple[RequestRow, ...]
    queued_total: int
    """Waiting on these workers, of all tenants, listed or not."""
    truncated: bool
    """Whether `--limit` left some out."""


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What `cox requests REQUEST --json` prints: the report of each worker that knows the request."""

    worker: str
    report: RequestReport


def text(listing: Listing, width: int) -> Text:
    """The list; the ids come under their lines where the terminal is too narrow for a column of them."""
    if not listing.requests:
        return Text("no requests")
    rows = [Row(cells=[*_facts(each, listing.at), _name(each.status)]) for each in listing.requests]
    if grid_width((*_FACTS, _REQUEST), rows) <= width:
        return grid((*_FACTS, _REQUEST), rows, width)
    below = [
        Row(cells=row.cells[:-1], below=_name(each.status))
        for row, each in zip(rows, listing.requests, strict=True)
    ]
    return grid(_FACTS, below, width)


def footer(listing: Listing) -> str:
    """One line on what the list leaves out; empty if it is whole."""
    if not listing.truncated:
        return ""
    return (
        f"the first {plural(len(listing.requests), 'request')}; {listing.queued_total} queued in all "
        "(--limit shows more)"
    )


def _name(status: RequestStatus) -> str:
    return status.request if not status.child else f"{status.request} child {status.child}"


def _facts(each: RequestRow, now: float) -> list[Cell]:
    status = each.status
    due = "-" if status.deadline_s is None else span(status.deadline_s - now)
    return [
        state(status),
        status.tenant,
        status.class_,
        str(status.priority),
        span(max(0.0, now - status.arrived_at)),
        count(status.prompt_tokens),
        count(status.cached_tokens),
        count(status.output_tokens),
        Text(due, style="red" if due.startswith("-") and due != "-" else ""),
        each.worker,
    ]


def state(status: RequestStatus) -> Text:
    """`running`, `queued #3` (0 is next), `held kept by operator`."""
    words: str = status.state
    if status.state == "queued" and status.position is not None:
        words += f" #{status.position}"
    if status.state == "held":
        words += f" {status.kv}" if status.kv != "none" else ""
        words += f" by {'+'.join(status.held_by)}" if status.held_by else ""
    return Text(printable(words), style=STATE_STYLE[status.state])


def story(told: Sequence[Told], now: float) -> Text:
    """One request on every worker that knows it: what it is, then what happened to it, oldest first."""
    parts = [
        _child_story(each.worker, each.report.request, child, now)
        for each in told
        for child in each.report.children
    ]
    return Text("\n\n").join(parts)


def _due(deadline_s: float | None, now: float) -> str:
    if deadline_s is None:
        return ""
    left = deadline_s - now
    return f", due in {span(left)}" if left >= 0 else f", due {span(-left)} ago"


def _child_story(worker: str, request: str, child: Child, now: float) -> Text:
    status = child.status
    lines = [
        Text(printable(request if not status.child else f"{request} child {status.child}"), style="bold"),
        Text.assemble(
            "  ",
            state(status),
            printable(f" on {worker}, tenant {status.tenant}, class {status.class_}, "),
            f"priority {status.priority}, {span(max(0.0, now - status.arrived_at))} old",
        ),
        Text(
            f"  {plural(status.prompt_tokens, 'prompt token')} ({status.cached_tokens} cached), "
            f"{plural(status.output_tokens, 'output token')}" + _due(status.deadline_s, now),
        ),
    ]
    kinds = max((len(line.kind) for line in child.story), default=0)
    lines += [
        Text.assemble(
            (f"  {clock(line.at)} ", "dim"),
            (f"step {line.step:<7} ", "dim"),
            (printable(line.kind).ljust(kinds), STATE_STYLE.get(line.kind, "")),
            f"  {printable(line.detail)}" if line.detail else "",
        )
        for line in child.story
    ]
    return Text("\n").join(lines)
