"""Modes that need processes: data parallel ranks, and a worker that is asked to shut down, over real HTTP and NATS."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from coxswain.control.client import Client
from tests.support.serving import WORKER, Api, Served, Stream, serving
from tests.support.steered import Steer

pytestmark = [pytest.mark.vllm, pytest.mark.nats]

TOKENS = 1_500
"""At 4 ms a step: 6 s for the commands to come in."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """Two data parallel ranks on the simulated device; that they wait for their requests is our default."""
    with serving(
        tmp_path, "--device", "simulated", "--sim-preset", "cpu", "--sim-check", "--data-parallel-size", "2",
        "--api-server-count", "1", tenants=("acme",),
    ) as served:  # fmt: skip
        yield served


async def test_ranks_are_workers_and_a_shutdown_leaves_nobody_held(served: Served) -> None:
    """Each rank answers as a worker of its own; told to end, both serve what runs and what is held to its end."""
    api = Api(served)
    client = await Client.connect(served.connection())
    ready = await api.client.get("/ready")
    assert (ready.status_code, ready.content) == (200, (await api.client.get("/health")).content)
    ranks = [Steer(client, f"{WORKER}-dp{rank}") for rank in range(2)]
    try:
        streams = [
            api.stream(f"The {word}", tenant="acme", tokens=TOKENS)
            for word in ("river", "wind", "boat", "sea")
        ]
        for stream in streams:
            await stream.until(20)
        held = [await hold(ranks, stream) for stream in streams]
        assert set(held) == {0, 1}, "vLLM gives each rank some"
        await asyncio.sleep(1)  # what was in flight arrives
        counts = [len(stream.tokens) for stream in streams]
        await asyncio.sleep(0.5)
        assert [len(stream.tokens) for stream in streams] == counts
        assert (await ranks[held[0]]("continue", streams[0].request)).outcome == "applied"
        assert len(await streams[0].end()) == TOKENS
        assert (await ranks[held[1]]("continue", streams[1].request)).outcome == "applied"
        os.kill(served.pid, signal.SIGTERM)
        for stream in streams[1:]:
            assert len(await stream.end()) == TOKENS
            assert stream.finish == "length"
    finally:
        await client.close()
        await api.close()


async def hold(ranks: list[Steer], stream: Stream) -> int:
    """Hold a request on the rank that has it; which one that is. The other one does not know it."""
    codes = [(await rank("preempt", stream.request, kv="keep")).code for rank in ranks]
    assert sorted(codes, key=str) == [404, None]
    return codes.index(None)
