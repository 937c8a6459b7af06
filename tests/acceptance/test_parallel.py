"""One model on two processes, tensor parallel: steering their one scheduler steers both."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from coxswain.control.client import Client
from tests.acceptance.test_hold import empty, frame
from tests.support.serving import WORKER, Api, Served, serving
from tests.support.steered import Steer

pytestmark = [pytest.mark.vllm, pytest.mark.nats, pytest.mark.slow, pytest.mark.timeout(400)]

PROMPT = "The wind turned in the night and the boat"
TOKENS = 200


@pytest.fixture
def parallel(tmp_path: Path) -> Iterator[Served]:
    """A worker whose model is spread over two processes."""
    with serving(
        tmp_path, "--tensor-parallel-size", "2", "--max-num-seqs", "4", "--max-model-len", "2048",
        "--no-enable-prefix-caching", tenants=("acme",),
    ) as served:  # fmt: skip
        yield served


async def test_held_and_dropped_requests_say_the_same(parallel: Served) -> None:
    """Among others that run, a request that is held, or dropped, and continued says what it would have said."""
    api, client = Api(parallel), await Client.connect(parallel.connection())
    cox = Steer(client, WORKER)
    prompts = [f"{PROMPT} number {index}" for index in range(3)]
    try:
        expected = [await api.stream(prompt, tenant="acme", tokens=TOKENS).end() for prompt in prompts]
        before = (await frame(cox)).recomputed_tokens_total
        for kv in ("keep", "drop"):
            streams = [api.stream(prompt, tenant="acme", tokens=TOKENS) for prompt in prompts]
            await asyncio.gather(*(stream.until(10) for stream in streams))
            held = [stream.request for stream in streams[:2]]
            assert (await cox("preempt", *held, kv=kv)).counts == {"applied": 2}
            await asyncio.sleep(0.2)
            assert (await cox("continue", *held)).counts == {"applied": 2}
            assert [await stream.end() for stream in streams] == expected
            recomputed = (await frame(cox)).recomputed_tokens_total - before
            assert (recomputed > 0) is (kv == "drop")
        await empty(cox)
    finally:
        await client.close()
        await api.close()
