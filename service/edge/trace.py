"""A request's steering as OpenTelemetry spans, in the trace that the client began and vLLM's own request span is in.

Only where vLLM traces (`--otlp-traces-endpoint`): nothing of this is imported otherwise. vLLM's tracer in this process
has endpoint, protocol and sampler; ours are spans of the same. The edge opens `coxswain.request` under the client's
traceparent and hands vLLM its own, so that vLLM's `llm_request` is a child of it. What the scheduler did is read from
the worker's events, which carry their times: the engine's step has nothing to do with it.

  coxswain.request ── queue ── run ── cut-in | hold ── run ── …    and beside them vLLM's llm_request

Called by `asgi.py` (requests) and `status.py` (events), on the server's loop.
"""

import asyncio
from typing import Any, Final

import msgspec
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from coxswain.service.edge.core import Admitted, Headers

MAX_OPEN: Final = 10_000
"""Requests whose events are waited for; the oldest are given up first."""
LINGER_S: Final = 10.0
"""A request without any event so long after its response never reached an engine."""
_CARRIED: Final = (b"traceparent", b"tracestate")

_propagator: Final = TraceContextTextMapPropagator()


class EventSeen(msgspec.Struct, frozen=True):
    """What spans need of an event."""

    kind: str
    at: float
    step: int = 0
    request: str | None = None
    child: int | None = None
    by: str | None = None
    kv: str | None = None
    reason: str | None = None
    resumed: bool | None = None
    waiting: int | None = None
    next_tenant: str | None = None
    uncached_input_tokens: int | None = None
    cached_input_tokens: int | None = None
    computed_tokens: int | None = None
    output_tokens: int | None = None
    recomputed_tokens: int | None = None


_ENVELOPE: Final = frozenset({"kind", "at", "request", "child"})
decode_event: Final = msgspec.json.Decoder(EventSeen).decode


class Open:
    """One HTTP request that is traced.

    Args:
        span: its own.
    """

    def __init__(self, span: Span) -> None:
        self.span = span
        self.context = trace.set_span_in_context(span)
        self.phases: dict[int, tuple[str, Span]] = {}
        """By child: what it is doing."""
        self.resumes: dict[int, str] = {}
        """By child that is held: what it does when it goes on."""


class Traces:
    """The traced requests of one API server process.

    Args:
        tracer: ours by default, of whatever provider this process has; for tests.
    """

    def __init__(self, tracer: Any = None) -> None:
        self._tracer = tracer or trace.get_tracer("coxswain")
        self.open: dict[str, Open] = {}

    def begin(self, admitted: Admitted) -> tuple[Span, Headers]:
        """Open the request's span under the client's, if it sent one; the headers that vLLM is to see.

        Call `end` when the response has ended.
        """
        carrier = {
            name.decode(): value.decode("latin-1") for name, value in admitted.headers if name in _CARRIED
        }
        span = self._tracer.start_span(
            "coxswain.request",
            context=_propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=_attributes(
                request=admitted.ticket.request, tenant=admitted.tenant, **{"class": admitted.class_}
            ),
        )
        if span.is_recording():
            while len(self.open) >= MAX_OPEN:
                self._close(next(iter(self.open)))
            self.open[admitted.ticket.request] = Open(span)
        ours: dict[str, str] = {}
        _propagator.inject(ours, trace.set_span_in_context(span))
        kept = [header for header in admitted.headers if header[0] not in _CARRIED]
        return span, [*kept, *((name.encode(), value.encode()) for name, value in ours.items())]

    def end(self, request: str, span: Span) -> None:
        """The response has ended; events may be a moment behind it, or never come for what no engine was given."""
        span.end()
        if request in self.open:
            asyncio.get_running_loop().call_later(LINGER_S, self._unheard, request)

    def _unheard(self, request: str) -> None:
        known = self.open.get(request)
        if known is not None and not known.phases:
            del self.open[request]

    def heard(self, payload: bytes) -> None:
        """Take an event.

        Raises:
            errors.UNREADABLE: if it is none.
        """
        event = decode_event(payload)
        known = self.open.get(event.request or "")
        if known is not None:
            self._tell(known, event, event.child or 0)

    def _tell(self, known: Open, event: EventSeen, child: int) -> None:
        match event.kind:
            case "queued":
                self._go(known, event, child, "queue")
            case "admitted":
                self._go(known, event, child, "run")
            case "held":
                phase, _ = known.phases.get(child, ("queue", None))
                if phase not in ("hold", "cut-in"):
                    known.resumes[child] = "run" if event.kv == "kept" else "queue"
                self._go(known, event, child, "cut-in" if event.by == "engine" else "hold")
            case "parked" | "dropped":
                known.resumes[child] = "queue"
                self._note(known, event, child)
            case "continued":
                self._go(known, event, child, known.resumes.pop(child, "queue"))
            case "preempted":
                self._go(known, event, child, "queue")
            case "finished":
                self._finish(known, event, child)
            case _:
                self._note(known, event, child)

    def _go(self, known: Open, event: EventSeen, child: int, phase: str) -> None:
        """One phase ends and the next begins, at the time that the event says."""
        before = known.phases.pop(child, None)
        if before is not None:
            before[1].end(_ns(event.at))
        span = self._tracer.start_span(
            phase,
            context=known.context,
            start_time=_ns(event.at),
            attributes=_attributes(child=child, **_fields(event)),
        )
        known.phases[child] = (phase, span)

    def _note(self, known: Open, event: EventSeen, child: int) -> None:
        _, span = known.phases.get(child, ("", known.span))
        span.add_event(event.kind, _attributes(**_fields(event)), _ns(event.at))

    def _finish(self, known: Open, event: EventSeen, child: int) -> None:
        _, span = known.phases.pop(child, ("", None))
        if span is not None:
            span.set_attributes(_attributes(**_fields(event)))
            span.end(_ns(event.at))
        if not known.phases and event.request is not None:
            # Another prompt of it may come still: it is queued before the first one's end as a rule.
            self.open.pop(event.request, None)

    def _close(self, request: str) -> None:
        """Give a request up: its worker ended, or its events were lost."""
        known = self.open.pop(request, None)
        for _, span in known.phases.values() if known is not None else ():
            span.end()


def _fields(event: EventSeen) -> dict[str, Any]:
    return {name: value for name, value in msgspec.structs.asdict(event).items() if name not in _ENVELOPE}


def _attributes(**values: Any) -> dict[str, Any]:
    return {f"coxswain.{name}": value for name, value in values.items() if value is not None}


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
