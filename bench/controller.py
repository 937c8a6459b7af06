"""The control loop: status frames in, commands out, for fleets of made-up workers.

    python -m bench.controller [--json PATH] [--policy vtc] [--steps 150] [--grid | --workers 100 --tenants 1000 ...]
    python -m bench.controller --period 2                      # frames every 100 ms (COX_STATUS_INTERVAL_S=0.1)
    python -m bench.controller --plot PNG --json PATH          # draws what --grid wrote there; needs matplotlib
    python -m bench.controller --table --json PATH             # writes it as the table of docs/scaling.md

One turn is what a controller does in 50 ms: read and merge each frame as it comes (`hear`), then, at once,
`ControlCore.step` and encode the commands. Between turns, and not measured, the workers obey and serve
(`bench.herd`), in a process of their own. No NATS is here.

A machine that is shared runs slower at times. How fast it was, a loop without memory says that runs before and after
each turn (`pace`): `paced` is what the turn would have taken at the median pace of the run.

All runs of a fleet play the same turns. With `--runs 5` each turn counts once more, as the median of its runs: a turn
that is slow by what it does is slow in all of them, and one that was held up by chance is not.
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
from typing import Any, Final

from bench.herd import FULL_EVERY, START, herd
from coxswain.control.core import Answer, Ask, ControlCore, Inputs, Send
from coxswain.control.policy import load
from coxswain.control.reader import Reader
from coxswain.schemas.commands import Rank, encode
from coxswain.schemas.policy import TenantPolicy

CADENCE_S = 0.05


def run(
    *,
    workers: int,
    tenants: int,
    active: int,
    running: int,
    waiting: int,
    period: int = 1,
    steps: int,
    policy: str,
) -> dict[str, Any]:
    """One fleet for `steps` steps, after two seconds to settle: times in ms, bytes and rows per second."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    child = context.Process(target=herd, args=(theirs, workers, tenants, active, running, waiting, period))
    child.start()
    ids: Iterator[int] = itertools.count()
    chosen = load(policy)
    core = ControlCore(chosen, "bench", lambda: f"id{next(ids)}", cadence_s=CADENCE_S)
    read = Reader(core.fleet).read
    answers: list[Answer] = []
    spent: dict[str, list[float]] = {"hear": [], "step": [], "encode": [], "loop": [], "cpu": [], "pace": []}
    sums = dict.fromkeys(("bytes_in", "bytes_out", "commands", "rank_rows"), 0)
    now, obeyed = START, []
    gc.collect()
    gc.freeze()
    for number in range(-2 * FULL_EVERY, steps):
        now += CADENCE_S
        pipe.send((now, obeyed))
        payloads = pipe.recv()
        pace_before = pace()
        began, cpu = time.perf_counter(), time.process_time()
        for name, payload in payloads:
            core.hear(now, read(name, payload))
        heard = time.perf_counter()
        outgoing = core.step(now, Inputs(classes={}, tenants=TENANTS, epoch=(1.0, 1), answers=answers))
        stepped = time.perf_counter()
        # Who asks for a whole queue gets no answer, as from a worker that is too busy.
        outgoing = [each for each in outgoing if not isinstance(each, Ask)]
        sent = [encode(each.command if isinstance(each, Send) else each.lead) for each in outgoing]
        ended, cpu = time.perf_counter(), time.process_time() - cpu
        took = (
            heard - began,
            stepped - heard,
            ended - stepped,
            ended - began,
            cpu,
            (pace_before + pace()) / 2,
        )
        answers = [Answer(each, ok=True) for each in outgoing if isinstance(each, Send)]
        obeyed = [
            (each.worker, each.verb, payload) if isinstance(each, Send) else ("", "lead", payload)
            for each, payload in zip(outgoing, sent, strict=True)
        ]
        if number < 0:
            continue
        for part, seconds in zip(spent, took, strict=True):
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
    usual = statistics.median(spent["pace"])
    spent["paced"] = [cpu * usual / each for cpu, each in zip(spent["cpu"], spent["pace"], strict=True)]
    return {
        "workers": workers, "tenants": tenants, "active": active, "running": running, "waiting": waiting,
        "status_interval_s": round(period * CADENCE_S, 3), "policy": policy, "steps": steps,
        **{f"{part}_ms": summary(times) for part, times in spent.items()},
        **{f"{what}_per_s": round(total / seconds) for what, total in sums.items()},
        "cpu_share": round(sum(spent["cpu"]) / 1_000 / seconds, 3),
        "max_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1_024,
        "turns_ms": spent["cpu"],
    }  # fmt: skip


TENANTS: dict[str, TenantPolicy] = {}


def pace() -> float:
    """CPU time of a loop that needs the processor alone, some 0.4 ms: it has all that it touches at hand."""
    began = time.process_time()
    for _ in range(20_000):
        pass
    return time.process_time() - began


def summary(times: list[float]) -> dict[str, float]:
    """Median, 99th percentile and most, in ms."""
    ordered = sorted(times)
    return {
        "p50": round(statistics.median(ordered), 2),
        "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 2),
        "max": round(ordered[-1], 2),
    }


GRID: Final = {
    "workers": (1, 10, 30, 100, 200),
    "tenants": (50, 300, 1_000, 3_000, 10_000),
    "active": (10, 50, 100, 200),
    "running": (0, 64, 256),
}
"""What is changed in the standard fleet, one thing at a time."""
STANDARD: Final = {"workers": 100, "tenants": 1_000, "active": 50, "running": 64, "waiting": 64}


def grid() -> list[dict[str, int]]:
    """The standard fleet and all its variations, the smallest first."""
    fleets = [{**STANDARD, name: value} for name, values in GRID.items() for value in values]
    return [dict(each) for each in dict.fromkeys(tuple(fleet.items()) for fleet in fleets)]


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Growth with each of the things that the grid changes: CPU per step, and bytes per second."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, rows = plt.subplots(2, len(GRID), figsize=(13, 6), layout="constrained", sharey="row")
    for column, name in enumerate(GRID):
        some = [
            each for each in results if all(each[key] == STANDARD[key] for key in STANDARD if key != name)
        ]
        some.sort(key=lambda each: each[name])
        at = [each[name] for each in some]
        top, bottom = rows[0][column], rows[1][column]
        for centile, style in (("p50", "o-"), ("p99", "v:")):
            top.plot(at, [each["cpu_ms"][centile] for each in some], style, color="tab:blue", label=centile)
        top.axhline(20, color="grey", linewidth=0.8, linestyle="--")
        bottom.plot(at, [each["bytes_in_per_s"] / 1e6 for each in some], "o-", label="status in")
        bottom.plot(at, [each["bytes_out_per_s"] / 1e6 for each in some], "s-", label="commands out")
        bottom.set_xlabel(
            {"active": "active tenants on each worker", "running": "running requests on each"}.get(name, name)
        )
    rows[0][0].set_ylabel("CPU per step of 50 ms (ms)")
    rows[1][0].set_ylabel("MB per second")
    rows[0][0].legend(loc="upper left")
    rows[1][0].legend()
    for axes in rows.flat:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def table(results: list[dict[str, Any]]) -> str:
    """Fleets as rows of the table in docs/scaling.md, without those that differ in requests only."""
    rows = [
        "| workers | tenants | active on each | CPU of a turn, p50 / p99 | p99 at one pace | of a core | in | out |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {each['workers']} | {each['tenants']:,} | {each['active']} "
        f"| {each['cpu_ms']['p50']:.1f} / {each['cpu_ms']['p99']:.1f} ms | {each['paced_ms']['p99']:.1f} ms "
        f"| {each['cpu_share']:.2f} | {each['bytes_in_per_s'] / 1e6:.0f} MB/s "
        f"| {each['commands_per_s']}/s, {each['bytes_out_per_s'] / 1e6:.1f} MB/s |"
        for each in results
        if each["running"] == STANDARD["running"]
    ]
    return "\n".join(rows)


def line(result: dict[str, Any]) -> str:
    """One result for people."""
    loop, cpu, beat = result["loop_ms"], result["cpu_ms"], result["pace_ms"]
    p50 = {part: result[f"{part}_ms"]["p50"] for part in ("hear", "step", "encode")}
    return (
        f"{result['workers']:4} workers {result['tenants']:6} tenants {result['active']:5} active "
        f"{result['running']:4} running: loop p50 {loop['p50']:7.2f} p99 {loop['p99']:7.2f} ms "
        f"(hear {p50['hear']:.2f}, step {p50['step']:.2f}, encode {p50['encode']:.2f}), "
        f"CPU p50 {cpu['p50']:.2f} p99 {cpu['p99']:.2f}, at the median pace p99 {result['paced_ms']['p99']:.2f} "
        f"(pace p50 {beat['p50']:.2f} p99 {beat['p99']:.2f}), "
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
    parser.add_argument(
        "--period",
        type=int,
        default=1,
        choices=(1, 2, 4, 5, 10),
        help="turns from one frame of a worker to its next",
    )
    parser.add_argument("--runs", type=int, default=1, help="measure all of it so many times")
    parser.add_argument("--plot", type=Path, help="draw the results in --json instead of measuring")
    parser.add_argument("--table", action="store_true", help="write them as Markdown instead of measuring")
    for name, value in STANDARD.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(options.json.read_text())["results"], options.plot)
        return
    if options.table:
        print(table(json.loads(options.json.read_text())["results"]))
        return
    fleets = grid() if options.grid else [{name: getattr(options, name) for name in STANDARD}]
    results, usual = [], []
    for fleet in fleets:
        runs = []
        for _ in range(options.runs):
            result = run(**fleet, period=options.period, steps=options.steps, policy=options.policy)
            runs.append(result.pop("turns_ms"))
            results.append(result)
            print(line(result), flush=True)
        if options.runs > 1:
            usual.append(
                fleet | {"cpu_ms": summary([statistics.median(turn) for turn in zip(*runs, strict=True)])}
            )
            print(
                f"CPU of each turn, as the median of {options.runs} runs: {usual[-1]['cpu_ms']}", flush=True
            )
        if options.json:
            made = {"python": platform.python_version(), "results": results, "turns": usual}
            options.json.write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
