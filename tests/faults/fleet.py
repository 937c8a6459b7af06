"""The processes under test: nats-server, two workers on the simulated device, two controllers.

Nothing of them is replaced. To save ten seconds per start, workers are forked from a process that has imported vLLM
already; what runs in them is `cox worker` and vLLM's own HTTP server all the same.
"""

import asyncio
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
from msgspec.structs import replace

from coxswain.common.connection import Connection
from coxswain.control.client import Client
from coxswain.control.errors import ControlError
from coxswain.control.tables import LogLimits, init
from coxswain.service.tiny import make_model
from tests.support.cluster import NatsCluster
from tests.support.nats import NatsServer, free_port
from tests.support.proxy import Proxy

FLEET: Final = "prod"
PRESET: Final = "a10g-7b"
"""Some 30 ms a step: on two cores there is room for everybody else."""
SLOTS: Final = 3
"""Requests that one worker runs at once: fewer than there are clients, so that some wait."""
TENANT_HEADER: Final = "X-Tenant"
STORE: Final = 64 << 20
"""What JetStream may take on disk."""
LOG_LIMITS: Final = LogLimits(max_bytes=16 << 20)
UP_S: Final = 240.0
DRAIN_S: Final = 30
"""What a worker that is told to end has for its requests."""
CLOCK: Final = Path(__file__).with_name("clock")
COX: Final = "from coxswain.control.cli import main; main()"
VLLM: Final = (
    "vllm.entrypoints.cli.main", "vllm.entrypoints.openai.api_server", "vllm.v1.engine.core",
    "vllm.v1.engine.async_llm", "coxswain.service.worker",
)  # fmt: skip


class Clock:
    """The wall clock of one worker or controller: ours, plus what `jump` says."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.jump(0.0)
        self.env = {"FAULTS_CLOCK": str(path)}

    def jump(self, seconds: float) -> None:
        """Let it show so much more than ours."""
        if not self._path.exists():
            self._path.write_bytes(bytes(8))
        with self._path.open("r+b") as file:
            file.write(struct.pack("d", seconds))


class Worker:
    """One worker: an API server and an engine process, on a port that it keeps.

    Args:
        name: in the fleet.
        folder: for its log and clock.
        url: where NATS is for it.
        model: folder of the tiny model.
    """

    def __init__(self, name: str, folder: Path, url: str, model: Path) -> None:
        self.name = name
        self.port = free_port()
        self.http = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{name}.log"
        self.clock = Clock(folder / f"{name}.clock")
        self.life = 0
        """How often it was started."""
        self._model = model
        self._env = _environment(folder, url) | self.clock.env | {
            "COX_WORKER": name, "COX_TENANT_HEADER": TENANT_HEADER, "COX_LOG": "json",
        }  # fmt: skip
        self._process: Any = None

    def start(self) -> None:
        """Start it; `up` waits for it."""
        argv = [
            str(self._model), "--device", "simulated", "--sim-preset", PRESET, "--sim-check",
            "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(self.port),
            "--max-num-seqs", str(SLOTS), "--max-model-len", "1024", "--uvicorn-log-level", "warning",
            "--shutdown-timeout", str(DRAIN_S),
        ]  # fmt: skip
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(VLLM))
        self.life += 1
        self._process = context.Process(target=_serve, args=(argv, self._env, self.log), name=self.name)
        self._process.start()

    async def up(self) -> None:
        """Wait until it serves."""
        deadline = time.monotonic() + UP_S
        async with httpx.AsyncClient(trust_env=False) as http:
            while True:
                assert self._process.is_alive(), f"{self.name} ended:\n{self.log.read_text()[-4_000:]}"
                assert time.monotonic() < deadline, f"{self.name} is not up:\n{self.log.read_text()[-4_000:]}"
                with suppress(httpx.HTTPError):
                    if (await http.get(f"{self.http}/health", timeout=2)).is_success:
                        return
                await asyncio.sleep(0.2)

    def processes(self) -> dict[str, psutil.Process]:
        """Its processes by what they are: `server`, `engine`, and what the engine started."""
        found = {"server": psutil.Process(self._process.pid)}
        if pids := re.findall(r"EngineCore pid=(\d+)", self.log.read_text()):
            engine = found["engine"] = psutil.Process(int(pids[-1]))
            found |= {
                f"bus{number or ''}": child for number, child in enumerate(engine.children(recursive=True))
            }
        return found

    def kill(self) -> None:
        """End all of it without warning."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join(10)

    async def end(self, within_s: float) -> None:
        """Tell its server to end (SIGTERM), and wait until all of it has."""
        all_ = list(self.processes().values())
        os.kill(self._process.pid, signal.SIGTERM)
        deadline = time.monotonic() + within_s
        while left := [one.pid for one in all_ if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]:
            assert time.monotonic() < deadline, (
                f"{self.name} has not ended after {within_s} s: {left}\n{self.log.read_text()[-4_000:]}"
            )
            await asyncio.sleep(0.05)
        self._process.join(1)

    def pause(self) -> None:
        """Freeze all of it."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """End it, whatever its state."""
        if self._process is not None and self._process.is_alive():
            self.resume()
            self.kill()


class Leader:
    """One controller process, which leads or stands by.

    Args:
        name: in the lease.
        folder: for its log and clock.
        url: where NATS is for it.
    """

    def __init__(self, name: str, folder: Path, url: str) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.clock = Clock(folder / f"{name}.clock")
        self.arguments: tuple[str, ...] = ()
        """More of its command line, from its next start on."""
        self._env = _environment(folder, url) | self.clock.env
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it."""
        words = ["controller", "--policy", "vtc", "--set", "preempt_gap=60", "--name", self.name]
        words += self.arguments
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", COX, *words],
                env=self._env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None, "not started"
        self._process.send_signal(number)

    def process(self) -> psutil.Process:
        """As psutil sees it."""
        assert self._process is not None, "not started"
        return psutil.Process(self._process.pid)

    async def end(self, within_s: float) -> None:
        """Tell it to end (SIGTERM), and wait until it has."""
        assert self._process is not None, "not started"
        self._process.terminate()
        await asyncio.to_thread(self._process.wait, within_s)

    def kill(self) -> None:
        """End it without warning."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)


class Fleet:
    """Everything that runs, and one client's connection to it.

    On one NATS server the second worker and the second controller reach it through `proxy`, so that their part of the
    network can be slow or cut while the rest is not. On a cluster, `nats` is the first of its servers.
    """

    def __init__(
        self, folder: Path, proxy: Proxy, nats: NatsServer, cluster: NatsCluster | None = None
    ) -> None:
        self.folder = folder
        self.nats = nats
        self.proxy = proxy
        self.cluster = cluster
        self.model = make_model(folder / "model")
        first, second = (cluster.url, cluster.url) if cluster else (nats.url, proxy.url)
        self.workers = {
            name: Worker(name, folder, url, self.model) for name, url in (("w1", first), ("w2", second))
        }
        self.leaders = {name: Leader(name, folder, url) for name, url in (("c1", first), ("c2", second))}
        self.cox: Client

    async def start(self) -> None:
        """Start everything and wait until it serves."""
        self.cox = await Client.connect(self.connection())
        await self.init()
        for worker in self.workers.values():
            worker.start()
        await asyncio.gather(*(worker.up() for worker in self.workers.values()))
        for leader in self.leaders.values():
            leader.start()

    def connection(self) -> Connection:
        """How to reach the bus."""
        return Connection(urls=self.cluster.urls if self.cluster else (self.nats.url,), fleet=FLEET)

    async def init(self) -> None:
        """`cox init`, until NATS is there for it."""
        deadline = time.monotonic() + UP_S
        limits = replace(LOG_LIMITS, replicas=len(self.cluster.nodes) if self.cluster else 1)
        while True:
            try:
                await init(self.cox.js, self.cox.subjects, limits)
            except ControlError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)
            else:
                return

    def processes(self) -> dict[str, psutil.Process]:
        """Every process by name."""
        servers = self.cluster.nodes if self.cluster else {"": self.nats}
        found = {f"nats {name}".strip(): psutil.Process(server.pid) for name, server in servers.items()}
        for leader in self.leaders.values():
            found[leader.name] = leader.process()
        for worker in self.workers.values():
            found |= {f"{worker.name} {what}": one for what, one in worker.processes().items()}
        return found

    async def close(self) -> None:
        """End everything."""
        for process in (*self.workers.values(), *self.leaders.values()):
            with suppress(ProcessLookupError, psutil.Error):
                process.close() if isinstance(process, Worker) else process.kill()
        if hasattr(self, "cox"):
            await self.cox.close()


@asynccontextmanager
async def running(folder: Path, *, cluster: bool = False) -> AsyncIterator[Fleet]:
    """A fleet that serves, on one NATS server or on a cluster of them, for as long as the block runs."""
    store = f"max_file_store: {STORE}"
    async with AsyncExitStack() as stack:
        several = await stack.enter_async_context(NatsCluster(folder, store)) if cluster else None
        if several:
            nats = next(iter(several.nodes.values()))
        else:
            nats = NatsServer(folder, jetstream=store).start()
            stack.callback(nats.kill)
        fleet = Fleet(folder, await stack.enter_async_context(Proxy(nats.port)), nats, several)
        stack.push_async_callback(fleet.close)
        await fleet.start()
        yield fleet


def _environment(folder: Path, url: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COX_", "VLLM_"))}
    paths = [str(CLOCK), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {
        "COX_NATS_URL": url, "COX_FLEET": FLEET, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1", "TMPDIR": str(folder),
    }  # fmt: skip


def _serve(argv: list[str], env: dict[str, str], log: Path) -> None:
    """`cox worker` in a process that was forked for it."""
    os.setsid()
    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.clear()
    os.environ.update(env)
    import tests.faults.clock.sitecustomize  # noqa: F401 - what a Python that is started imports by itself
    from coxswain.service.worker import main

    sys.exit(main(argv))
