"""The real engine on the simulated device: what it refuses, what it catches, how long it takes, over HTTP too."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from coxswain.service.config import SettingRefusedError
from coxswain.service.simulated.checker import ProtocolViolationError, Rule
from coxswain.service.simulated.tokens import Vocabulary, seed_of
from coxswain.service.tiny import make_model
from tests.support.nats import free_port
from tests.support.simulated import engine

pytestmark = pytest.mark.vllm

MODES = pytest.mark.parametrize(
    ("v2", "asynchronous"),
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["v1-sync", "v1-async", "v2-sync", "v2-async"],
)
REQUESTS = 180


def load(seed: int) -> dict[str, tuple[list[int], int]]:
    """Requests by name: prompt and tokens to say. Half of them share one of two long prefixes."""
    dice = random.Random(seed)
    prefixes = [[dice.randrange(4_000) for _ in range(64)] for _ in range(2)]
    requests = {}
    for number in range(REQUESTS):
        own = [dice.randrange(4_000) for _ in range(dice.randrange(1, 120))]
        prompt = dice.choice(prefixes) + own if dice.random() < 0.5 else own
        requests[f"r{number}"] = (prompt, dice.randrange(1, 80))
    return requests


@MODES
def test_stock_vllm_under_kv_pressure_breaks_no_rule(tmp_path: Path, v2: bool, asynchronous: bool) -> None:
    """vLLM's own preemptions are in order too: the checker does not cry wolf."""
    requests = load(seed=3)
    with engine(
        tmp_path, v2=v2, asynchronous=asynchronous, scheduler=None, num_gpu_blocks_override=28
    ) as stock:
        preempted = 0
        for name, (prompt, tokens) in requests.items():
            stock.add(name, prompt, tokens)
        preempt = stock.core.scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal preempted
            preempted += 1
            return preempt(*args, **kwargs)

        stock.core.scheduler._preempt_request = counted
        stock.run()
        assert preempted > 10
    vocabulary = Vocabulary(4_000)
    for name, (prompt, tokens) in requests.items():
        expected = [vocabulary.token(seed_of(prompt), len(prompt) + place) for place in range(tokens)]
        assert stock.outputs[name] == expected


@MODES
def test_a_scheduler_that_gives_held_kv_away_is_caught(tmp_path: Path, v2: bool, asynchronous: bool) -> None:
    """The negative control: blocks of a held request freed behind its back end the engine, in words."""
    with engine(
        tmp_path, v2=v2, asynchronous=asynchronous, enable_prefix_caching=False, num_gpu_blocks_override=20
    ) as broken:
        broken.add("held", list(range(100)), 50)
        for _ in range(6):
            broken.step()
        broken.command("preempt", "held")
        broken.step()
        scheduler = broken.core.scheduler
        scheduler.kv_cache_manager.free(scheduler.requests["held"])
        broken.add("thief", list(range(500, 700)), 50)
        with pytest.raises(ProtocolViolationError) as caught:
            broken.run()
        assert caught.value.rule is Rule.WRITER
        assert "which held has written and still has in its table" in str(caught.value)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_steps_take_the_presets_time(tmp_path: Path, asynchronous: bool) -> None:
    """Thirty tokens one after the other take no less than thirty steps of 4 ms, however the steps are overlapped."""
    with engine(tmp_path, v2=True, asynchronous=asynchronous, preset="cpu") as timed:
        timed.add("r", [1, 2, 3], 30)
        began = time.monotonic()
        timed.run()
        assert time.monotonic() - began >= 30 * 4e-3


def test_refuses_what_it_does_not_simulate(tmp_path: Path) -> None:
    """A feature that the device lacks is refused at start, by name, not ignored."""
    with (
        pytest.raises(
            SettingRefusedError, match=r"no KV connector ExampleConnector \(OffloadingConnector is there\)"
        ),
        engine(
            tmp_path,
            v2=False,
            asynchronous=False,
            kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
        ),
    ):
        pass


def test_worker_serves_http_in_seconds(tmp_path: Path) -> None:
    """`cox worker --device simulated` answers without weights, always the same, checked, async, within a grammar."""
    model = make_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    port = free_port()
    log = tmp_path / "worker.log"
    with log.open("wb") as out:
        worker = subprocess.Popen(
            [sys.executable, "-m", "coxswain.service.worker", str(model), "--device", "simulated", "--sim-check",
             "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)],
            env={name: value for name, value in os.environ.items() if not name.startswith(("COX_", "VLLM_"))},
            stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        body = {"model": "tiny", "prompt": "the river", "max_tokens": 20, "return_token_ids": True}
        tokens = [ask(port, body, worker, log) for _ in range(2)]
        assert len(tokens[0]) == 20
        assert tokens[0] == tokens[1]
        words = ["river", "mountain"]
        chosen = {"structured_outputs": {"choice": words}, "return_token_ids": False}
        assert ask(port, body | chosen, worker, log) in words
        said = next(line for line in log.read_text().splitlines() if "simulated.device" in line)
        assert '"check": true' in said
        assert '"model_runner": "v2"' in said
        assert '"async_scheduling": true' in said
    finally:
        os.killpg(worker.pid, signal.SIGTERM)
        try:
            worker.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait(5)


def ask(port: int, body: dict[str, Any], worker: subprocess.Popen[bytes], log: Path) -> Any:
    """The tokens of a completion, or its text if it was not asked for them, as soon as the worker is up."""
    deadline = time.monotonic() + 90
    while True:
        assert worker.poll() is None, log.read_text()[-4_000:]
        assert time.monotonic() < deadline, log.read_text()[-4_000:]
        try:
            response = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=30)
        except httpx.TransportError:
            time.sleep(0.2)
            continue
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        return choice["token_ids"] if body["return_token_ids"] else choice["text"]
