"""A leader is killed: how long until its successor's first command is accepted, and what it costs.

    python -m bench.failover [--json PATH] [--times 10]

Two controllers in processes of their own, a real nats-server, and a small worker that publishes a frame every 50 ms
and notes who told it what. Each time the leader gets SIGKILL, and another standby is started. Measured from the
signal to the moment at which the worker accepts the first command of a later epoch.
"""

import argparse
import asyncio
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.controller import summary
from coxswain.control.client import Client
from coxswain.control.tables import init
from tests.support.nats import NatsServer
from tests.support.working import FLEET, connection, until, working

COX = "from coxswain.control.cli import main; main()"
PATIENCE_S = 60.0


def start(server: NatsServer, name: str, log: Any) -> subprocess.Popen[bytes]:
    """A controller."""
    words = ["--nats", server.url, "--fleet", FLEET, "controller", "--policy", "vtc", "--name", name]
    return subprocess.Popen([sys.executable, "-c", COX, *words], stdout=log, stderr=log)


async def measure(server: NatsServer, times: int, log: Any) -> list[float]:
    """Seconds from kill -9 to the first accepted command of the next epoch, each time."""
    async with await Client.connect(connection(server)) as client:
        await init(client.js, client.subjects)
    names = iter(f"c{number}" for number in range(times + 2))
    alive = {name: start(server, name, log) for name in (next(names), next(names))}
    took: list[float] = []
    try:
        async with working(server, "w1") as one, working(server, "w2") as other:
            for worker, (many, few) in ((one, "ab"), (other, "ba")):
                worker.arrive(many, 5, 20, times=1_000_000)
                worker.arrive(few, 5, 20, times=1_000_000)
                worker.serving = True
            for _ in range(times):
                await until(
                    lambda: one.leader in alive and any(each.accepted for each in one.told), PATIENCE_S
                )
                await asyncio.sleep(1.0)  # let the standby be warm
                epoch, leader = one.epoch, one.leader
                assert epoch is not None
                began = time.monotonic()
                os.kill(alive[leader].pid, signal.SIGKILL)
                await until(lambda epoch=epoch: one.accepted(epoch), PATIENCE_S)
                took.append(one.accepted(epoch)[0].at - began)
                alive.pop(leader).wait()
                name = next(names)
                alive[name] = start(server, name, log)
                print(f"{leader} killed: {took[-1]:.2f} s", flush=True)
    finally:
        for process in alive.values():
            process.kill()
            process.wait()
    return took


def main() -> None:
    """Kill leaders."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--times", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        server = NatsServer(Path(folder)).start()
        try:
            took = asyncio.run(measure(server, options.times, log))
        finally:
            server.kill()
    result = {
        "takeover_ms": summary([each * 1_000 for each in took]),
        "seconds": [round(each, 3) for each in took],
    }
    print(result["takeover_ms"])
    if options.json:
        options.json.write_text(json.dumps({"python": platform.python_version(), **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
