"""What it costs to be looked at: the engine's CPU per step with metrics scraped and requests traced, and without.

    python -m bench.observing [--json PATH] [--rounds 2]

A worker on the simulated device behind its real HTTP server, 96 requests of 200 tokens on 32 slots; sides in turns,
each in processes of its own: `off`, `metrics` (the page is fetched five times a second) and
`traces` (that, and a span for all that happens). The front's CPU is beside it: that is where the work is done.
"""

import argparse
import asyncio
import json
import os
import re
import tempfile
import threading
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from coxswain.schemas.metrics import WORKER_STEPS
from tests.support.otlp import Receiver
from tests.support.serving import Api, Served, serving

SIDES = ("off", "metrics", "traces")
FETCH_S = 0.2
SETTLE_S = 1.5
"""A full frame later."""


def cpu_s(process: psutil.Process) -> float:
    """What a process has used so far."""
    return sum(process.cpu_times()[:2])


async def load(served: Served, requests: int) -> None:
    """So many completions at once."""
    api = Api(served)
    streams = [api.stream(f"The river {number}", tenant="acme", tokens=200) for number in range(requests)]
    await asyncio.gather(*(stream.end(300) for stream in streams))
    await asyncio.sleep(SETTLE_S)
    await api.close()


def steps(served: Served) -> float:
    """How many steps the engine has taken."""
    page = httpx.get(f"{served.http}/metrics").text
    (count,) = re.findall(rf"^{WORKER_STEPS.name}{{.*}} (\S+)$", page, re.MULTILINE)
    return float(count)


def measure(side: str) -> dict[str, Any]:
    """One side, once."""
    os.environ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = "http/protobuf"
    with Receiver() as receiver, tempfile.TemporaryDirectory() as folder:
        traced = ("--otlp-traces-endpoint", receiver.url) if side == "traces" else ()
        flags = ("--device", "simulated", "--sim-preset", "cpu", "--max-num-seqs", "32", *traced)
        with serving(Path(folder), *flags, tenants=("acme",)) as served:
            own = {"authorization": f"Bearer {served.keys['acme']}"}
            engine, front, done = served.engine(), psutil.Process(served.pid), threading.Event()
            asyncio.run(load(served, 16))  # everything that happens once has happened
            before = steps(served), cpu_s(engine), cpu_s(front)

            def fetch() -> None:
                while not done.wait(FETCH_S):
                    httpx.get(f"{served.http}/metrics", headers=own, timeout=60)

            reader = threading.Thread(target=fetch)
            if side != "off":
                reader.start()
            asyncio.run(load(served, 96))
            after = steps(served), cpu_s(engine), cpu_s(front)
            done.set()
            if side != "off":
                reader.join()
            taken = after[0] - before[0]
            return {
                "steps": taken,
                "engine_us_per_step": round((after[1] - before[1]) / taken * 1e6),
                "front_us_per_step": round((after[2] - before[2]) / taken * 1e6),
                "spans": len(receiver.spans),
            }


def main() -> None:
    """Measure all sides in turns."""
    parser = argparse.ArgumentParser(description="what it costs to be looked at")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side in SIDES:
            found[side].append(measure(side))
            print(side, found[side][-1], flush=True)
    for side in SIDES:
        print(
            f"{side:8} {median(each['engine_us_per_step'] for each in found[side]):.0f} µs of the engine per step"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
