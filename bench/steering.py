"""The command path under load: from publishing a command until it is in force, and until its reply.

    python -m bench.steering [--json PATH] [--running 0,64,256,1024] [--rates 0,100,1000] [--http 128]

A real nats-server, the real bus and the real scheduler in a process of their own; the device is a sleep of
`--step-ms` (`bench.rig`), two steps in flight, so that what is measured is steering and not a model. `0` running: the
engine sleeps. Commands (`prioritize` for one running request) are sent open loop, at random moments, at each rate in
turn, `--turns` times; step time and CPU time of the engine's process per step stand beside those at none. In force is
when the engine took it, by the clock that both sides share (`worker_now` of the reply).

`--http N`: `cox worker --device simulated` with its HTTP server instead, saturated by N streams that a process of its
own reads. All cases take some four minutes.
"""

import argparse
import asyncio
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil
from ulid import ULID

FLEET, WORKER = "bench", "bench-1"
UP_S = 180.0
"""What an engine may take until it runs all that it is given."""
QUIET_S = 1.0
"""Between two windows, so that one's backlog is not the next one's."""


# The engine's process


def serve(running: int, step_s: float, switch_s: float | None) -> None:
    """An engine with `running` requests that never end, until its standard input closes."""
    from vllm.utils.gc_utils import freeze_gc_heap

    from bench.rig import Rig, vllm_config
    from coxswain.service.scheduler import SteeredScheduler

    slots = max(running, 8)
    config = vllm_config(
        max_num_seqs=slots + 8, max_num_active_seqs=slots, max_num_batched_tokens=max(2_048, slots * 16),
        max_model_len=65_536, num_blocks=slots * 600 + 64, async_scheduling=True,
    )  # fmt: skip
    rig = Rig(SteeredScheduler, config, step_s=step_s, depth=2).start()
    if switch_s is not None:
        sys.setswitchinterval(switch_s)
    # One that waits, so that there is something to steer when nothing runs.
    for index in range(max(running, 1)):
        rig.submit(f"cmpl-r{index}-0-{index:08x}", prompt=16, tokens=18_000, seed=index)
    freeze_gc_heap()  # as EngineCore does: one collection of all that was imported takes half a second
    sys.stdout.write("up\n")
    sys.stdout.flush()
    sys.stdin.read()
    rig.stop()


@contextmanager
def rig_engine(
    url: str, running: int, step_ms: float, switch_ms: float | None
) -> Iterator[Callable[[], psutil.Process]]:
    """The child that runs `serve`, and how to find the process of its engine."""
    env = {**os.environ, "COX_NATS_URL": url, "COX_FLEET": FLEET, "COX_WORKER": WORKER}
    switch = [] if switch_ms is None else ["--switch-ms", str(switch_ms)]
    child = subprocess.Popen(
        [sys.executable, "-m", "bench.steering", "--serve", str(running), "--step-ms", str(step_ms), *switch],
        env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdin is not None
    try:
        while child.stdout.readline() not in (b"up\n", b""):
            pass
        yield lambda: psutil.Process(child.pid)
    finally:
        child.stdin.close()
        child.wait(20)


# A whole worker and its clients


@contextmanager
def http_engine(url: str, folder: Path, streams: int) -> Iterator[Callable[[], psutil.Process]]:
    """`cox worker` on the simulated device, and a process that reads `streams` endless completions from it."""

    def find() -> psutil.Process:
        children = psutil.Process(worker.pid).children(recursive=True)
        return next(each for each in children if "EngineCore" in " ".join(each.cmdline()))

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    python = [sys.executable, "-m"]
    model = str(folder / "model")
    subprocess.run([*python, "coxswain.service.tiny", model], check=True, stdout=subprocess.DEVNULL)
    env = {**os.environ, "COX_NATS_URL": url, "COX_FLEET": FLEET, "COX_WORKER": WORKER}
    quiet: dict[str, Any] = {"env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    worker = subprocess.Popen(
        [*python, "coxswain.service.worker", model, "--device", "simulated", "--served-model-name", "m",
         "--port", str(port), "--max-num-seqs", str(streams), "--max-model-len", "4096"], **quiet,
    )  # fmt: skip
    load = subprocess.Popen(
        [*python, "bench.steering", "--load", str(streams), "--url", f"http://127.0.0.1:{port}/v1/completions"],
        **quiet,
    )  # fmt: skip
    try:
        yield find
    finally:
        load.terminate()
        worker.terminate()
        for process in (load, worker):
            process.wait(30)


async def read_streams(url: str, streams: int) -> None:
    """Keep `streams` completions open and read them, for ever."""
    import httpx

    body = {"model": "m", "prompt": "a", "max_tokens": 4_000, "stream": True, "ignore_eos": True}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:

        async def one() -> None:
            while True:
                try:
                    async with client.stream("POST", url, json=body) as response:
                        async for _ in response.aiter_raw():
                            pass
                except httpx.HTTPError:
                    await asyncio.sleep(0.5)

        await asyncio.gather(*(one() for _ in range(streams)))


# The client


class Window(NamedTuple):
    """What one rate showed for some seconds."""

    in_force_ms: list[float]
    replied_ms: list[float]
    steps: int
    seconds: float
    cpu_s: float
    refused: int


async def window(client: Any, engine: psutil.Process, rate: int, seconds: float) -> Window:
    """Send commands for `seconds` at `rate` a second and at random moments; count the engine's steps meanwhile."""
    from coxswain.schemas.commands import Prioritize, Targets

    first = (await client.statuses(wait_s=3.0))[WORKER]
    names = [row.request for row in first.requests]
    source = random.Random(rate)
    in_force: list[float] = []
    replied: list[float] = []
    refused = 0

    async def send(index: int) -> None:
        nonlocal refused
        targets = Targets(requests=(source.choice(names),))
        command = Prioritize(id=str(ULID()), targets=targets, priority=index + 1)
        began = time.time()
        (reply,) = await client.command(WORKER, "prioritize", command, timeout_s=10.0)
        replied.append((time.time() - began) * 1e3)
        in_force.append((reply.worker_now - began) * 1e3)
        refused += reply.outcome == "rejected"

    cpu_s = _cpu_s(engine)
    began = time.perf_counter()
    sending = []
    if rate:
        at = 0.0
        while (at := at + source.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            sending.append(asyncio.create_task(send(len(sending))))
        await asyncio.gather(*sending)
    else:
        await asyncio.sleep(seconds)
    last = (await client.statuses(wait_s=3.0))[WORKER]
    return Window(
        in_force,
        replied,
        last.step - first.step,
        last.sent_at - first.sent_at,
        _cpu_s(engine) - cpu_s,
        refused,
    )


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def measure(
    url: str,
    find: Callable[[], psutil.Process],
    rates: list[int],
    seconds: float,
    turns: int,
    *,
    running: int,
) -> list[dict[str, Any]]:
    """A row per rate; all windows of one rate together. `find` gives the engine's process once it is up."""
    from coxswain.common.connection import Connection
    from coxswain.control.client import Client
    from coxswain.schemas.commands import Preempt, Targets

    windows: dict[int, list[Window]] = {rate: [] for rate in rates}
    async with await Client.connect(Connection(urls=(url,), fleet=FLEET)) as client:
        async with asyncio.timeout(UP_S):  # the worker connects when it is ready
            while not (found := await client.statuses(wait_s=0.5)) or found[WORKER].running < max(running, 1):  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        if not running:
            await client.command(WORKER, "preempt", Preempt(id=str(ULID()), targets=Targets(all=True)))
        engine = find()
        for _ in range(turns):
            for rate in rates:
                await asyncio.sleep(QUIET_S)
                windows[rate].append(await window(client, engine, rate, seconds))
    return [{"running": running, "rate": rate, **_row(found)} for rate, found in windows.items()]


def _row(windows: list[Window]) -> dict[str, Any]:
    steps = sum(one.steps for one in windows)
    row: dict[str, Any] = {"refused": sum(one.refused for one in windows)}
    row["commands"] = sum(len(one.replied_ms) for one in windows)
    row["cpu"] = sum(one.cpu_s for one in windows) / sum(one.seconds for one in windows)
    if steps:
        row["step_ms"] = sum(one.seconds for one in windows) / steps * 1e3
        row["step_ms_by_turn"] = [one.seconds / one.steps * 1e3 for one in windows]
        row["cpu_ms_per_step"] = sum(one.cpu_s for one in windows) / steps * 1e3
    if row["commands"]:
        for name in ("in_force_ms", "replied_ms"):
            times = sorted(each for one in windows for each in getattr(one, name))
            row[name] = {
                "p50": statistics.median(times),
                "p99": times[int(len(times) * 0.99)],
                "most": times[-1],
            }
    return row


def main() -> int:
    """Run the cases, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--running", default="0,64,256,1024")
    parser.add_argument("--rates", default="0,100,1000")
    parser.add_argument("--http", type=int, default=128, help="streams; 0 leaves this case out")
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one rate in one turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--switch-ms", type=float, help="sys.setswitchinterval of the engine's process")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--load", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve is not None:
        serve(chosen.serve, chosen.step_ms / 1e3, chosen.switch_ms and chosen.switch_ms / 1e3)
        return 0
    if chosen.load is not None:
        asyncio.run(read_streams(chosen.url, chosen.load))
        return 0
    rates = [int(rate) for rate in chosen.rates.split(",")]
    cases = [
        (f"busy {count}" if int(count) else "idle", int(count))
        for count in chosen.running.split(",")
        if count
    ]
    cases += [(f"http {chosen.http}", chosen.http)] if chosen.http else []
    found = []
    print(
        f"{'case':>10} {'cmd/s':>6} {'step ms':>8} {'CPU ms':>8} | in force {'p50':>7} {'p99':>7}"
        f" | replied {'p50':>7} {'p99':>7}"
    )
    for name, running in cases:
        for row in run_case(name, running, rates, chosen):
            found.append({"case": name, **row})
            print(f"{name:>10} {line(row)}", flush=True)
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    return 0


def line(row: dict[str, Any]) -> str:
    """A row for people; what does not apply is a dash."""

    def text(number: float | None, width: int = 7) -> str:
        return f"{'–' if number is None else format(number, '.2f'):>{width}}"

    in_force, replied = row.get("in_force_ms", {}), row.get("replied_ms", {})
    return (
        f"{row['rate']:6} {text(row.get('step_ms'), 8)} {text(row.get('cpu_ms_per_step'), 8)} |          "
        f"{text(in_force.get('p50'))} {text(in_force.get('p99'))} |         "
        f"{text(replied.get('p50'))} {text(replied.get('p99'))}"
    )


def run_case(name: str, running: int, rates: list[int], chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """One engine, measured at all rates."""
    from tests.support.nats import NatsServer

    with tempfile.TemporaryDirectory(prefix="cox-bench-") as folder:
        server = NatsServer(Path(folder)).start()
        engine = (
            http_engine(server.url, Path(folder), running)
            if name.startswith("http")
            else rig_engine(server.url, running, chosen.step_ms, chosen.switch_ms)
        )
        try:
            with engine as find:
                return asyncio.run(
                    measure(server.url, find, rates, chosen.seconds, chosen.turns, running=running)
                )
        finally:
            server.kill()


if __name__ == "__main__":
    sys.exit(main())
