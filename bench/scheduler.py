"""What steering costs the scheduler: ours against vLLM's own, in one process, all sides in turns.

    python -m bench.scheduler [--json PATH] [--case PATTERN ...] [--rounds 50] [--quick] [--list]

The real scheduler and KV manager without a device (`bench.sides`). All cases take some 20 minutes on two slow cores;
each is written to PATH as it ends, and a case that PATH has already is not run again. Cases:

    steps/RUNNING/WAITING/TENANTS   a decode step: `schedule` + `update_from_output`
    churn/RUNNING/WAITING/TENANTS   the same while as many requests come as are admitted and end, one in 256 steps
                                    of each that runs; their `add_request` counts, and "alone" is without it
    cached/RUNNING/WAITING/TENANTS  a decode step with prefix caching and blocks of 16 tokens, vLLM's defaults
    frame/RUNNING/WAITING/TENANTS   a status frame, everything that runs having changed
    single/WAITING                  one request reprioritized or aborted, one tenant re-ranked
    command/WAITING                 a command that names 1,000 waiting requests
    cutin/RUNNING/WAITING           what is decided before a step while all slots are taken
    capped/RUNNING/WAITING          a step that could admit, while all that wait is of tenants at their cap
    memory/WAITING                  bytes that a waiting request takes
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

import msgspec

from bench import changes
from bench.sides import OURS, environment, steps

Case = dict[str, Any]
RUNNING, WAITING, TENANTS = (64, 256, 1_024), (1_000, 10_000, 100_000), (1, 100, 1_000)


def cases(rounds: int, *, quick: bool) -> dict[str, Callable[[], Case]]:
    """All cases by name, in the order in which they run."""
    found: dict[str, Callable[[], Case]] = {}

    def step_case(kind: str, running: int, waiting: int, tenants: int) -> None:
        found[f"{kind}/{running}/{waiting}/{tenants}"] = lambda: steps(
            running, waiting, tenants, rounds, churn=kind == "churn", caching=kind == "cached"
        )

    if quick:
        step_case("steps", 64, 1_000, 10)
        step_case("churn", 64, 1_000, 10)
        found["frame/64/1000/10"] = lambda: changes.frame(64, 1_000, 10, rounds)
        found["single/5000"] = lambda: changes.single(5_000, 100, rounds)
        found["command/5000"] = lambda: changes.command(5_000, 1_000, 3)
        found["cutin/64/1000"] = lambda: changes.cut_in(64, 1_000, 16)
        found["capped/64/1000"] = lambda: changes.capped(64, 1_000, rounds)
        found["memory/2000"] = lambda: changes.memory(2_000)
        return found
    found["frame/1024/10000/1000"] = lambda: changes.frame(1_024, 10_000, 1_000, rounds)
    found["single/100000"] = lambda: changes.single(100_000, 100, 500)
    found["command/100000"] = lambda: changes.command(100_000, 1_000, 20)
    found["cutin/1024/10000"] = lambda: changes.cut_in(1_024, 10_000, 64)
    found["capped/64/10000"] = lambda: changes.capped(64, 10_000, rounds)
    found["memory/20000"] = lambda: changes.memory(20_000)
    for running, tenants in product(RUNNING, TENANTS):
        step_case("churn", running, 10_000, tenants)
    for running in RUNNING:
        step_case("cached", running, 10_000, 100)
    # By length of the queue: the long ones take most of the time, to fill.
    for waiting, running, tenants in product(WAITING, RUNNING, TENANTS):
        step_case("steps", running, waiting, tenants)
    return found


def line(name: str, case: Case) -> str:
    """A case as a line for people."""
    kind = name.partition("/")[0]
    if kind in ("steps", "churn", "cached"):
        ratios = [
            "{} {:.3f} [{:.3f} {:.3f}] mean {:.3f}".format(
                ours, *case[f"{ours}/priority"], case[f"{ours}/priority mean"]
            )
            for ours in OURS
        ]
        if kind == "churn":
            ratios += [
                "{} alone {:.3f} [{:.3f} {:.3f}]".format(ours, *case[f"{ours}/priority alone"])
                for ours in OURS
            ]
        return f"{name:24} stock {case['step_us']['priority']:8.0f} µs | " + " | ".join(ratios)
    if kind == "single":
        parts = (
            f"{verb} {case[verb]['ours_us']:.1f} µs (stock {case[verb]['stock_us']:.0f})"
            for verb in ("reprioritize", "rerank", "abort")
        )
        return f"{name:24} " + ", ".join(parts)
    numbers = {key: value for key, value in case.items() if key.endswith(("_ms", "_us", "bytes"))}
    return f"{name:24} " + ", ".join(f"{key} {value:.2f}" for key, value in numbers.items())


def main() -> int:
    """Run the cases, print a line each, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--case", action="append", help="only cases that match: steps/64/*, several times if need be"
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="one small case of each kind")
    parser.add_argument("--list", action="store_true", help="say which cases there are")
    chosen = parser.parse_args()
    todo = cases(40 if chosen.quick else chosen.rounds, quick=chosen.quick)
    if chosen.case:
        todo = {name: run for name, run in todo.items() if any(fnmatch(name, each) for each in chosen.case)}
    if chosen.list:
        print("\n".join(todo))
        return 0
    found: dict[str, Any] = {
        "machine": f"{os.cpu_count()} × {platform.processor() or platform.machine()}",
        "cases": {},
    }
    if chosen.json and chosen.json.exists():
        found = msgspec.json.decode(chosen.json.read_bytes())
    with environment():
        for name, run in todo.items():
            if name in found["cases"]:
                continue
            began, load = time.monotonic(), os.getloadavg()[0]
            case = found["cases"][name] = run()
            case |= {"took_s": round(time.monotonic() - began, 1), "load_before": load}
            print(line(name, case), flush=True)
            if chosen.json:
                chosen.json.parent.mkdir(parents=True, exist_ok=True)
                chosen.json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
