"""The control loop: status frames in, commands out, for fleets of made-up workers.

    python -m bench.controller [--json PATH] [--policy vtc] [--steps 150] [--grid | --workers 100 --tenants 1000 ...]

One step is what a controller does every 50 ms: decode the frames that came, `ControlCore.step`, encode the
commands. Between steps, and not measured, each worker obeys, serves all its active tenants a little, lets one
leave and another come, and writes its next frame: a delta 19 times of 20, then a full one. No NATS is here: what
the event loop adds per message is measured by `bench.controller --live`.
"""

import argparse
import gc
import itertools
import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.herd import FULL_EVERY, START, herd
from coxswain.control.core import Answer, ControlCore, Inputs, Send
from coxswain.control.policy import load
from coxswain.control.reader import Reader
from coxswain.schemas.commands import Rank, encode
from coxswain.schemas.policy import TenantPolicy

CADENCE_S = 0.05


def run(
    *, workers: int, tenants: int, active: int, running: int, waiting: int, steps: int, policy: str
) -> dict[str, Any]:
    """One fleet for `steps` steps, after a second to settle: times in ms, bytes and rows per second."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    child = context.Process(target=herd, args=(theirs, workers, tenants, active, running, waiting))
    child.start()
    ids: Iterator[int] = itertools.count()
    chosen = load(policy)
    core = ControlCore(chosen, "bench", lambda: f"id{next(ids)}", cadence_s=CADENCE_S)
    read = Reader(core.fleet, requests=chosen.sees != "tenants").read
    answers: list[Answer] = []
    spent: dict[str, list[float]] = {"decode": [], "step": [], "encode": [], "loop": [], "cpu": []}
    sums = dict.fromkeys(("bytes_in", "bytes_out", "commands", "rank_rows"), 0)
    now, obeyed = START, []
    gc.collect()
    gc.freeze()
    for number in range(-2 * FULL_EVERY, steps):
        now += CADENCE_S
        pipe.send((now, obeyed))
        payloads = pipe.recv()
        began, cpu = time.perf_counter(), time.process_time()
        frames = [read(name, payload) for name, payload in payloads]
        decoded = time.perf_counter()
        outgoing = core.step(
            now, Inputs(frames=frames, classes={}, tenants=TENANTS, epoch=(1.0, 1), answers=answers)
        )
        stepped = time.perf_counter()
        sent = [encode(each.command if isinstance(each, Send) else each.lead) for each in outgoing]
        ended, cpu = time.perf_counter(), time.process_time() - cpu
        answers = [Answer(each.worker, each.verb, ok=True) for each in outgoing if isinstance(each, Send)]
        obeyed = [
            (each.worker, each.verb, payload) if isinstance(each, Send) else ("", "lead", payload)
            for each, payload in zip(outgoing, sent, strict=True)
        ]
        if number < 0:
            continue
        for part, seconds in zip(
            spent, (decoded - began, stepped - decoded, ended - stepped, ended - began, cpu), strict=True
        ):
            spent[part].append(seconds * 1_000)
        sums["bytes_in"] += sum(len(payload) for _, payload in payloads)
        sums["bytes_out"] += sum(map(len, sent))
        sums["commands"] += len(answers)
        sums["rank_rows"] += sum(
            len(each.command.tenants)
            for each in outgoing
            if isinstance(each, Send) and isinstance(each.command, Rank)
        )
    core.validate()
    pipe.send(None)
    child.join()
    seconds = steps * CADENCE_S
    return {
        "workers": workers, "tenants": tenants, "active": active, "running": running, "waiting": waiting,
        "policy": policy, "steps": steps,
        **{f"{part}_ms": summary(times) for part, times in spent.items()},
        **{f"{what}_per_s": round(total / seconds) for what, total in sums.items()},
        "cpu_share": round(sum(spent["cpu"]) / 1_000 / seconds, 3),
        "max_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1_024,
    }  # fmt: skip


TENANTS: dict[str, TenantPolicy] = {}


def summary(times: list[float]) -> dict[str, float]:
    """Median, 99th percentile and most, in ms."""
    ordered = sorted(times)
    return {
        "p50": round(statistics.median(ordered), 2),
        "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 2),
        "max": round(ordered[-1], 2),
    }


GRID = (
    *({"workers": workers} for workers in (1, 10, 30, 100, 300)),
    *({"tenants": tenants} for tenants in (50, 300, 3_000, 10_000)),
    *({"active": active} for active in (10, 200, 1_000)),
    *({"running": running} for running in (0, 256)),
)
"""What changes from the standard fleet, one thing at a time."""


def line(result: dict[str, Any]) -> str:
    """One result for people."""
    loop, p50 = (
        result["loop_ms"],
        {part: result[f"{part}_ms"]["p50"] for part in ("decode", "step", "encode", "cpu")},
    )
    return (
        f"{result['workers']:4} workers {result['tenants']:6} tenants {result['active']:5} active "
        f"{result['running']:4} running: loop p50 {loop['p50']:7.2f} p99 {loop['p99']:7.2f} ms "
        f"(decode {p50['decode']:.2f}, step {p50['step']:.2f}, encode {p50['encode']:.2f}; CPU {p50['cpu']:.2f}), "
        f"in {result['bytes_in_per_s'] / 1e6:.1f} MB/s, out {result['bytes_out_per_s'] / 1e6:.1f} MB/s, "
        f"{result['commands_per_s']} commands/s, {result['rank_rows_per_s']} rows/s"
    )


def main() -> None:
    """Run one fleet, or the grid."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--policy", default="vtc")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--grid", action="store_true")
    standard = {"workers": 100, "tenants": 1_000, "active": 50, "running": 64, "waiting": 64}
    for name, value in standard.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    fixed = {name: getattr(options, name) for name in standard}
    results = []
    for change in GRID if options.grid else ({},):
        result = run(**{**fixed, **change}, steps=options.steps, policy=options.policy)
        results.append(result)
        print(line(result), flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({"python": platform.python_version(), "results": results}, indent=2)
        )


if __name__ == "__main__":
    main()
