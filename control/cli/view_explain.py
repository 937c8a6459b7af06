"""`cox explain` for people: the story of a request, and why a tenant is slow.

Pure: what `story.py` and `slow.py` found in, text out. Called by `explain.py`.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from rich.text import Text

from coxswain.control.cli.grid import Column, Row, grid
from coxswain.control.cli.view_events import KIND_STYLE, detail
from coxswain.control.cli.view_requests import STATE_STYLE
from coxswain.control.cli.words import clock, count, plural, printable, share, span
from coxswain.control.explain.ahead import Ahead
from coxswain.control.explain.slow import Quantiles, Slow
from coxswain.control.explain.story import ChildStory, Story
from coxswain.schemas.events import Event, Finished

SHOWN: Final = 10
"""Groups of those ahead, and of holds; `--json` has all."""
BAR: Final = 40
"""Cells at most."""

_AHEAD: Final = (
    Column(title="ADMITTED", right=True),
    Column(title="OF", right=True),
    Column(title="TENANT", cut=16),
    Column(title="CLASS", cut=8),
    Column(title="BECAUSE OF"),
    Column(title="COMPUTED", right=True, drop=1),
    Column(title="V-TIME", right=True, drop=2),
)


def story(told: Story, width: int) -> Text:
    """One request: each child's phases, who was ahead, what happened, the bill."""
    parts = [_child(told, child, width) for child in told.children]
    return Text("\n\n").join([*parts, *_missing(told.events_missing)])


def _child(told: Story, child: ChildStory, width: int) -> Text:
    name = told.request + (f" child {child.child}" if child.child else "")
    total_s = child.queued_s + child.running_s + child.held_s
    ended = f": {child.finished.reason}" if child.finished is not None else ""
    lines = [
        Text(printable(name), style="bold"),
        Text.assemble(
            "  ",
            (f"{child.phase}{printable(ended)}", STATE_STYLE.get(child.phase, "")),
            printable(
                f" on {child.worker}, tenant {child.tenant}, class {child.class_}, priority {child.priority}, "
            ),
            f"{span(total_s)} in all",
        ),
        _phases(child.queued_s, child.running_s, child.held_s, width),
    ]
    if child.ttft_s is not None:
        lines.append(Text(f"  first token after {span(child.ttft_s)}"))
    lines += _ahead(child.ahead, f"while it waited for {span(child.queued_s)}", width)
    lines.append(Text(""))
    lines += _happened(child.events)
    if child.events_omitted:
        lines.append(Text(f"  … and {child.events_omitted} more events", style="dim"))
    if child.finished is not None:
        lines += [Text(""), *_bill(child.finished)]
    return Text("\n").join(lines)


def _phases(queued_s: float, running_s: float, held_s: float, width: int) -> Text:
    """A bar of where the time went, as long as there is room for, and its parts."""
    phases = {"queued": queued_s, "running": running_s, "held": held_s}
    total_s = sum(phases.values())
    words = Text("  ").join(
        Text(f"{name} {span(seconds)} ({share(seconds, total_s)})", style=STATE_STYLE[name])
        for name, seconds in phases.items()
    )
    cells = max(0, min(BAR, width - words.cell_len - 6))
    bar = Text("  ")
    for name, seconds in phases.items():
        if total_s and seconds:
            bar.append("━" * max(1, round(cells * seconds / total_s)), style=STATE_STYLE[name])
    return bar.append("  ").append_text(words)


def _ahead(groups: Sequence[Ahead], when: str, width: int) -> list[Text]:
    if not groups:
        return []
    total = sum(group.admissions for group in groups)
    rows = [
        Row(
            cells=[
                str(group.admissions),
                share(group.admissions, total),
                group.tenant,
                group.class_,
                group.why,
                f"{count(group.input_tokens)} tokens",
                _range(group.least_virtual_time, group.most_virtual_time),
            ]
        )
        for group in groups[:SHOWN]
    ]
    table = grid(_AHEAD, rows, width - 2)
    lines = [Text(""), Text(f"  {plural(total, 'request')} went first {when}:")]
    lines += [Text("  ").append_text(line) for line in table.split("\n")]
    if len(groups) > SHOWN:
        lines.append(Text(f"  … and {len(groups) - SHOWN} more groups (--json shows all)", style="dim"))
    return lines


def _range(least: float | None, most: float | None) -> str:
    if least is None or most is None:
        return "-"
    return count(least) if count(least) == count(most) else f"{count(least)}…{count(most)}"


def _happened(events: Sequence[Event]) -> list[Text]:
    if not events:
        return []
    kinds = [str(event.__struct_config__.tag) for event in events]
    width = max(map(len, kinds))
    begin = events[0].at
    return [
        Text.assemble(
            (f"  {clock(event.at)} ", "dim"),
            (f"{'+' + span(event.at - begin):>8} ", "dim"),
            (kind.ljust(width), KIND_STYLE.get(kind, "")),
            f"  {printable(detail(event))}",
        )
        for event, kind in zip(events, kinds, strict=True)
    ]


def _bill(event: Finished) -> list[Text]:
    """What the device did for it, by the equation of docs/protocol.md."""
    again = {
        "recomputed": event.recomputed_tokens,
        "found in the cache after a loss": event.restored_tokens,
        "reloaded after a loss": event.reloaded_tokens,
        "computed for nothing": event.discarded_tokens,
        "never computed": event.uncomputed_input_tokens,
    }
    extra = ", ".join(f"{tokens} {what}" for what, tokens in again.items() if tokens)
    return [
        Text(
            f"  {event.uncached_input_tokens} input tokens to compute, {event.cached_input_tokens} cached, "
            f"{event.output_tokens} out; {extra or 'nothing twice, nothing in vain'}"
        )
    ]


def slow(found: Slow, width: int) -> Text:
    """Where a tenant's time went, and why."""
    lines = [
        Text(printable(f"tenant {found.tenant}, {clock(found.since)} to {clock(found.until)}"), style="bold"),
        Text(
            f"  {plural(found.requests, 'request')}, {_ended(found)}, {count(found.output_tokens)} tokens out"
        ),
        _phases(found.queued_s, found.running_s, found.held_s, width),
        Text(f"  time to first token {_quantiles(found.ttft)}"),
        Text(f"  wait for admission  {_quantiles(found.wait)}; {found.waited} had to wait"),
    ]
    lines += _ahead(found.ahead, f"while it waited; {found.admitted} of its own were admitted", width)
    lines.append(Text(""))
    lines += [Text(f"  {line}") for line in _causes(found)]
    lines += _missing(found.events_missing)
    return Text("\n").join(lines)


def _ended(found: Slow) -> str:
    ended = sum(found.finished.values())
    reasons = ", ".join(f"{number} {printable(reason)}" for reason, number in sorted(found.finished.items()))
    return f"{ended} ended ({reasons})" if ended else "none ended"


def _quantiles(values: Quantiles) -> str:
    if values.p50 is None or values.p90 is None or values.p99 is None:
        return "-"
    return f"p50 {span(values.p50)}, p90 {span(values.p90)}, p99 {span(values.p99)} of {values.count}"


def _causes(found: Slow) -> Iterable[str]:
    """Holds, preemptions, caps, lost KV: each in a line, or that there was none of it."""
    if not found.holds:
        yield "holds: none"
    for hold in found.holds[:SHOWN]:
        yield printable(f"holds: {hold.count} by {hold.by} ({hold.reason or 'no reason given'})")
    yield f"preempted: {found.preempted}" if found.preempted else "preempted: never"
    if found.recomputed_tokens or found.restored_tokens or found.reloaded_tokens:
        yield (
            f"lost KV: {found.recomputed_tokens} tokens recomputed, {found.restored_tokens} found in the cache, "
            f"{found.reloaded_tokens} reloaded"
        )
    for worker, seconds in sorted(found.at_cap_s.items()):
        yield printable(f"cap on {worker}: at it, with requests waiting, for {span(seconds)}")
    if not found.at_cap_s:
        yield "caps: none in force now"
    for limit in found.limits[-SHOWN:]:
        yield printable(f"limited at {clock(limit.at)} on {limit.worker} by {limit.by}: {limit.detail}")


def _missing(events: int) -> list[Text]:
    if not events:
        return []
    return [
        Text(
            f"  {plural(events, 'event')} missing from the log: this account may be incomplete",
            style="yellow",
        )
    ]
