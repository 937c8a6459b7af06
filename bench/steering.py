"""The command path: from publishing a command to its reply, which says that it is in force.

    python -m bench.steering [--json PATH] [--commands 500] [--running 1,64,256] [--step-ms 10]

A real nats-server, the real bus thread and the real scheduler in a process of their own; the device is a sleep
(`bench.rig`), so that what is measured is steering and not a model. The client is plain: one command at a
time. `idle`: nothing to schedule, the engine sleeps. `busy N`: N requests decode, a step takes `--step-ms` of
device time plus the scheduler's own; a command waits for the step that is being scheduled or executed.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
from ulid import ULID

FLEET, WORKER = "bench", "bench-1"


def serve(running: int, step_s: float) -> None:
    """The child: an engine with `running` requests that never end, until its standard input closes."""
    from bench.rig import Rig, vllm_config
    from coxswain.service.scheduler import SteeredScheduler

    slots = max(running, 8)
    config = vllm_config(
        max_num_seqs=slots + 8, max_num_active_seqs=slots, max_num_batched_tokens=max(2_048, slots * 16),
        max_model_len=65_536, num_blocks=slots * 600 + 64,
    )  # fmt: skip
    rig = Rig(SteeredScheduler, config, step_s=step_s).start()
    # One that waits, so that there is something to steer when nothing runs.
    for index in range(max(running, 1)):
        rig.submit(f"cmpl-r{index}-0-{index:08x}", prompt=16, tokens=18_000, seed=index)
    sys.stdout.write("up\n")
    sys.stdout.flush()
    sys.stdin.read()
    rig.stop()


async def measure(url: str, commands: int, *, hold_all: bool) -> dict[str, float]:
    """Round trips of `prioritize` for one request: p50, p99 and most, in ms, and the engine's step time."""
    from coxswain.control.client import Client
    from coxswain.schemas.commands import Preempt, Prioritize, Targets
    from coxswain.schemas.connection import Connection

    async with await Client.connect(Connection(urls=(url,), fleet=FLEET)) as client:
        # The worker connects when it is ready.
        while not (found := await client.statuses(wait_s=0.5)) or not found[WORKER].running:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        if hold_all:
            await client.command(WORKER, "preempt", Preempt(id=str(ULID()), targets=Targets(all=True)))
            await asyncio.sleep(0.2)
        spent = []
        for index in range(commands):
            command = Prioritize(id=str(ULID()), targets=Targets(requests=("r0",)), priority=index)
            began = time.perf_counter()
            (reply,) = await client.command(WORKER, "prioritize", command)
            spent.append((time.perf_counter() - began) * 1e3)
            assert reply.outcome == "applied", reply
            await asyncio.sleep(0.002)
        step_s = (await client.statuses())[WORKER].step_s
    spent.sort()
    return {
        "p50_ms": spent[len(spent) // 2], "p99_ms": spent[int(len(spent) * 0.99)], "most_ms": spent[-1],
        "step_ms": 0.0 if hold_all else step_s * 1e3,
    }  # fmt: skip


def case(name: str, running: int, step_ms: float, commands: int) -> dict[str, Any]:
    """One engine in a process of its own, measured."""
    from tests.support.nats import NatsServer

    with tempfile.TemporaryDirectory(prefix="cox-bench-") as folder:
        server = NatsServer(Path(folder)).start()
        env = {**os.environ, "COX_NATS_URL": server.url, "COX_FLEET": FLEET, "COX_WORKER": WORKER}
        child = subprocess.Popen(
            [sys.executable, "-m", "bench.steering", "--serve", str(running), "--step-ms", str(step_ms)],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert child.stdout is not None
            assert child.stdin is not None
            while child.stdout.readline() not in (b"up\n", b""):
                pass
            found = asyncio.run(measure(server.url, commands, hold_all=name == "idle"))
        finally:
            child.stdin.close()
            child.wait(20)
            server.kill()
    return {"case": name, "running": running, "commands": commands, **found}


def main() -> int:
    """Run the cases, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commands", type=int, default=500)
    parser.add_argument("--running", default="1,64,256")
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve is not None:
        serve(chosen.serve, chosen.step_ms / 1e3)
        return 0
    cases = [("idle", 1, chosen.step_ms)]
    cases += [(f"busy {count}", int(count), chosen.step_ms) for count in chosen.running.split(",")]
    found = []
    print(f"{'case':>10} {'step ms':>8} {'p50 ms':>8} {'p99 ms':>8} {'most':>8}")
    for name, running, step_ms in cases:
        found.append(case(name, running, step_ms, chosen.commands))
        row = found[-1]
        print(
            f"{name:>10} {row['step_ms']:8.1f} {row['p50_ms']:8.2f} {row['p99_ms']:8.2f} {row['most_ms']:8.2f}",
            flush=True,
        )
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
