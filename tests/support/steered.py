"""A steered engine without a model, on a real NATS server, and a client that steers it."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from unittest.mock import patch

from ulid import ULID

from bench.rig import Rig, vllm_config
from coxswain.control.client import Client
from coxswain.schemas.commands import COMMANDS, Reply, Targets
from coxswain.schemas.connection import Connection
from coxswain.schemas.subjects import OPERATOR
from coxswain.service.request_id import make

KEY = "5e" * 32
WORKER = "w1"
FLEET = "test"
PATIENCE_S = 30.0
"""How long what must happen may take: a machine that stalls for seconds is no defect."""


def public_id(tenant: str, class_: str = "") -> str:
    """A signed public id, as the middleware makes it."""
    return make(bytes.fromhex(KEY), tenant, class_, str(ULID()))


def engine_id(public: str, index: int = 0) -> str:
    """The id under which vLLM's engine knows a completion with this public id."""
    return f"cmpl-{public}-{index}-{os.urandom(4).hex()}"


@contextmanager
def steered_rig(
    url: str | None,
    *,
    worker: str = WORKER,
    step_s: float = 0.002,
    env: dict[str, str] | None = None,
    **options: Any,
) -> Iterator[Rig]:
    """A running rig with the steered scheduler, joined to the NATS server at `url`."""
    from coxswain.service.scheduler import SteeredScheduler

    depth = options.pop("depth", 1)
    settings = {"COX_FLEET": FLEET, "COX_WORKER": worker, "COX_IDENTITY_KEY": KEY, **(env or {})}
    if url:
        settings["COX_NATS_URL"] = url
    with patch.dict(os.environ, settings):
        if not url:
            os.environ.pop("COX_NATS_URL", None)
        rig = Rig(
            SteeredScheduler, vllm_config(async_scheduling=depth > 1, **options), depth=depth, step_s=step_s
        )
    rig.start()
    try:
        yield rig
    finally:
        rig.stop()


class Steer:
    """Commands in one line each, for tests."""

    def __init__(self, client: Client, worker: str = WORKER) -> None:
        self.client = client
        self.worker = worker

    async def __call__(self, verb: str, *requests: str, role: str = OPERATOR, **fields: Any) -> Reply:
        """Send a command and return its reply; refusals are replies too."""
        fields.setdefault("id", str(ULID()))
        if requests:
            fields["targets"] = Targets(requests=requests)
        command = COMMANDS[verb](**fields)
        replies = await self.client.command(self.worker, verb, command, role=role, timeout_s=PATIENCE_S)
        return replies[0]


@asynccontextmanager
async def steer(url: str) -> AsyncIterator[Steer]:
    """A client of the test fleet."""
    client = await Client.connect(Connection(urls=(url,), fleet=FLEET))
    try:
        yield Steer(client)
    finally:
        await client.close()


async def eventually(condition: Callable[[], Any], within_s: float = PATIENCE_S) -> Any:
    """The condition's first true value; AssertionError if it has none in time."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"did not happen within {within_s} s: {condition}"
        await asyncio.sleep(0.005)
    return value
