"""Identity through the real vLLM server: what the scheduler in the engine process gets to see.

One server serves all tests: the tiny model on CPU, vLLM's own scheduler writing down what arrives. vLLM itself imports
the middleware, by the name that `cox worker` gives it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from coxswain.service import keys, tiny
from coxswain.service.keys import Grant
from coxswain.service.worker import MIDDLEWARE
from tests.support.nats import free_port

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(300)]

BOOT_S = 240
CHAT = "/v1/chat/completions"
PROMPT = "The captain will steer the boat to the harbour"
RUN = """
import sys
from coxswain.service.worker import Launch, run_vllm
sys.exit(run_vllm(Launch(sys.argv[1:], {}, dry_run=False)))
"""


class Server(NamedTuple):
    """A running server: its clients by tenant, and what reached its engine."""

    acme: httpx.Client
    beta: httpx.Client
    nobody: httpx.Client
    record: Path

    def arrivals(self, count: int) -> list[dict[str, Any]]:
        """The last `count` requests that reached the engine."""
        return [json.loads(line) for line in self.record.read_text().splitlines()[-count:]]

    def seen(self) -> int:
        """How many requests reached the engine so far."""
        return len(self.record.read_text().splitlines())


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, Path]]:
    """Run vLLM on a free port until the block ends; its log is in the failure if it does not start."""
    port = free_port()
    record, log = folder / "record.jsonl", folder / "server.log"
    record.touch()
    env = {name: value for name, value in os.environ.items() if not name.startswith("COX_")} | {
        "COX_KEYS": str(folder / "keys.json"),
        "RECORD_TO": str(record),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",  # of so small a model: more would mostly wait for each other
        "VLLM_ENABLE_RESPONSES_API_STORE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    model = tiny.make_model(folder / "model")
    arguments = (
        f"serve {model} --served-model-name tiny --host 127.0.0.1 --port {port} --max-model-len 2048 "
        f"--dtype float32 --block-size 32 --max-num-seqs 16 --enforce-eager --scheduling-policy priority "
        f"--enable-scale-out --middleware {MIDDLEWARE} "
        "--scheduler-cls tests.support.recording.RecordingScheduler"
    ).split()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, *arguments], env=env, stdout=out, stderr=out, start_new_session=True
        )
        try:
            deadline = time.monotonic() + BOOT_S
            url = f"http://127.0.0.1:{port}"
            while not _healthy(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"vLLM did not start:\n{log.read_text()[-4000:]}")
                time.sleep(0.5)
            yield url, record
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests, with two tenants."""
    folder = tmp_path_factory.mktemp("identity")
    file = folder / "keys.json"
    acme = Grant(tenant="acme", class_="interactive", classes=("batch",), priority_min=-5, priority_max=5)
    named = {"acme": keys.add(file, acme, now=1.0), "beta": keys.add(file, Grant(tenant="beta"), now=1.0)}
    with serving(folder) as (url, record), contextlib.ExitStack() as stack:
        clients = {
            name: stack.enter_context(
                httpx.Client(base_url=url, timeout=60, headers={"authorization": f"Bearer {key}"})
            )
            for name, key in named.items()
        }
        nobody = stack.enter_context(httpx.Client(base_url=url, timeout=60))
        yield Server(clients["acme"], clients["beta"], nobody, record)
        log = (folder / "server.log").read_text()
        for key in named.values():
            assert key not in log, "an API key stands in the server's log"
            assert keys.digest(key) not in log, "a key's hash stands in the server's log"


def chat(**more: Any) -> dict[str, Any]:
    """The body of a small chat request."""
    return {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": PROMPT}], **more}


def completion(**more: Any) -> dict[str, Any]:
    """The body of a small completion request."""
    return {"model": "tiny", "max_tokens": 2, "prompt": PROMPT, "temperature": 0, **more}


def check_arrivals(server: Server, reply: httpx.Response, before: int, count: int) -> list[dict[str, Any]]:
    """`count` requests arrived since `before`, all acme's, all under the id that the reply's header has."""
    assert reply.status_code == 200, reply.text
    assert server.seen() - before == count
    arrived = server.arrivals(count)
    public = reply.headers["x-request-id"]
    assert {(line["tenant"], line["public"]) for line in arrived} == {("acme", public)}
    assert len({line["internal"] for line in arrived}) == count
    assert all(-5 <= line["priority"] <= 5 for line in arrived)
    return arrived


def test_chat_carries_identity(server: Server) -> None:
    """A chat request reaches the engine as its tenant's, in the key's class, under the returned id."""
    before = server.seen()
    reply = server.acme.post(CHAT, json=chat())
    (line,) = check_arrivals(server, reply, before, 1)
    assert (line["class"], line["priority"]) == ("interactive", 0)
    assert reply.json()["id"] == f"chatcmpl-{reply.headers['x-request-id']}"


def test_stream_carries_identity(server: Server) -> None:
    """A streamed request does too, and the id is there before the first token."""
    before = server.seen()
    with server.acme.stream("POST", CHAT, json=chat(stream=True)) as reply:
        assert reply.headers["x-request-id"].startswith("cox.acme.interactive.")
        assert reply.read().endswith(b"data: [DONE]\n\n")
    check_arrivals(server, reply, before, 1)


@pytest.mark.parametrize(
    ("more", "count"),
    [
        ({"n": 2, "temperature": 1}, 2),
        ({"prompt": [PROMPT, PROMPT, "hold"]}, 3),
        ({"prompt": [PROMPT, "hold"], "n": 2, "temperature": 1, "stream": True}, 4),
    ],
)
def test_children_share_the_public_id(server: Server, more: dict[str, Any], count: int) -> None:
    """Every sequence of n>1 and every prompt of a list is its own request under one public id."""
    before = server.seen()
    check_arrivals(server, server.acme.post("/v1/completions", json=completion(**more)), before, count)


def test_beam_search_carries_identity(server: Server) -> None:
    """Beam search makes many small requests, all of them the tenant's."""
    before = server.seen()
    reply = server.acme.post("/v1/completions", json=completion(use_beam_search=True, n=2, max_tokens=3))
    check_arrivals(server, reply, before, server.seen() - before)
    assert server.seen() > before


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"model": "tiny", "input": PROMPT, "max_output_tokens": 2}),
        ("/v1/responses", {"model": "tiny", "input": PROMPT, "max_output_tokens": 2, "stream": True}),
        ("/v1/messages", chat()),
        (
            "/inference/v1/generate",
            {"model": "tiny", "token_ids": [300, 301], "sampling_params": {"max_tokens": 2}},
        ),
        ("/invocations", completion()),
    ],
)
def test_other_endpoints_carry_identity(server: Server, path: str, body: dict[str, Any]) -> None:
    """Endpoints with ids of their own are marked as well, also those that ignore X-Request-Id."""
    before = server.seen()
    check_arrivals(server, server.acme.post(path, json=body), before, 1)


def test_batch_of_chats_shares_the_public_id(server: Server) -> None:
    """Every conversation of a batch is its own request under one public id."""
    before = server.seen()
    conversation = chat()["messages"]
    reply = server.acme.post(f"{CHAT}/batch", json=chat(messages=[conversation, conversation]))
    check_arrivals(server, reply, before, 2)


@pytest.mark.parametrize("stream", [False, True])
def test_background_response_carries_identity(server: Server, stream: bool) -> None:
    """A response made in the background, when its HTTP request may be over, is still the tenant's."""
    before = server.seen()
    body = {"model": "tiny", "input": PROMPT, "max_output_tokens": 2, "background": True, "stream": stream}
    reply = server.acme.post("/v1/responses", json=body)
    assert reply.status_code == 200, reply.text
    deadline = time.monotonic() + 20
    while server.seen() == before and time.monotonic() < deadline:
        time.sleep(0.05)
    check_arrivals(server, reply, before, 1)


def test_client_headers_change_nothing(server: Server) -> None:
    """Another tenant's real id in X-Request-Id, and a tenant header, are without effect."""
    stolen = server.beta.post(CHAT, json=chat()).headers["x-request-id"]
    before = server.seen()
    headers = {"x-request-id": stolen, "x-tenant": "beta", "x-vllm-priority": "-100"}
    reply = server.acme.post(CHAT, json=chat(), headers=headers)
    (line,) = check_arrivals(server, reply, before, 1)
    assert line["priority"] == -5
    assert reply.headers["x-client-request-id"] == stolen


@pytest.mark.parametrize("form", ["{}", "resp_{}", "{}-1a2b3c4d", "x_{}_0"])
def test_body_ids_change_nothing(server: Server, form: str) -> None:
    """Another tenant's real id in a body's `request_id` is without effect, wherever one is taken."""
    stolen = form.format(server.beta.post(CHAT, json=chat()).headers["x-request-id"])
    for path, body in (
        ("/v1/responses", {"model": "tiny", "input": PROMPT, "max_output_tokens": 2, "request_id": stolen}),
        (CHAT, chat(request_id=stolen)),
        ("/v1/completions", completion(request_id=stolen)),
    ):
        before = server.seen()
        check_arrivals(server, server.acme.post(path, json=body), before, 1)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", completion(priority=4)),
        ("/v1/completions", completion(use_beam_search=True, n=2)),
        (f"{CHAT}/batch", chat(messages=[chat()["messages"]] * 2)),
        ("/v1/messages", chat()),
        (
            "/generative_scoring",
            {"model": "tiny", "query": "a", "items": ["b", "c"], "label_token_ids": [1, 2]},
        ),
        (
            "/inference/v1/generate",
            {"model": "tiny", "token_ids": [300, 301], "sampling_params": {"max_tokens": 2}},
        ),
    ],
)
def test_headers_priority_counts_wherever_the_engine_is_asked(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    """vLLM reads the header on some of its paths only; it is as good on the others, and before the body's."""
    before = server.seen()
    reply = server.acme.post(path, json=body, headers={"x-vllm-priority": "-3"})
    lines = check_arrivals(server, reply, before, server.seen() - before)
    assert {line["priority"] for line in lines} == {-3}


@pytest.mark.parametrize(("asked", "given"), [(-100, -5), (100, 5), (3, 3)])
def test_body_priority_is_clamped(server: Server, asked: int, given: int) -> None:
    """A priority in the body is bounded by the key, on every endpoint that takes one."""
    for path, body in (
        (CHAT, chat(priority=asked)),
        ("/v1/completions", completion(priority=asked)),
        ("/v1/responses", {"model": "tiny", "input": PROMPT, "max_output_tokens": 2, "priority": asked}),
    ):
        before = server.seen()
        (line,) = check_arrivals(server, server.acme.post(path, json=body), before, 1)
        assert line["priority"] == given


def test_class_is_bounded(server: Server) -> None:
    """A class that the key allows arrives; another one is 403 with what is allowed; nonsense is 400."""
    before = server.seen()
    (line,) = check_arrivals(
        server, server.acme.post(CHAT, json=chat(), headers={"x-cox-class": "batch"}), before, 1
    )
    assert line["class"] == "batch"
    refused = server.acme.post(CHAT, json=chat(), headers={"x-cox-class": "gold"})
    assert refused.status_code == 403
    assert "allowed: batch, interactive" in refused.json()["error"]["message"]
    assert server.acme.post(CHAT, json=chat(), headers={"x-cox-class": "A.B"}).status_code == 400
    assert server.seen() == before + 1


def test_refusals_reach_no_engine(server: Server) -> None:
    """No key: 401; a bad priority: 400; administration: 403; probes: open. The engine hears of none."""
    before = server.seen()
    refused = server.nobody.post(CHAT, json=chat())
    assert refused.status_code == 401
    assert "Authorization: Bearer" in refused.json()["error"]["message"]
    assert refused.headers["x-request-id"]
    assert server.acme.post(CHAT, json=chat(), headers={"x-vllm-priority": "now"}).status_code == 400
    assert server.acme.post("/inference/v1/abort_requests", json={"request_ids": ["x"]}).status_code == 403
    assert server.nobody.get("/v1/models").status_code == 401
    assert server.acme.get("/v1/models").status_code == 200
    assert [server.nobody.get(path).status_code for path in ("/health", "/version", "/metrics")] == [200] * 3
    assert server.seen() == before


def test_vllms_own_errors_carry_the_id_too(server: Server) -> None:
    """An error that vLLM itself answers has the request id in its header."""
    reply = server.acme.post(CHAT, json=chat(model="unknown"))
    assert reply.status_code == 404
    assert reply.headers["x-request-id"].startswith("cox.acme.")


def test_tiny_model_depends_on_its_whole_context(server: Server) -> None:
    """Prompts with the same end give different words, the same prompt the same ones, and words are varied."""

    def text(prompt: str) -> str:
        body = completion(prompt=prompt, max_tokens=200)
        return str(server.acme.post("/v1/completions", json=body).json()["choices"][0]["text"])

    end = " and the silver boat is steady in the wind under the bright moon"
    first, other = text("The captain is brave" + end), text("A little bird came home" + end)
    assert first == text("The captain is brave" + end)
    assert first.split()[:20] != other.split()[:20]
    for words in (first.split(), other.split()):
        assert len({word.strip(",.") for word in words}) >= 30
