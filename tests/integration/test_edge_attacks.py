"""The HTTP edge under attack: raw requests of any shape at a real uvicorn, and tricks at a real worker on NATS.

What the edge decides is in headers, paths and framing, which raw bytes reach. What vLLM's own schema allows, every
path, method and body of it, comes from schemathesis, at the same worker.
"""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ulid import ULID

from coxswain.control.client import Client
from coxswain.control.doctor import judge
from coxswain.control.examine import examine
from coxswain.schemas.names import DEFAULT
from coxswain.service import keys, request_id
from coxswain.service.edge.asgi import EdgeMiddleware
from coxswain.service.edge.core import OPEN_PATHS, Edge, EdgeSettings
from coxswain.service.keys import Grant, Keyring
from coxswain.service.tiny import make_model
from tests.support.nats import free_port
from tests.support.secured import Secured, secured

SECRET = "5e" * 32
CHAT = "/v1/completions"
SCHEMA_S = 12.0
"""For all of vLLM's operations together."""
GRANT = Grant(tenant="acme", class_="chat", classes=("batch",), priority_min=-5, priority_max=5)


class Inside:
    """What stands where vLLM would: it notes what it is given, and answers."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request, its body read to the end."""
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        self.seen.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


class Server(NamedTuple):
    """A uvicorn with the edge in front of `inside`."""

    port: int
    key: str
    inside: Inside

    def raw(self, data: bytes) -> bytes:
        """Send bytes as they are, and what comes back until the server closes or says no more."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=0.3) as connection:
            # A last request that ends the connection, or is swallowed as a body; a bare end would cut ours short.
            connection.sendall(data + b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            found = b""
            try:
                while piece := connection.recv(65_536):
                    found += piece
            except (TimeoutError, ConnectionError):
                pass
            return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests of this module."""
    path = tmp_path_factory.mktemp("edge") / "keys.json"
    key = keys.add(path, GRANT, now=0.0)
    inside, keyring = Inside(), Keyring(path)
    edge = Edge(EdgeSettings(bytes.fromhex(SECRET), tenant_header=b"x-tenant"), keyring)
    app = EdgeMiddleware(inside, edge, keyring)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        runs = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_keep_alive=1))
        thread = threading.Thread(target=runs.run, kwargs={"sockets": [listening]})
        thread.start()
        while not runs.started:
            time.sleep(0.01)
        yield Server(listening.getsockname()[1], key, inside)
        runs.should_exit = True
        thread.join(10)


TEXT = st.text(st.characters(codec="latin-1"), max_size=30).map(lambda text: text.encode("latin-1"))
FORGED = request_id.make(b"not the key" * 4, "beta", "gold", str(ULID())).encode()
NAMES = st.sampled_from([
    b"X-Request-Id", b"x-request-id", b"X-Cox-Class", b"X-Vllm-Priority", b"X-Tenant", b"x-tenant ", b"X_Tenant",
    b"Forwarded", b"X-Forwarded-For", b"Authorization", b"x-api-key", b"Content-Length", b"Transfer-Encoding",
    b"Connection", b"Upgrade", b"Host", b"Expect", b"X-HTTP-Method-Override",
])  # fmt: skip
VALUES = st.sampled_from([
    b"beta", b"gold", b"batch", b"-2147483648", b"99", b"+5", b"0x1", b"1e3", FORGED, b"127.0.0.1", b"chunked",
    b"7", b"close", b"websocket", b"Bearer ", b"Bearer cox-sk-x", b"keep-alive, x-cox-class", b"100-continue",
])  # fmt: skip
PATHS = st.sampled_from([
    b"/v1/completions", b"//v1/completions", b"/health/../v1/completions", b"/health", b"/health/", b"/v1/../pause",
    b"/%76%31/completions", b"/pause", b"/health%2f..%2fpause", b"/HEALTH", b"/health;x", b"/metrics?x=/v1/", b"*",
    b"http://other/v1/completions", b"/v1/load_lora_adapter", b"/v1/load_lora_adapter/", b"/health\x00", b"/",
])  # fmt: skip
METHODS = st.sampled_from([b"GET", b"OPTIONS", b"HEAD", b"get", b"CONNECT", b"TRACE", b"X"])
OURS = {
    b"x-request-id": st.just(FORGED) | VALUES,
    b"X-Cox-Class": st.sampled_from([b"batch", b"chat", b"batch", b"gold"]),
    b"X-Vllm-Priority": st.sampled_from([b"-2147483648", b"99", b"+5", b"3", b"-6"]),
    b"x-tenant": st.just(b"beta"),
}
TWISTS = ("method", "path", "version", "line", "header", "key", "body")


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request with headers of ours and the key (`KEY` stands for it), with up to two things wrong with it."""
    twists = draw(st.lists(st.sampled_from(TWISTS), max_size=2))
    names = draw(st.lists(st.sampled_from(sorted(OURS)), max_size=3, unique="method" not in twists))
    headers = [(b"Host", b"x"), *((name, draw(OURS[name])) for name in names)]
    method, path, version, end, body = b"POST", CHAT.encode(), b"HTTP/1.1", b"\r\n", b""
    for twist in twists:
        match twist:
            case "method":
                method = draw(METHODS)
            case "path":
                path = draw(PATHS | TEXT.map(lambda text: b"/" + text))
            case "version":
                version = draw(st.sampled_from([b"HTTP/1.0", b"HTTP/2", b"http/1.1"]))
            case "line":
                end = draw(st.sampled_from([b"\n", b"\r\n ", b"\r"]))
            case "header":
                headers.append((draw(NAMES | TEXT), draw(VALUES | TEXT)))
            case "body":
                smuggled = b"5\r\nhello\r\n0\r\n\r\nGET /pause HTTP/1.1\r\nHost: x\r\n\r\n"
                body = draw(st.binary(max_size=40) | st.just(smuggled))
    if "key" not in twists:
        headers.insert(draw(st.integers(0, len(headers))), (b"Authorization", b"Bearer KEY"))
    return (
        b" ".join((method, path, version))
        + end
        + b"".join(n + b": " + v + end for n, v in headers)
        + end
        + body
    )


reached: list[int] = []
"""For each input, how many requests for completions came through."""


@settings(
    derandomize=True,
    max_examples=300,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)
@given(data=requests())
def test_whatever_is_sent_only_the_keys_own_identity_gets_in(server: Server, data: bytes) -> None:
    """What reaches vLLM is open to all, or the key's tenant, class and range of priorities; no error 500."""
    server.inside.seen.clear()
    reply = server.raw(data.replace(b"KEY", server.key.encode()))
    reached.append(len([scope for scope in server.inside.seen if scope["path"] == CHAT]))
    assert b" 500 " not in reply.split(b"\r\n", 1)[0], reply
    for scope in server.inside.seen:
        if scope["method"] == "OPTIONS" or scope["path"].removesuffix("/") in OPEN_PATHS:
            continue
        assert scope["path"].startswith("/v1/")
        assert scope["path"].removesuffix("/") != "/v1/load_lora_adapter"
        ids = [value.decode() for name, value in scope["headers"] if name.lower() == b"x-request-id"]
        assert len(ids) == 1
        found = request_id.parse(bytes.fromhex(SECRET), f"cmpl-{ids[0]}-0-1a2b3c4d")
        assert (found.tenant, found.class_ in ("chat", "batch")) == ("acme", True)
        priorities = [int(value) for name, value in scope["headers"] if name.lower() == b"x-vllm-priority"]
        assert all(-5 <= priority <= 5 for priority in priorities)
        assert len(priorities) <= 1
        assert not any(name.lower() in (b"x-tenant", b"x-cox-class") for name, _ in scope["headers"])


def test_the_inputs_above_do_get_through_often_enough() -> None:
    """A generator of requests that the server drops would prove nothing."""
    assert sum(map(bool, reached)) > len(reached) / 10


# A whole worker


class Whole(NamedTuple):
    """A worker on the simulated device, with users, API keys and secrets in every setting."""

    nats: Secured
    http: str
    key: str
    log: Path
    secrets: dict[str, str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    """One for all tests that need one."""
    with whole(tmp_path_factory.mktemp("whole")) as made:
        yield made


@contextmanager
def whole(folder: Path) -> Iterator[Whole]:
    """Run one until the block ends."""
    key = keys.add(folder / "keys.json", GRANT, now=0.0)
    admin = keys.add(folder / "keys.json", Grant(tenant="root", admin=True), now=0.0)
    model = make_model(folder / "model")
    (model / "model.safetensors").unlink()
    port = free_port()
    log = folder / "worker.log"
    with secured(folder) as nats:
        url = nats.nats.url.replace("//", "//somebody:hunter2-in-url@")
        env = {name: value for name, value in os.environ.items() if not name.startswith(("COX_", "VLLM_"))}
        env |= nats.env("worker-w1") | {
            "COX_NATS_URL": url, "COX_WORKER": "w1", "COX_IDENTITY_KEY": SECRET, "COX_KEYS": str(folder / "keys.json"),
        }  # fmt: skip
        line = [
            sys.executable, "-m", "coxswain.service.worker", str(model), "--device", "simulated", "--port", str(port),
            "--served-model-name", "tiny", "--host", "127.0.0.1",
        ]  # fmt: skip
        with log.open("wb") as out:
            worker = subprocess.Popen(
                line, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        secrets = {
            "seed": Path(nats.seed("worker-w1")).read_text().strip(), "api key": key, "identity key": SECRET,
            "password": "hunter2-in-url", "hash": keys.digest(key), "key of an admin": admin,
        }  # fmt: skip
        try:
            made = Whole(nats, f"http://127.0.0.1:{port}", key, log, secrets)
            _wait(made, worker)
            yield made
        finally:
            os.killpg(worker.pid, signal.SIGTERM)
            try:
                worker.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait(5)


def _wait(made: Whole, worker: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while True:
        assert worker.poll() is None, made.log.read_text()[-4_000:]
        assert time.monotonic() < deadline, made.log.read_text()[-4_000:]
        try:
            if httpx.get(f"{made.http}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.25)


@pytest.mark.nats
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_tricks_at_a_real_worker_end_as_the_keys_own_request(made: Whole) -> None:
    """Headers and bodies that name others: the log of events knows the key's tenant only, and no log has a secret."""
    body = {"model": "tiny", "prompt": "the river", "max_tokens": 4}
    with httpx.Client(base_url=made.http, timeout=60) as web:
        own = {"authorization": f"Bearer {made.key}"}
        mine = web.post(CHAT, json=body, headers=own)
        assert mine.status_code == 200, mine.text
        stolen = request_id.make(b"x" * 32, "beta", "gold", str(ULID()))
        for more, headers in (
            ({}, {"x-request-id": stolen, "x-tenant": "beta", "x-vllm-priority": "-2147483648"}),
            (
                {"priority": -1000, "request_id": stolen, "user": "beta", "tenant": "beta", "class": "gold"},
                {},
            ),
            ({"priority": 1000}, {"x-cox-class": "batch"}),
            ({"request_id": mine.headers["x-request-id"], "vllm_xargs": {"tenant": "beta"}}, {}),
        ):
            done = web.post(CHAT, json=body | more, headers=own | headers)
            assert done.status_code == 200, done.text
        for headers, code in (
            ({}, 401),
            ({"authorization": f"Bearer {made.key}x"}, 401),
            (own | {"x-cox-class": "gold"}, 403),
            (own | {"x-vllm-priority": "lots"}, 400),
        ):
            assert web.post(CHAT, json=body, headers=headers).status_code == code
        assert web.post("/pause", headers=own).status_code == 403
        events, findings = asyncio.run(_seen_from_nats(made))
    queued = [event for event in events if type(event).__name__ == "Queued"]
    assert len(queued) == 5
    assert {event.tenant for event in queued} == {"acme"}
    assert {event.class_ for event in queued} <= {DEFAULT, "chat", "batch"}
    assert all(-5 <= event.priority <= 5 for event in queued)
    worker = [each for each in findings if each.check == "worker w1"]
    assert [each.level for each in worker] == ["ok"], worker
    told = made.log.read_text() + made.nats.nats.log.read_text() + repr(events)
    assert "nats.connected" in told
    assert [name for name, secret in made.secrets.items() if secret in told] == []


async def _seen_from_nats(made: Whole) -> tuple[list[Any], list[Any]]:
    """The log of events, once five requests have ended, and what the doctor thinks."""
    async with await Client.connect(made.nats.at("viewer")) as viewer:
        events: list[Any] = []
        async with asyncio.timeout(30):
            async for event in viewer.events(start="all"):
                events.append(event)
                if sum(type(each).__name__ == "Finished" for each in events) == 5:
                    break
        return events, judge(await examine(viewer, timeout_s=2))


@pytest.mark.nats
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_whatever_vllms_schema_allows_is_asked_in_the_keys_own_name(made: Whole) -> None:
    """Every operation that vLLM documents, with bodies that it allows and some that it does not, for a bounded time.

    Without a key nothing but probes answers; with one nothing administrative does, the id is ours if there is one, and
    whatever becomes work is the key's tenant's. No error is ours.
    """
    admin = {"authorization": f"Bearer {made.secrets['key of an admin']}"}
    document = httpx.get(f"{made.http}/openapi.json", headers=admin, timeout=90).json()
    found = schemathesis.openapi.from_dict(document).get_all_operations()
    operations = {f"{each.method.upper()} {each.path}": each for each in (one.ok() for one in found)}
    first = [f"POST {CHAT}", "GET /load", "POST /tokenize"]
    until = time.monotonic() + SCHEMA_S
    seen: dict[str, set[int]] = {}
    for place in (*first, *sorted(operations.keys() - set(first))):
        if place in first or time.monotonic() < until:
            answers = seen[place] = set()
            _attack(operations[place], lambda case, answers=answers: answers.add(_ask(made, case)))
    assert seen[f"POST {CHAT}"]
    assert seen["GET /load"] == {403}, "administration, which the key does not open"
    assert httpx.get(f"{made.http}/health", timeout=30).status_code == 200
    blocks = made.log.read_text().split("Traceback (most recent call last)")[1:]
    lasts = [re.findall(r'File "([^"]+)"', block)[-1:] for block in blocks]
    assert not [last for last in lasts if "coxswain" in "".join(last)]
    events = asyncio.run(_tenants(made))
    assert events <= {"acme", "root"}


def _attack(operation: Any, ask: Callable[[Any], None]) -> None:
    """Ask for a few cases of an operation."""

    @settings(
        max_examples=3, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )  # fmt: skip
    @given(case=operation.as_strategy())
    def attack(case: Any) -> None:
        ask(case)

    attack()


def _ask(made: Whole, case: Any) -> int:
    """Ask without a key and with one; the status with one."""
    nobody = case.call(base_url=made.http, timeout=60)
    path = urlsplit(nobody.request.url).path
    if path in OPEN_PATHS:
        return int(nobody.status_code)
    assert nobody.status_code == 401, path
    answer = case.call(base_url=made.http, headers={"Authorization": f"Bearer {made.key}"}, timeout=60)
    assert answer.status_code != 401, path
    name = "cox." if answer.status_code == 403 else "cox.acme."
    told = (path, answer.status_code, answer.headers, answer.text[:500])
    ids = answer.headers.get("x-request-id", [])
    # What vLLM answers when it fails with an exception, it sends past its middleware: under no id.
    assert [each for each in ids if each.startswith(name)] or (not ids and answer.status_code == 500), told
    return int(answer.status_code)


async def _tenants(made: Whole) -> set[str]:
    """Whose work the log of events knows."""
    async with await Client.connect(made.nats.at("viewer")) as viewer:
        return {event.tenant async for event in viewer.events(start="all", follow=False) if event.request}
