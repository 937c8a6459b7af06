"""A real worker: vLLM on CPU with the tiny model, behind its own HTTP server, on a real NATS server."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import psutil

from coxswain.common.connection import Connection
from coxswain.control.client import Client
from coxswain.control.tables import init
from coxswain.service import keys
from coxswain.service.tiny import make_model
from tests.support.nats import NatsServer, free_port

WORKER = "cpu-1"
FLEET = "acceptance"
START_S = 240
PATIENT_S = 120.0
"""A real model among other tests, on a machine that may stall."""


class Piece(NamedTuple):
    """One chunk of a stream: the tokens it brought and when."""

    tokens: tuple[int, ...]
    at: float
    finish: str | None


class Served(NamedTuple):
    """Where everything is."""

    nats: NatsServer
    http: str
    log: Path
    pid: int
    keys: dict[str, str]
    """API key per tenant."""

    def connection(self) -> Connection:
        """How to reach the bus."""
        return Connection(urls=(self.nats.url,), fleet=FLEET)

    def engine(self) -> psutil.Process:
        """The EngineCore process."""
        for process in psutil.Process(self.pid).children(recursive=True):
            if "EngineCore" in " ".join(process.cmdline()):
                return process
        raise RuntimeError("no EngineCore process")


@contextmanager
def serving(folder: Path, *arguments: str, tenants: tuple[str, ...] = ()) -> Iterator[Served]:
    """Start NATS and a worker; stop both. `arguments` go to vLLM."""
    nats = NatsServer(folder).start()
    asyncio.run(_init(nats.url))
    model = folder / "model"
    # Some 10 ms a step: slow enough that the HTTP server keeps up on a busy machine.
    make_model(model, hidden=384, layers=8)
    given = {}
    env = {
        **os.environ,
        "COX_NATS_URL": nats.url,
        "COX_FLEET": FLEET,
        "COX_WORKER": WORKER,
        "OMP_NUM_THREADS": "1",
    }
    for tenant in tenants:
        path = folder / "keys.json"
        given[tenant] = keys.add(path, keys.Grant(tenant=tenant, metrics=True), now=time.time())
        env["COX_KEYS"] = str(path)
    port = free_port()
    log = folder / "worker.log"
    with log.open("wb") as out:
        worker = subprocess.Popen(
            [sys.executable, "-m", "coxswain.service.worker", str(model), "--served-model-name", "tiny",
             "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", *arguments],
            env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        http = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_S
        while True:
            assert worker.poll() is None, f"the worker ended:\n{log.read_text()[-4000:]}"
            assert time.monotonic() < deadline, (
                f"the worker is not up after {START_S} s:\n{log.read_text()[-4000:]}"
            )
            try:
                if httpx.get(f"{http}/health", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.25)
        yield Served(nats, http, log, worker.pid, given)
    finally:
        os.killpg(worker.pid, signal.SIGTERM)
        try:
            worker.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        nats.kill()


async def _init(url: str) -> None:
    client = await Client.connect(Connection(urls=(url,), fleet=FLEET))
    await init(client.js, client.subjects)
    await client.close()


class Stream:
    """One streaming completion, read in the background.

    `pieces` grows as tokens arrive; `request` is the id that commands take.
    """

    def __init__(
        self, client: httpx.AsyncClient, key: str | None, body: dict[str, Any], headers: dict[str, str]
    ) -> None:
        self.pieces: list[Piece] = []
        self.request = ""
        self.body_id = ""
        self.news = asyncio.Event()
        self.began = time.perf_counter()
        headers = {**headers, **({"Authorization": f"Bearer {key}"} if key else {})}
        self.task = asyncio.create_task(self._read(client, body, headers))

    @property
    def tokens(self) -> list[int]:
        """All tokens so far."""
        return [token for piece in self.pieces for token in piece.tokens]

    def time_of(self, token: int) -> float:
        """When the token with this index (from 0) arrived, in s of `time.perf_counter`."""
        seen = 0
        for piece in self.pieces:
            seen += len(piece.tokens)
            if seen > token:
                return piece.at
        raise IndexError(token)

    @property
    def finish(self) -> str | None:
        """How it ended, once it has."""
        return next((piece.finish for piece in self.pieces if piece.finish), None)

    async def _read(self, client: httpx.AsyncClient, body: dict[str, Any], headers: dict[str, str]) -> None:
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            self.request = response.headers.get("x-request-id", "")
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = msgspec.json.decode(line[6:])
                if "error" in chunk:
                    raise RuntimeError(chunk["error"])
                self.body_id = chunk["id"]
                choice = chunk["choices"][0]
                tokens = tuple(choice.get("token_ids") or ())
                self.pieces.append(Piece(tokens, time.perf_counter(), choice.get("finish_reason")))
                self.news.set()

    async def until(self, tokens: int, within_s: float = PATIENT_S) -> None:
        """Wait until so many tokens have arrived."""
        async with asyncio.timeout(within_s):
            while len(self.tokens) < tokens and not self.task.done():
                self.news.clear()
                try:
                    async with asyncio.timeout(0.5):
                        await self.news.wait()
                except TimeoutError:
                    continue
        if self.task.done():
            self.task.result()

    async def end(self, within_s: float = PATIENT_S) -> list[int]:
        """Wait for the end; all tokens."""
        async with asyncio.timeout(within_s):
            await self.task
        return self.tokens


class Api:
    """Completions from the worker's HTTP server."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.client = httpx.AsyncClient(
            base_url=served.http, timeout=None, limits=httpx.Limits(max_connections=None)
        )

    def stream(
        self,
        prompt: str,
        *,
        tenant: str | None = None,
        tokens: int = 100,
        headers: dict[str, str] | None = None,
        **fields: Any,
    ) -> Stream:
        """Begin a greedy streaming completion of exactly `tokens` tokens (unless `ignore_eos` is false)."""
        body = {
            "model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True,
            "stream": True, "return_token_ids": True, **fields,
        }  # fmt: skip
        return Stream(self.client, self.served.keys.get(tenant or ""), body, headers or {})

    async def close(self) -> None:
        """Close all connections."""
        await self.client.aclose()
