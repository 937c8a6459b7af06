"""Caps on queued requests and draining over HTTP: a real server on the simulated device, a real NATS server."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import msgspec
import pytest

from coxswain.control.client import Client
from coxswain.schemas.commands import COMMANDS, Reply, Targets
from coxswain.schemas.policy import ClassPolicy, TenantPolicy
from coxswain.schemas.status import ClassStatus, Frame, decode_frame
from tests.support.serving import WORKER, Served, serving
from tests.support.waiting import eventually

pytestmark = [pytest.mark.nats, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(300)]

ACME = Targets(tenants=("acme",))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all tests here, with two tenants and eight slots."""
    folder = tmp_path_factory.mktemp("edge")
    arguments = ("--device", "simulated", "--max-num-seqs", "8", "--max-model-len", "2048")
    with serving(folder, *arguments, tenants=("acme", "globex")) as served:
        yield served


class Edge:
    """What tests do: ask over HTTP, steer, and watch every frame."""

    def __init__(self, served: Served, cox: Client) -> None:
        self.served = served
        self.cox = cox
        self.http = httpx.AsyncClient(base_url=served.http, timeout=60)
        self.frames: list[Frame] = []
        self.made = 0

    async def post(self, tenant: str = "acme", tokens: int = 1, **fields: Any) -> httpx.Response:
        """A completion, whole."""
        headers = {"authorization": f"Bearer {self.served.keys[tenant]}", **fields.pop("headers", {})}
        body = {"model": "tiny", "prompt": "the captain", "max_tokens": tokens, "ignore_eos": True, **fields}
        return await self.http.post("/v1/completions", json=body, headers=headers)

    def begin(self, tenant: str = "acme", tokens: int = 300, **fields: Any) -> asyncio.Task[httpx.Response]:
        """The same, in the background."""
        return asyncio.create_task(self.post(tenant, tokens, **fields))

    async def __call__(self, verb: str, **fields: Any) -> Reply:
        """Command the worker."""
        self.made += 1
        command = COMMANDS[verb](id=f"{time.time_ns()}", **fields)
        (reply,) = await self.cox.command(WORKER, verb, command)
        assert reply.outcome == "applied", reply
        return reply

    def queued(self, name: str = "acme") -> int | None:
        """How many of a tenant's requests wait, by the last full frame; None if none has told yet."""
        full = next((frame for frame in reversed(self.frames) if frame.full), None)
        return next((row.queued for row in full.tenants if row.tenant == name), None) if full else None

    async def heard(self) -> None:
        """Wait until everybody has heard of what was commanded: another frame, and a moment."""
        count = len(self.frames)
        await eventually(lambda: len(self.frames) > count)
        await asyncio.sleep(0.5)


@pytest.fixture
async def edge(served: Served) -> AsyncIterator[Edge]:
    """The server, with no caps and no load at the end."""
    cox = await Client.connect(served.connection())
    edge = Edge(served, cox)

    async def on_status(msg: Any) -> None:
        edge.frames.append(decode_frame(msg.data))

    await cox.nc.subscribe(cox.subjects.status(WORKER), cb=on_status)
    yield edge
    if cox.nc.is_connected:
        await edge("limit", targets=Targets(tenants=("acme", "globex")), max_running=None, max_queued=None)
        await edge("drain", on=False)
        await edge("configure")
        await edge.heard()
    await edge.http.aclose()
    await cox.close()


def most_queued(edge: Edge, tenant: str = "acme") -> int:
    """The most that any frame had of a tenant waiting."""
    return max(row.queued for frame in edge.frames for row in frame.tenants if row.tenant == tenant)


async def test_queue_stays_within_its_cap(edge: Edge) -> None:
    """However many ask at once, no frame ever has more of the tenant waiting; the rest are told when to try again."""
    await edge("limit", targets=ACME, max_running=1, max_queued=3)
    await edge.heard()
    tasks: list[asyncio.Task[httpx.Response]] = []
    for _ in range(8):
        tasks += [edge.begin(tokens=40) for _ in range(4)]
        await asyncio.sleep(0.1)
    assert (await edge.post("globex")).status_code == 200
    answers = await asyncio.gather(*tasks)
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 4
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("RateLimitError", 429)
    assert "at most 3 may (max_queued)" in error["message"]
    assert most_queued(edge) == 3
    await edge.heard()
    assert (await edge.post()).status_code == 200, "places are given back"


async def test_children_count_each(edge: Edge) -> None:
    """A request with `n` of 4 is let in as one and fills four places; prompts of a list do too."""
    await edge("limit", targets=ACME, max_running=0, max_queued=4)
    await edge.heard()
    many = edge.begin(n=2, prompt=["one", "two"], tokens=20)
    await eventually(lambda: edge.queued() == 4)
    assert (await edge.post()).status_code == 429
    await edge("limit", targets=ACME, max_running=None)
    assert (await many).status_code == 200


async def test_class_with_a_full_queue(edge: Edge) -> None:
    """A class's cap from the table turns away who asks for it, and nobody else."""
    await edge(
        "configure",
        classes={"batch": ClassPolicy(max_queued=0)},
        tenants={"default": TenantPolicy(classes=("batch",))},
    )
    await edge.heard()
    answer = await edge.post(headers={"x-cox-class": "batch"})
    assert (answer.status_code, "class 'batch'" in answer.text) == (429, True)
    assert (await edge.post()).status_code == 200
    rows: list[ClassStatus] = [row for frame in edge.frames[-3:] for row in frame.classes]
    assert msgspec.structs.asdict(next(row for row in rows if row.class_ == "batch"))["max_queued"] == 0


async def test_drain(edge: Edge) -> None:
    """A draining server refuses what is new with 503 and Retry-After, serves what it has, and lists its models."""
    running = edge.begin(tokens=400)
    await eventually(lambda: edge.frames and edge.frames[-1].running)
    await edge("drain", on=True)
    await edge.heard()
    answer = await edge.post("globex")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
    assert answer.json()["error"]["type"] == "ServiceUnavailableError"
    key = {"authorization": f"Bearer {edge.served.keys['acme']}"}
    assert (await edge.http.get("/v1/models", headers=key)).status_code == 200
    assert (await running).status_code == 200
    await edge("drain", on=False)
    await edge.heard()
    assert (await edge.post("globex")).status_code == 200


async def test_caps_end_some_seconds_after_nats(edge: Edge) -> None:
    """With NATS gone the last values stand for 5 s; then everybody is served, as ever without waiting. Run last."""
    await edge("limit", targets=ACME, max_queued=0)
    await edge.heard()
    edge.served.nats.kill()
    assert (await edge.post()).status_code == 429
    assert (await edge.post("globex")).status_code == 200
    deadline = time.monotonic() + 30
    while (await edge.post()).status_code == 429:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)
