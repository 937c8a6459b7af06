"""`/metrics` of a live worker and a live controller: every name of the contract is there, and no other. And its traces.

A worker on the simulated device behind its real HTTP server, with the real edge, and `cox controller`, as processes.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from ulid import ULID

from coxswain.control.client import Client
from coxswain.schemas import metrics as names
from coxswain.schemas.commands import Continue, Preempt, Targets
from coxswain.schemas.policy import TenantPolicy
from tests.support.nats import free_port
from tests.support.otlp import Receiver
from tests.support.promql import OF_PROMETHEUS, queries, selectors
from tests.support.serving import FLEET, WORKER, Api, Served, serving

pytestmark = [pytest.mark.vllm, pytest.mark.nats, pytest.mark.timeout(300)]

WAIT_S = 30.0


class Watched(NamedTuple):
    """A fleet of one worker and one controller."""

    served: Served
    controller: str
    """Where its page is."""
    receiver: Receiver
    """Where its traces go."""

    def worker_page(self) -> dict[str, Metric]:
        """Coxswain's families of the worker's page."""
        return page(f"{self.served.http}/metrics", self.served.keys["acme"])

    def controller_page(self) -> dict[str, Metric]:
        """Of the controller's."""
        return page(self.controller)


def page(url: str, key: str | None = None) -> dict[str, Metric]:
    """Coxswain's families on a page, by the name that is in the contract."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    text = httpx.get(url, timeout=10, headers=headers).raise_for_status().text
    families = {}
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        if name.startswith("coxswain_") and not name.endswith(
            "_created"
        ):  # prometheus_client's own companion
            assert name not in families, f"{name} is there twice"
            families[name] = family
    return families


def value(families: dict[str, Metric], metric: names.Metric, **labels: str) -> float | None:
    """The sum of the samples with these labels; None if there is none."""
    family = families.get(metric.name)
    found = [
        sample.value
        for sample in (family.samples if family else ())
        if labels.items() <= sample.labels.items()
    ]
    return sum(found) if found else None


def eventually(
    look: Callable[[], dict[str, Metric]], true: Callable[[dict[str, Metric]], object]
) -> dict[str, Metric]:
    """Look until it is true; what was seen then."""
    deadline = time.monotonic() + WAIT_S
    while not true(seen := look()):
        assert time.monotonic() < deadline, {
            name: [tuple(sample[1:3]) for sample in family.samples] for name, family in seen.items()
        }
        time.sleep(0.1)
    return seen


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """One fleet for all tests of this module."""
    folder = tmp_path_factory.mktemp("metrics")
    port = free_port()
    with (
        pytest.MonkeyPatch.context() as env,
        Receiver() as receiver,
    ):
        env.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        env.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with serving(
            folder, "--device", "simulated", "--sim-preset", "cpu", "--otlp-traces-endpoint", receiver.url,
            tenants=("acme",),
        ) as served:  # fmt: skip
            yield from controlled(folder, served, receiver, port)


def controlled(folder: Path, served: Served, receiver: Receiver, port: int) -> Iterator[Watched]:
    """Run `cox controller` beside a worker, with its page on a port."""
    log = (folder / "controller.log").open("wb")
    controller = subprocess.Popen(
        [Path(sys.executable).with_name("cox"), "controller", "--metrics", str(port)],
        env={**os.environ, "COX_NATS_URL": served.nats.url, "COX_FLEET": FLEET}, stdout=log, stderr=log,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}/metrics"
    try:
        deadline = time.monotonic() + WAIT_S
        while True:
            assert time.monotonic() < deadline, (folder / "controller.log").read_text()
            try:
                httpx.get(url)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield Watched(served, url, receiver)
    finally:
        controller.send_signal(signal.SIGTERM)
        controller.wait(15)
        log.close()


async def happen(watched: Watched) -> None:
    """Give every family something to count: traffic, a command, refusals here and there, a table."""
    served = watched.served
    client, api = await Client.connect(served.connection()), Api(served)
    try:
        await client.tenants.put("acme", TenantPolicy(weight=2.0))
        await api.stream("The river", tenant="acme", tokens=30).end()
        assert (await api.client.post("/v1/completions", json={})).status_code == 401
        targets = Targets(requests=("no-such-request",))
        (reply,) = await client.command(WORKER, "preempt", Preempt(id=str(ULID()), targets=targets))
        assert reply.code == 404
    finally:
        await client.close()
        await api.close()


async def test_live_processes_export_every_name_of_the_contract_and_no_other(watched: Watched) -> None:
    """Names, kinds and labels are those of the contract, on both pages together, each on one of them."""
    await happen(watched)
    worker = eventually(
        watched.worker_page,
        lambda seen: (
            value(seen, names.TENANT_OUTPUT, tenant="acme") == 30
            and value(seen, names.WORKER_LEADER_AGE) is not None
            and value(seen, names.WORKER_COMMANDS, verb="preempt", outcome="404")
        ),
    )
    controller = eventually(
        watched.controller_page,
        lambda seen: (
            value(seen, names.CONTROLLER_COMMANDS, verb="configure")
            and value(seen, names.CONTROLLER_TABLE_ROWS)
        ),
    )
    assert not worker.keys() & controller.keys()
    found = worker | controller
    # No healthy fleet refuses what its controller says.
    assert names.ALL.keys() - found.keys() <= {names.CONTROLLER_REFUSED.name}
    for name, family in found.items():
        metric = names.ALL[name]
        assert family.type == metric.kind, name
        assert family.documentation == metric.help, name
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == set(metric.labels), name
            assert sample.labels["fleet"] == FLEET


async def test_values_that_dashboards_and_alerts_choose_by_are_values_that_there_are(
    watched: Watched,
) -> None:
    """A state or a reason that nobody exports would be a panel without a line, and an alert that never fires."""
    await happen(watched)
    live = eventually(
        lambda: watched.worker_page() | watched.controller_page(),
        lambda seen: (
            value(seen, names.CLASS_REQUESTS) is not None
            and value(seen, names.CONTROLLER_TABLE_REFUSED) is not None
        ),
    )
    asked = {
        (selector.family, label, wanted)
        for query in queries()
        for selector in selectors(query.text)
        for label, wanted in selector.equal.items()
        if label not in OF_PROMETHEUS
    }
    assert asked
    for family, label, wanted in sorted(asked):
        assert wanted in {sample.labels[label] for sample in live[family].samples}, (family, label, wanted)


async def test_numbers_are_those_of_what_happened(watched: Watched) -> None:
    """A request's tokens, a refusal at the edge, who leads, and how many workers it sees."""
    before = watched.worker_page()
    await happen(watched)
    # Tenants are shown as of the last full frame: the page before may not have had all that the tests before did.
    finished = value(before, names.TENANT_FINISHED, tenant="acme") or 0
    worker = eventually(
        watched.worker_page,
        lambda seen: (value(seen, names.TENANT_FINISHED, tenant="acme") or 0) > finished,
    )
    assert value(worker, names.TENANT_OUTPUT, tenant="acme") == 30 * value(
        worker, names.TENANT_FINISHED, tenant="acme"
    )  # type: ignore[operator]
    assert (
        value(worker, names.EDGE_REFUSALS, status="401")
        == (value(before, names.EDGE_REFUSALS, status="401") or 0) + 1
    )
    assert value(worker, names.EDGE_CONNECTED) == 1
    assert value(worker, names.WORKER_STATE, state="serving") == 1
    assert (value(worker, names.WORKER_STATUS_AGE) or 0) < 10
    assert value(worker, names.WORKER_ACTIVE_SLOTS) < value(worker, names.WORKER_RUNNER_SLOTS)  # type: ignore[operator]
    seen = eventually(
        watched.controller_page, lambda seen: value(seen, names.CONTROLLER_WORKERS, liveness="live") == 1
    )
    assert value(seen, names.CONTROLLER_LEADING) == 1
    assert value(seen, names.CONTROLLER_TERMS) == 1
    assert value(seen, names.CONTROLLER_TABLE_ROWS, table="tenants") == 1
    assert value(seen, names.CONTROLLER_FRAMES) > 0  # type: ignore[operator]


async def test_a_held_request_is_one_trace_with_vllms_own_span(watched: Watched) -> None:
    """By the client's traceparent: our request span under it, and under that queue, run, hold, run, and vLLM's own."""
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    client, api = await Client.connect(watched.served.connection()), Api(watched.served)
    try:
        headers = {"traceparent": f"00-{trace}-{parent}-01"}
        stream = api.stream("The river", tenant="acme", tokens=1_000, headers=headers)
        await stream.until(5)
        for verb, command in (("preempt", Preempt), ("continue", Continue)):
            targets = Targets(requests=(stream.request,))
            (reply,) = await client.command(WORKER, verb, command(id=str(ULID()), targets=targets))
            assert reply.outcome == "applied"
            await asyncio.sleep(0.2)
        await stream.end()
    finally:
        await client.close()
        await api.close()
    deadline = time.monotonic() + WAIT_S
    while len(spans := watched.receiver.of(trace)) < 5:
        assert time.monotonic() < deadline, spans
        await asyncio.sleep(0.05)
    (whole,) = spans.pop("coxswain.request")
    assert whole.parent == parent
    assert whole.attributes["coxswain.tenant"] == "acme"
    assert {name: len(each) for name, each in spans.items()} == {
        "queue": 1,
        "run": 2,
        "hold": 1,
        "llm_request": 1,
    }
    assert {span.parent for group in spans.values() for span in group} == {whole.id}
    (hold,) = spans["hold"]
    assert hold.attributes["coxswain.by"] == "operator"
    assert hold.end - hold.begin > 0.15
    assert spans["run"][0].end == hold.begin
    assert spans["run"][1].begin == hold.end
