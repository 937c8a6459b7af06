"""NATS for a run: a server, commands to the worker of this process, class tables, signed names of requests.

Called by `run` (the server) and by whoever steers.
"""

import asyncio
import os
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from ulid import ULID

from coxswain.common.connection import Connection
from coxswain.control.client import Client
from coxswain.schemas.commands import COMMANDS, Configure, Reply, Targets
from coxswain.schemas.policy import ClassPolicy, TenantPolicy
from coxswain.service.request_id import make

FLEET = "bench"
KEY = "5e" * 32
INTERACTIVE, BATCH = "interactive", "batch"
START_S = 20.0


@asynccontextmanager
async def nats_server() -> AsyncIterator[str]:
    """A nats-server on a free loopback port; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    binary = shutil.which("nats-server") or str(Path(sys.executable).parent / "nats-server")
    with tempfile.TemporaryDirectory(prefix="cox-nats-") as folder:
        process = await asyncio.create_subprocess_exec(
            binary, "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", folder,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            async with asyncio.timeout(START_S):
                while not await _listens(port):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.05)
            yield f"nats://127.0.0.1:{port}"
        finally:
            process.terminate()
            await process.wait()


@asynccontextmanager
async def server_at_hand() -> AsyncIterator[str]:
    """The server of the run that this process is part of, or one of its own."""
    if url := os.environ.get("COX_NATS_URL"):
        yield url
        return
    async with nats_server() as url:
        yield url


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def environment(worker: str, url: str) -> dict[str, str]:
    """What makes a process's engine the worker of this name."""
    return {"COX_NATS_URL": url, "COX_FLEET": FLEET, "COX_WORKER": worker, "COX_IDENTITY_KEY": KEY}


def workers(worker: str, ranks: int) -> list[str]:
    """The names of an engine's workers: one, or one for each data parallel rank."""
    return [worker] if ranks == 1 else [f"{worker}-dp{rank}" for rank in range(ranks)]


def name(tenant: str) -> str:
    """A request's id that proves its tenant, as the HTTP edge makes it."""
    return make(bytes.fromhex(KEY), tenant, "", str(ULID()))


async def connect(url: str | None = None) -> Client:
    """A client of the run's fleet."""
    return await Client.connect(Connection(urls=(url or os.environ["COX_NATS_URL"],), fleet=FLEET))


class Wire:
    """Commands to an engine, whose refusals are errors: to one worker, or to all ranks of a data parallel one."""

    def __init__(self, client: Client, *workers: str) -> None:
        self.client = client
        self.workers = workers
        self.ignored: set[str] = set()
        """Fields that the worker said it does not act on: a number measured with them proves nothing."""

    async def ready(self) -> None:
        """Wait until every worker answers."""
        async with asyncio.timeout(START_S):
            while set(self.workers) - (await self.client.statuses(wait_s=1.0)).keys():  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    async def told(self, verb: str, names: Iterable[str] = (), **fields: Any) -> Any:
        """Send a command about these requests; its reply, a refusal too. Of several ranks: what they did together."""
        if verb != "configure":
            fields.setdefault("targets", Targets(requests=tuple(names)))
        command = COMMANDS[verb](id=str(ULID()), issuer="bench", **fields)
        asked = [self.client.command(worker, verb, command, timeout_s=30) for worker in self.workers]
        return together([reply for replies in await asyncio.gather(*asked) for reply in replies])

    async def __call__(self, verb: str, names: Iterable[str] = (), **fields: Any) -> Any:
        """Send a command about these requests; its reply.

        Raises:
            RuntimeError: the worker refused.
        """
        reply = await self.told(verb, names, **fields)
        if reply.outcome == "rejected" and reply.code != 404:
            raise RuntimeError(f"{verb}: {reply.error}")
        self.ignored.update(reply.ignored)
        return reply

    async def classes(
        self, *, cut_in: str = "off", budget: int | None = None, linger_s: float = 0.0, aside: bool = False
    ) -> Configure:
        """Two classes, interactive before batch, one tenant each: what a mixed load is steered by."""
        tables = {
            "classes": {
                INTERACTIVE: ClassPolicy(position=0, cut_in=cut_in),
                BATCH: ClassPolicy(
                    position=1, max_prefill_tokens_per_step=budget, linger_s=linger_s, stand_aside=aside
                ),
            },
            "tenants": {who: TenantPolicy(class_=who) for who in (INTERACTIVE, BATCH)},
        }
        return await self("configure", **tables)

    async def status(self) -> Any:
        """The engine's full frame; of several ranks their rows, and sums of what is counted."""
        asked = [self.client.query(worker, "status", timeout_s=30) for worker in self.workers]
        frames = [frame for (frame,) in await asyncio.gather(*asked)]
        added = {
            field: sum((getattr(frame, field) for frame in frames[1:]), getattr(frames[0], field))
            for field in ("step", "held", "preempted_total", "recomputed_tokens_total", "tenants", "requests")
        }
        blocks = replace(frames[0].kv_blocks, used=sum(frame.kv_blocks.used for frame in frames))
        return replace(frames[0], kv_blocks=blocks, **added)

    async def settings(self) -> dict[str, Any]:
        """What vLLM's scheduler was made with, as the worker says it."""
        (config,) = await self.client.query(self.workers[0], "config", timeout_s=30)
        return dict(config.scheduler)


def together(replies: list[Reply]) -> Reply:
    """One reply for those of all ranks: a request that one has, the others do not know."""
    if len(replies) == 1:
        return replies[0]
    did = [reply for reply in replies if reply.outcome != "rejected"]
    counts: Counter[str] = Counter()
    for reply in did:
        counts.update(reply.counts)
    counts.pop("not_found", None)
    results = tuple(result for reply in did for result in reply.results if result.outcome != "not_found")
    return replace((did or replies)[0], counts=dict(counts), results=results)
