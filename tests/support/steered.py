"""A steered engine without a model, on a real NATS server, and a client that steers it."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from unittest.mock import patch

from ulid import ULID

from bench.rig import Rig, vllm_config
from coxswain.common.connection import Connection
from coxswain.control.client import Client
from coxswain.schemas.commands import COMMANDS, Reply, Targets
from coxswain.schemas.subjects import OPERATOR
from coxswain.service.request_id import make
from tests.support.waiting import PATIENCE_S

KEY = "5e" * 32
WORKER = "w1"
FLEET = "test"
UNHURRIED_S = 0.02
"""A step this long leaves a request of 400 tokens running for 8 s: time for a command where machines stall, too."""


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
    step_s: float = UNHURRIED_S,
    env: dict[str, str] | None = None,
    **options: Any,
) -> Iterator[Rig]:
    """A running rig with the steered scheduler, joined to the NATS server at `url`; `rig.step_s = 0` hurries it."""
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
