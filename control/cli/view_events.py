"""`cox events` for people: one line per event.

Pure: an event in, a line out. Called by `events.py`. Kinds of a later version are shown field by field.
"""

from collections.abc import Callable
from typing import Any, Final

import msgspec
from rich.text import Text

from coxswain.control.cli.words import clock, count, plural, printable, span
from coxswain.schemas import events as ev

KIND_STYLE: Final = {
    "queued": "cyan",
    "admitted": "green",
    "first_token": "green",
    "held": "yellow",
    "parked": "yellow",
    "dropped": "magenta",
    "continued": "green",
    "preempted": "magenta",
    "finished": "blue",
    "command": "bold",
    "leader_changed": "bold red",
}
_ENVELOPE: Final = frozenset(
    {
        "id",
        "worker",
        "incarnation",
        "seq",
        "at",
        "step",
        "request",
        "child",
        "tenant",
        "class",
        "priority",
        "kind",
    },
)
_KIND_WIDTH: Final = max(len(kind) for kind in ev.KINDS)


def line(event: ev.Event | dict[str, Any], *, worker_width: int = 8) -> tuple[Text, Text]:
    """Time, worker, kind, whose and what happened; and the request's id, to stand at the end or below.

    Args:
        event: as `decode_event` gave it.
        worker_width: cells for the worker's name.
    """
    raw = event if isinstance(event, dict) else msgspec.to_builtins(event)
    kind = str(raw.get("kind", "?"))
    who = "/".join(str(raw[field]) for field in ("tenant", "class") if raw.get(field) is not None)
    request = raw.get("request")
    child = f" child {raw['child']}" if raw.get("child") else ""
    parts = [
        (clock(raw["at"]) if isinstance(raw.get("at"), int | float) else "?", "dim"),
        (str(raw.get("worker", "?")).ljust(worker_width), ""),
        (kind.ljust(_KIND_WIDTH), KIND_STYLE.get(kind, "")),
        (who, ""),
        (_detail(event, raw), ""),
    ]
    facts = Text(" ").join(Text(printable(words), style=style) for words, style in parts if words)
    return facts, Text(printable(f"{request}{child}") if request else "", style="dim")


def detail(event: ev.Event) -> str:
    """What happened, without when, where and whose."""
    return _detail(event, msgspec.to_builtins(event))


def _detail(event: ev.Event | dict[str, Any], raw: dict[str, Any]) -> str:
    describe = _DETAILS.get(type(event))
    if describe is not None:
        return describe(event)
    return " ".join(f"{name}={value}" for name, value in raw.items() if name not in _ENVELOPE)


def _queued(event: ev.Queued) -> str:
    words = plural(event.prompt_tokens, "prompt token")
    if event.waiting:
        words += f", behind {event.waiting} ({event.tenant_waiting} of its tenant), {event.running} running"
    if event.next_tenant is not None:
        words += f"; next was {event.next_tenant}/{event.next_class}"
        if event.virtual_time is not None and event.next_virtual_time is not None:
            words += f" at {count(event.next_virtual_time)}, its own virtual time {count(event.virtual_time)}"
    return words


def _admitted(event: ev.Admitted) -> str:
    again = "again " if event.resumed else ""
    return (
        f"{again}after {span(event.queued_s)}, {event.uncached_input_tokens} tokens to compute, "
        f"{event.cached_input_tokens} cached"
    )


def _first_token(event: ev.FirstToken) -> str:
    return f"after {span(event.ttft_s)}"


def _held(event: ev.Held) -> str:
    lease = "until continued" if event.lease_s is None else f"for {span(event.lease_s)}"
    flight = f", {event.in_flight_tokens} in flight" if event.in_flight_tokens else ""
    why = f" ({event.reason})" if event.reason else ""
    return f"by {event.by} {lease}, kv {event.kv}, {event.output_tokens} tokens out{flight}{why}"


def _dropped(event: ev.Dropped) -> str:
    return f"{event.computed_tokens} computed tokens freed ({event.reason})"


def _continued(event: ev.Continued) -> str:
    return f"by {event.by} ({event.reason}) after {span(event.held_s)}, {event.output_tokens} tokens out"


def _preempted(event: ev.Preempted) -> str:
    return event.reason


def _reprioritized(event: ev.Reprioritized) -> str:
    parts = []
    if event.from_priority != event.to_priority:
        parts.append(f"priority {event.from_priority} → {event.to_priority}")
    if event.from_class != event.to_class:
        parts.append(f"class {event.from_class} → {event.to_class}")
    return f"{', '.join(parts) or 'unchanged'} by {event.by}"


def _limited(event: ev.Limited) -> str:
    return f"{event.detail} by {event.by}"


def _finished(event: ev.Finished) -> str:
    ttft = "" if event.ttft_s is None else f", first token after {span(event.ttft_s)}"
    held = f", held {span(event.held_s)}" if event.held_s else ""
    counts = {
        "recomputed": event.recomputed_tokens,
        "from the cache": event.restored_tokens,
        "reloaded": event.reloaded_tokens,
    }
    again = "".join(f", {tokens} {what}" for what, tokens in counts.items() if tokens)
    return (
        f"{event.reason}: {event.uncached_input_tokens}+{event.cached_input_tokens} in, "
        f"{event.output_tokens} out{again}, queued {span(event.queued_s)}{ttft}, "
        f"ran {span(event.run_s)}{held}"
    )


def _command(event: ev.CommandSeen) -> str:
    counts = " ".join(f"{name} {number}" for name, number in event.counts.items())
    outcome = counts if event.outcome in event.counts else f"{event.outcome} {counts}".rstrip()
    error = f" ({event.code}: {event.error})" if event.code is not None else ""
    reason = f", because: {event.reason}" if event.reason else ""
    return f"{event.verb} by {f'{event.role} {event.issuer}'.rstrip()}: {outcome}{error}{reason}"


def _leader_changed(event: ev.LeaderChanged) -> str:
    return f"{'nobody leads' if event.epoch is None else f'epoch {event.epoch[1]}'} ({event.reason})"


_DETAILS: Final[dict[type[Any], Callable[[Any], str]]] = {
    ev.Queued: _queued,
    ev.Admitted: _admitted,
    ev.FirstToken: _first_token,
    ev.Held: _held,
    ev.Dropped: _dropped,
    ev.Continued: _continued,
    ev.Preempted: _preempted,
    ev.Reprioritized: _reprioritized,
    ev.Limited: _limited,
    ev.Finished: _finished,
    ev.CommandSeen: _command,
    ev.LeaderChanged: _leader_changed,
}
