"""A real KV connector under a real model: vLLM's ExampleConnector, which keeps the KV of prompts in files."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from coxswain.control.client import Client
from tests.acceptance.test_hold import empty, frame
from tests.support.serving import WORKER, Api, Served, serving
from tests.support.steered import Steer

pytestmark = [pytest.mark.vllm, pytest.mark.nats, pytest.mark.slow, pytest.mark.timeout(400)]

PROMPT = "The wind turned in the night and the boat " * 12
TOKENS = 400


@pytest.fixture
def connected(tmp_path: Path) -> Iterator[Served]:
    """A worker that keeps KV in files."""
    storage = {"shared_storage_path": str(tmp_path / "kv")}
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": storage,
    }
    with serving(
        tmp_path, "--max-num-seqs", "4", "--max-model-len", "2048", "--no-enable-prefix-caching",
        "--kv-transfer-config", json.dumps(connector), tenants=("acme",),
    ) as served:  # fmt: skip
        yield served


async def test_a_prompt_that_was_loaded_is_counted_as_such(connected: Served) -> None:
    """The second time a prompt is loaded and counted as external; held and dropped, it says the same and nobody dies.

    This connector cannot load for a request that lost its KV, and vLLM would let its worker die of trying.
    """
    api, client = Api(connected), await Client.connect(connected.connection())
    cox = Steer(client, WORKER)
    try:
        expected = await api.stream(PROMPT, tenant="acme", tokens=TOKENS).end()
        stream = api.stream(PROMPT, tenant="acme", tokens=TOKENS)
        await stream.until(10)
        for kv in ("keep", "drop"):
            assert (await cox("preempt", stream.request, kv=kv)).outcome == "applied"
            await asyncio.sleep(0.2)
            assert (await cox("continue", stream.request)).outcome == "applied"
        assert await stream.end() == expected
        (row,) = (await frame(cox)).tenants
        assert row.external_input_tokens_total == row.cached_input_tokens_total > 100
        await empty(cox)
    finally:
        await client.close()
        await api.close()
