"""Spans of a request's steering: made of its events, in the client's trace, and nothing at all where nobody traces."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from coxswain.common.connection import Connection
from coxswain.schemas import events as ev
from coxswain.service.config import Settings
from coxswain.service.edge import asgi as edge_asgi
from coxswain.service.edge import trace as edge_trace
from coxswain.service.edge.asgi import EdgeMiddleware
from coxswain.service.edge.caps import EdgeCaps
from coxswain.service.edge.core import Edge, EdgeSettings
from coxswain.service.edge.status import EdgeStatus, listener
from coxswain.service.edge.trace import Traces

SECRET = "ab" * 32
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


class Rig:
    """The edge with a tracer whose spans are kept, and an app that says what headers it saw."""

    def __init__(self, **provider: Any) -> None:
        self.exporter = InMemorySpanExporter()
        tracing = TracerProvider(**provider)
        tracing.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.traces = Traces(tracing.get_tracer("test"))
        self.seen: dict[str, str] = {}
        status = EdgeStatus(Connection(urls=("nats://127.0.0.1:1",)), EdgeCaps(["w1"]), traces=self.traces)
        status.start = lambda: None  # type: ignore[method-assign]
        self.status = status
        edge = Edge(EdgeSettings.from_env({"COX_IDENTITY_KEY": SECRET}))
        app = EdgeMiddleware(self._inside, edge, None, lambda _app: status)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://edge")

    async def _inside(self, scope: Any, _receive: Any, send: Any) -> None:
        assert len({name for name, _ in scope["headers"]}) == len(scope["headers"]), "a header is there twice"
        self.seen = {name.decode(): value.decode() for name, value in scope["headers"]}
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    async def request(self, **headers: str) -> str:
        """Send one; its public id."""
        response = await self.client.post("/v1/completions", headers=headers)
        return response.headers["x-request-id"]

    def happen(
        self, request: str, *events: tuple[float, type[ev.Event], dict[str, Any]], child: int = 0
    ) -> None:
        """Its worker tells what happened, at so many seconds."""
        for at, kind, fields in events:
            event = kind(
                id="x", worker="w1", incarnation="01A", seq=1, at=at, step=7, request=request, child=child, **fields
            )  # fmt: skip
            self.traces.heard(msgspec.json.encode(event))

    def spans(self) -> dict[str, list[ReadableSpan]]:
        """What was exported, by name, in order of time."""
        found: dict[str, list[ReadableSpan]] = {}
        for span in sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0):
            found.setdefault(span.name, []).append(span)
        return found


DROPPED = (ev.Dropped, {"reason": "", "computed_tokens": 12})
QUEUED = (ev.Queued, {"prompt_tokens": 9})
ADMITTED = (ev.Admitted, {"uncached_input_tokens": 9, "cached_input_tokens": 0, "queued_s": 1.0})
FINISHED = (
    ev.Finished,
    {
        "reason": "length", "uncached_input_tokens": 9, "cached_input_tokens": 0, "output_tokens": 5,
        "recomputed_tokens": 0, "queued_s": 1.0, "ttft_s": 1.5, "held_s": 2.0, "run_s": 3.0,
    },
)  # fmt: skip


def held(by: str, kv: str = "kept") -> tuple[type[ev.Event], dict[str, Any]]:
    """A hold."""
    return ev.Held, {"by": by, "kv": kv, "reason": "", "lease_s": None}


def continued(by: str) -> tuple[type[ev.Event], dict[str, Any]]:
    """Its end."""
    return ev.Continued, {"by": by, "reason": "command", "held_s": 1.0}


def times(spans: list[ReadableSpan]) -> list[tuple[float, float]]:
    """From when to when, in seconds."""
    return [((span.start_time or 0) / 1e9, (span.end_time or 0) / 1e9) for span in spans]


async def test_phases_are_spans_of_the_clients_trace():
    """Queue, run, cut-in and hold with the times that events say, under our span, which is under the client's."""
    rig = Rig()
    request = await rig.request(traceparent=f"00-{TRACE}-{PARENT}-01", tracestate="vendor=1")
    rig.happen(
        request, (10.0, *QUEUED), (11.0, *ADMITTED), (11.5, ev.FirstToken, {"ttft_s": 1.5}), (12.0, *held("engine")),
        (13.0, *continued("engine")), (14.0, *held("operator")), (15.0, *DROPPED),
        (16.0, *continued("operator")), (17.0, *ADMITTED), (18.0, *FINISHED),
    )  # fmt: skip
    spans = rig.spans()
    (whole,) = spans.pop("coxswain.request")
    assert whole.parent is not None
    assert f"{whole.parent.span_id:016x}" == PARENT
    assert {name: times(each) for name, each in spans.items()} == {
        "queue": [(10.0, 11.0), (16.0, 17.0)],
        "run": [(11.0, 12.0), (13.0, 14.0), (17.0, 18.0)],
        "cut-in": [(12.0, 13.0)],
        "hold": [(14.0, 16.0)],
    }
    for span in (each for group in spans.values() for each in group):
        assert span.parent is not None
        assert span.parent.span_id == whole.context.span_id
        assert f"{span.context.trace_id:032x}" == TRACE
    assert [event.name for event in spans["hold"][0].events] == ["dropped"]
    assert spans["run"][2].attributes["coxswain.reason"] == "length"  # type: ignore[index]
    assert whole.attributes == {
        "coxswain.request": request,
        "coxswain.tenant": "default",
        "coxswain.class": "",
    }
    assert not rig.traces.open


async def test_what_is_held_in_the_queue_goes_back_to_it():
    """It had no KV to keep: continued, it waits again, and runs only when it is admitted."""
    rig = Rig()
    request = await rig.request()
    rig.happen(
        request, (1.0, *QUEUED), (2.0, *held("controller", kv="none")), (3.0, *continued("controller")),
        (4.0, *ADMITTED), (5.0, *FINISHED),
    )  # fmt: skip
    assert times(rig.spans()["queue"]) == [(1.0, 2.0), (3.0, 4.0)]
    assert times(rig.spans()["run"]) == [(4.0, 5.0)]


async def test_a_tracer_that_fails_takes_no_place_for_ever(monkeypatch: pytest.MonkeyPatch):
    """The request fails with it; what it counted as, and whose it was, is forgotten all the same."""
    rig = Rig()
    monkeypatch.setattr(rig.traces, "begin", lambda _admitted: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await rig.request()
    assert not rig.status.caps.underway
    assert edge_asgi.ticket.get() is None


async def test_vllm_is_handed_our_span_as_its_parent():
    """Its own request span is a child of ours; what vendors carry along is carried along."""
    rig = Rig()
    await rig.request(traceparent=f"00-{TRACE}-{PARENT}-01", tracestate="vendor=1")
    ours = rig.spans()["coxswain.request"][0].context.span_id
    assert rig.seen["traceparent"] == f"00-{TRACE}-{ours:016x}-01"
    assert rig.seen["tracestate"] == "vendor=1"


async def test_a_client_without_a_trace_gets_one_of_our_own():
    """Then vLLM's span and ours are in one trace still."""
    rig = Rig()
    await rig.request()
    (whole,) = rig.spans()["coxswain.request"]
    assert whole.parent is None
    assert rig.seen["traceparent"].split("-")[1] == f"{whole.context.trace_id:032x}"


async def test_children_of_a_request_have_spans_of_their_own():
    """n=2: each child queues and runs at its own times."""
    rig = Rig()
    request = await rig.request()
    rig.happen(request, (1.0, *QUEUED))
    rig.happen(request, (2.0, *QUEUED), child=1)
    rig.happen(request, (3.0, *ADMITTED), (4.0, *FINISHED))
    rig.happen(request, (5.0, *ADMITTED), (6.0, *FINISHED), child=1)
    assert times(rig.spans()["queue"]) == [(1.0, 3.0), (2.0, 5.0)]
    assert [span.attributes["coxswain.child"] for span in rig.spans()["run"]] == [0, 1]  # type: ignore[index]


async def test_what_is_not_sampled_costs_no_memory():
    """The sampler decides; vLLM is told so, too."""
    rig = Rig(sampler=ALWAYS_OFF)
    request = await rig.request()
    rig.happen(request, (1.0, *QUEUED), (3.0, *ADMITTED), (4.0, *FINISHED))
    assert rig.spans() == {}
    assert not rig.traces.open
    flags = int(rig.seen["traceparent"].rpartition("-")[2], 16)
    assert not flags & 1


async def test_events_of_others_are_passed_over():
    """Another process's requests, events without a request, kinds of a later version."""
    rig = Rig()
    rig.happen("cox.somebody-elses", (1.0, *QUEUED))
    rig.traces.heard(b'{"kind": "of a later version", "at": 1.0, "more": {}}')
    assert not rig.traces.open
    with pytest.raises(msgspec.MsgspecError):
        rig.traces.heard(b"{}")


async def test_open_requests_are_bounded(monkeypatch: pytest.MonkeyPatch):
    """Requests whose end was never told are given up, the oldest first, and what is known of them is exported."""
    monkeypatch.setattr(edge_trace, "MAX_OPEN", 3)
    rig = Rig()
    first = await rig.request()
    rig.happen(first, (1.0, *QUEUED))
    for _ in range(5):
        await rig.request()
    assert len(rig.traces.open) == 3
    assert first not in rig.traces.open
    assert len(rig.spans()["queue"]) == 1


def test_off_is_free():
    """Without vLLM's own flag nothing is made, nothing is heard, and OpenTelemetry is not even imported."""
    code = (
        "import sys; from types import SimpleNamespace as N; from coxswain.service.config import Settings;"
        "from coxswain.service.edge.status import listener; import coxswain.service.edge.asgi;"
        "env = {'COX_NATS_URL': 'nats://127.0.0.1:1', 'COX_WORKER': 'w1'};"
        "app = N(state=N(vllm_config=N(parallel_config=N(), observability_config=N(otlp_traces_endpoint=None))));"
        "status = listener(Settings.from_env(env), env)(app);"
        "assert status.traces is None;"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_vllms_flag_is_ours():
    """`--otlp-traces-endpoint` is all there is to set."""
    env = {"COX_NATS_URL": "nats://127.0.0.1:1", "COX_WORKER": "w1"}
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(),
        observability_config=SimpleNamespace(otlp_traces_endpoint="http://127.0.0.1:4318/v1/traces"),
    )
    listen = listener(Settings.from_env(env), env)
    assert listen is not None
    assert isinstance(listen(SimpleNamespace(state=SimpleNamespace(vllm_config=config))).traces, Traces)
