"""Our families on vLLM's own page: what is there, what is left alone, and several processes that are one server."""

import asyncio
import io
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client import CollectorRegistry, Gauge, make_asgi_app
from prometheus_client.parser import text_string_to_metric_families

from coxswain.common.connection import Connection
from coxswain.common.logs import get_logger
from coxswain.schemas import metrics as names
from coxswain.schemas.status import ClassStatus, Frame, Leader
from coxswain.service import keys
from coxswain.service.edge.asgi import EdgeMiddleware
from coxswain.service.edge.caps import EdgeCaps
from coxswain.service.edge.core import Edge, EdgeSettings
from coxswain.service.edge.metrics import EdgeMetrics
from coxswain.service.edge.status import EdgeStatus
from coxswain.service.edge.views import EdgeFrame
from coxswain.service.keys import Grant, Keyring
from tests.support.frames import frame, row

SECRET = "ab" * 32


def vllms_page() -> Any:
    """An app with prometheus_client's own page, which compresses and negotiates."""
    registry = CollectorRegistry()
    Gauge("vllm_something", "Of vLLM.", registry=registry).set(7)
    return make_asgi_app(registry)


async def get(
    app: Any, metrics: EdgeMetrics, path: str = "/metrics", ring: Keyring | None = None, **headers: str
) -> httpx.Response:
    """Ask the app behind the edge."""
    status = EdgeStatus(Connection(urls=("nats://127.0.0.1:1",)), EdgeCaps(["w1"]), metrics)
    status.start = lambda: None  # type: ignore[method-assign]
    edge = Edge(EdgeSettings.from_env({"COX_IDENTITY_KEY": SECRET}), ring)
    transport = httpx.ASGITransport(app=EdgeMiddleware(app, edge, ring, lambda _app: status))
    async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
        return await client.get(path, headers=headers)


def heard(metrics: EdgeMetrics, *frames: Frame, at: float | None = None) -> None:
    """Frames came from NATS."""
    for each in frames:
        payload = msgspec.json.encode(each)
        metrics.latest.keep(msgspec.json.decode(payload, type=EdgeFrame), payload, at or time.time())


def values(text: str) -> dict[tuple[str, ...], float]:
    """Every sample, by name and the values of its labels, in order of the labels, without fleet and worker."""
    return {
        (
            sample.name,
            *(value for label, value in sample.labels.items() if label not in ("fleet", "worker")),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def some(seq: int = 1, output: int = 40, **fields: Any) -> Frame:
    """A frame with two tenants and a class."""
    rows = (
        row("acme", queued=2, running=1, oldest_queued_s=1.5, weight=4.0, output_tokens_total=output),
        row("beta", held=1, output_tokens_total=3),
    )
    chat = ClassStatus(class_="chat", queued=2, running=1, held=1, oldest_queued_s=1.5)
    plain: dict[str, Any] = {"queued": 2, "running": 1, "held": 1, "step": 90, "classes": (chat,)}
    return frame("w1", "01A", seq, *rows, **(plain | fields))


@pytest.mark.parametrize(
    "headers",
    [{}, {"accept-encoding": "gzip"}, {"accept": "application/openmetrics-text; version=1.0.0"}],
    ids=["plain", "gzip", "openmetrics"],
)
async def test_one_page_has_vllms_families_and_ours(headers: dict[str, str]):
    """Whatever a scraper would like: one text that parses, with the length that it says."""
    metrics = EdgeMetrics("main", "w1", 5)
    heard(metrics, some())
    response = await get(vllms_page(), metrics, **headers)
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert int(response.headers["content-length"]) == len(response.content)
    found = values(response.text)
    assert found["vllm_something",] == 7
    assert found[names.TENANT_REQUESTS.name, "queued", "acme"] == 2
    assert found[names.TENANT_OUTPUT.name, "acme"] == 40
    assert found[names.TENANT_WEIGHT.name, "acme"] == 4
    assert found[names.CLASS_OLDEST_QUEUED.name, "chat"] == 1.5
    assert found[names.WORKER_REQUESTS.name, "held"] == 1
    assert found[names.WORKER_STEPS.name,] == 90
    assert found[names.WORKER_STATE.name, "serving"] == 1


async def test_what_is_no_page_is_left_as_it_is():
    """A server without the page answers 404 as before; other paths are never touched."""

    async def nothing(scope: Any, _receive: Any, send: Any) -> None:
        status = 404 if scope["path"] == "/metrics" else 200
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]}
        )
        await send({"type": "http.response.body", "body": b"mine"})

    for path, status in (("/metrics", 404), ("/health", 200)):
        response = await get(nothing, EdgeMetrics("main", "w1", 5), path)
        assert (response.status_code, response.content) == (status, b"mine")


async def test_a_frame_in_parts_counts_when_it_is_whole():
    """Half of a frame is not shown as if it were all."""
    metrics = EdgeMetrics("main", "w1", 5)
    heard(metrics, frame("w1", "01A", 1, row("acme", output_tokens_total=1), parts=2, part=0))
    assert (names.TENANT_OUTPUT.name, "acme") not in values((await metrics.page()).decode())
    heard(metrics, frame("w1", "01A", 1, row("beta", output_tokens_total=2), parts=2, part=1))
    found = values((await metrics.page()).decode())
    assert (found[names.TENANT_OUTPUT.name, "acme"], found[names.TENANT_OUTPUT.name, "beta"]) == (1, 2)


def test_parts_of_frames_that_cannot_be_are_not_kept():
    """Nobody who may send as a worker fills the server's memory; of a whole frame only the frame stays."""
    latest, payload = EdgeMetrics("main", "w1", 5).latest, bytes(100)

    def keep(seq: int, part: int, parts: int) -> int:
        """Give it a part; in how many places the payload is now, ours included."""
        latest.keep(EdgeFrame("w1", "01A", seq, True, part, parts, "serving"), payload, 0.0)
        return sys.getrefcount(payload)

    before = sys.getrefcount(payload) + 1  # whatever it is, it is the last that was heard
    assert {keep(1, part, 10**9) for part in range(100)} == {before}
    assert [keep(2, part, 3) - before for part in range(3)] == [1, 2, 3]
    assert keep(3, 0, 1) - before == 1


async def test_a_worker_whose_full_frames_come_seldom_is_not_silent():
    """With tens of thousands of tenants they do; what it says in between has an age too, and no numbers."""
    metrics = EdgeMetrics("main", "w1", 5)
    heard(metrics, some(), at=time.time() - 40)
    heard(metrics, some(2, full=False), at=time.time() - 1)
    found = values((await metrics.page()).decode())
    assert 1 <= found[names.WORKER_STATUS_AGE.name,] < 30
    assert (names.WORKER_STEP.name,) in found


@pytest.mark.parametrize("several", [False, True], ids=["one process", "several"])
async def test_levels_are_those_of_the_last_frame_of_any_kind(several: bool, tmp_path: Path):
    """Where full frames are far apart no leader, and no event, is told older than it is; rows are the full one's."""
    metrics = EdgeMetrics("main", "w1", 5, tmp_path if several else None)
    now, epoch = time.time(), (1.0, 1)
    heard(
        metrics,
        some(leader=Leader(epoch=epoch, age_s=0.2), events_waiting=9, events_waiting_s=3.0),
        at=now - 28,
    )
    later = some(9, full=False, leader=Leader(epoch=epoch, age_s=0.4), state="draining", held=0)
    heard(metrics, msgspec.structs.replace(later, tenants=(), classes=()), at=now - 1)
    heard(metrics, some(8, full=False, leader=Leader(epoch=epoch, age_s=20.0)), at=now)
    found = values((await metrics.page()).decode())
    assert 1.4 <= found[names.WORKER_LEADER_AGE.name,] < 15
    assert found[names.WORKER_OLDEST_EVENT.name,] == 0
    assert found[names.WORKER_STATE.name, "draining"] == 1
    assert found[names.WORKER_REQUESTS.name, "held"] == 0
    assert found[names.TENANT_REQUESTS.name, "queued", "acme"] == 2
    if several:
        other = EdgeMetrics("main", "w1", 5, tmp_path)
        heard(other, some(7, full=False, leader=Leader(epoch=epoch, age_s=0.0)), at=now - 2)
        found = values((await other.page()).decode())
        assert found[names.WORKER_STATE.name, "draining"] == 1, "what another process heard later"


async def test_a_silent_worker_has_an_age_and_no_levels():
    """Its queue as it was half a minute ago is nobody's queue now; what it served stays served."""
    metrics = EdgeMetrics("main", "w1", 5)
    heard(metrics, some(leader=Leader(epoch=(1.0, 1), age_s=0.5)), at=time.time() - 10)
    found = values((await metrics.page()).decode())
    age_s = found[names.WORKER_STATUS_AGE.name,]
    assert 10 <= age_s < 30
    assert found[names.WORKER_LEADER_AGE.name,] == pytest.approx(age_s + 0.5), (
        "it grows while nothing is heard"
    )
    metrics = EdgeMetrics("main", "w1", 5)
    heard(metrics, some(2), at=time.time() - 60)
    found = values((await metrics.page()).decode())
    assert found[names.WORKER_STATUS_AGE.name,] >= 60
    assert found[names.TENANT_OUTPUT.name, "acme"] == 40
    assert (names.WORKER_REQUESTS.name, "held") not in found


async def test_the_last_of_an_incarnation_counts_though_nobody_asked_before_it_ended():
    """A worker that was restarted between two visits loses nothing that a full frame told."""
    metrics = EdgeMetrics("main", "w1", 5)
    heard(
        metrics,
        some(output=40),
        some(9, output=55),
        frame("w1", "01B", 1, row("acme", output_tokens_total=5)),
    )
    for _ in range(2):
        found = values((await metrics.page()).decode())
        assert found[names.TENANT_OUTPUT.name, "acme"] == 60
        assert found[names.WORKER_RESTARTS.name,] == 1


async def test_processes_of_one_server_show_one_count(tmp_path: Path):
    """Whichever is asked, and however far behind its own ear is: nothing goes backwards, nothing counts twice."""
    first, second = (EdgeMetrics("main", "w1", 1, tmp_path) for _ in range(2))
    last: dict[tuple[str, ...], float] = {}
    for turn in range(1, 12):
        heard(first, some(turn, output=40 * turn))
        if turn % 3 == 0:
            heard(second, some(turn, output=40 * turn))
        for asked in (first, second):
            found = values((await asked.page()).decode())
            assert found[names.TENANT_OUTPUT.name, "acme"] == 40 * turn
            assert all(found[key] >= value for key, value in last.items() if key[0].endswith("_total"))
            last = found


async def test_tenants_are_shown_to_a_key_that_may_see_them(tmp_path: Path):
    """With keys the page stays open, but what it tells of tenants is for a key made with `--metrics` or `--admin`."""
    metrics, file = EdgeMetrics("main", "w1", 5), tmp_path / "keys.json"
    heard(metrics, some())
    grants = {name: Grant(tenant="acme", **{name: True}) for name in ("metrics", "admin")} | {
        "plain": Grant()
    }
    made = {name: keys.add(file, grant, now=0.0) for name, grant in grants.items()}
    ring = Keyring(file)
    for key in (None, "cox-sk-unknown", made["plain"]):
        response = await get(
            vllms_page(), metrics, ring=ring, **({} if key is None else {"authorization": f"Bearer {key}"})
        )
        assert response.status_code == 200
        assert "acme" not in response.text
        assert "coxswain_tenant" not in response.text
        assert values(response.text)[names.WORKER_STEPS.name,] == 90
        assert "--metrics" in response.text
    for name in ("metrics", "admin"):
        response = await get(vllms_page(), metrics, ring=ring, authorization=f"Bearer {made[name]}")
        assert values(response.text)[names.TENANT_OUTPUT.name, "acme"] == 40


@pytest.mark.parametrize("left", [b"", b"\x93\x01"])
async def test_a_damaged_count_goes_on_from_what_is_known(tmp_path: Path, left: bytes):
    """Whoever cut the file that API server processes share, counters do not go back, and the log says it."""
    said = io.StringIO()
    metrics = EdgeMetrics("main", "w1", 5, tmp_path, get_logger(said, {}))
    heard(metrics, some(1, output=40), frame("w1", "01B", 1, row("acme", output_tokens_total=5)))
    await metrics.page()
    (tmp_path / "coxswain-tally").write_bytes(left)
    for seq in (2, 3):
        heard(metrics, frame("w1", "01B", seq, row("acme", output_tokens_total=5 * seq)))
        found = values((await get(vllms_page(), metrics)).text)
        assert found[names.TENANT_OUTPUT.name, "acme"] == 40 + 5 * seq
    assert said.getvalue().count("metrics.damaged") == 1


async def test_a_process_that_dies_while_it_writes_leaves_the_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The whole file stands or the one before, so that another process's counters do not go back."""
    first, second = (EdgeMetrics("main", "w1", 5, tmp_path) for _ in range(2))
    heard(first, some(1, output=40))
    await first.page()
    heard(first, some(2, output=80))
    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed here")))
        assert await first.page() == b""
    found = values((await second.page()).decode())
    assert found[names.TENANT_OUTPUT.name, "acme"] == 40


async def test_vllms_page_stands_where_ours_cannot_be_made(tmp_path: Path):
    """A folder that went away, a full disk: vLLM's families are answered alone, and the log says why, once."""
    said = io.StringIO()
    metrics = EdgeMetrics("main", "w1", 5, tmp_path / "gone", get_logger(said, {}))
    for turn in range(2):
        for _ in range(2):
            heard(metrics, some())
            found = values((await get(vllms_page(), metrics)).text)
            assert found == {("vllm_something",): 7}
        assert said.getvalue().count("metrics.failed") == turn + 1
        (tmp_path / "gone").mkdir()
        assert (names.WORKER_STEPS.name,) in values((await get(vllms_page(), metrics)).text)
        shutil.rmtree(tmp_path / "gone")


async def test_two_who_ask_at_once_are_answered_alike():
    """Two Prometheus servers at the same moment."""
    metrics = EdgeMetrics("main", "w1", 5)
    heard(metrics, some())
    pages = await asyncio.gather(*(metrics.page() for _ in range(8)))
    assert all(values(page.decode())[names.TENANT_OUTPUT.name, "acme"] == 40 for page in pages)


async def test_while_nobody_asks_a_frame_is_kept_and_not_read():
    """The cost of being ready: bytes of one frame per worker, replaced as they come."""
    metrics = EdgeMetrics("main", "w1", 5)
    for seq in range(50):
        heard(metrics, some(seq))
    assert len(metrics.latest._lives) == 1
    assert metrics._tally.workers == {}
