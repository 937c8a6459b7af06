"""Faults in rounds: `python -m tests.faults [--seconds 600] [--only NAME …] [--steps N] [--json FILE]`.

Every round is each fault once, from the second on in random order. With `--steps` the checked simulated device is then
steered at random for so many. Prints a table, and exits with 1 if anything did not hold.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from tests.faults import checks
from tests.faults.faults import FAULTS
from tests.faults.rounds import Verdict, rigged
from tests.faults.steps import Taken, steer

Told = Callable[[Verdict], None]


async def soak(
    names: list[str], seconds: float, seed: int, folder: Path, console: Console, told: Told
) -> None:
    """Play these faults until the time is over, each once at least; those of a cluster then, in a fleet on one.

    Args:
        names: of the faults.
        seconds: shared by both kinds.
        seed: of their order from the second round on.
        folder: for logs and stores.
        console: has a line per fault.
        told: hears each verdict.
    """
    for cluster in (False, True):
        of = [name for name in names if FAULTS[name].cluster == cluster]
        if of:
            place = folder / ("cluster" if cluster else "server")
            place.mkdir()
            time_s = seconds * len(of) / len(names)
            await play(of, time_s, seed, place, console, told, cluster=cluster)


async def play(
    names: list[str], seconds: float, seed: int, folder: Path, console: Console, told: Told, *, cluster: bool
) -> None:
    """Play faults of one kind."""
    dice = random.Random(seed)
    played = 0
    began = time.monotonic()
    async with rigged(folder, cluster=cluster) as rig:
        console.print(
            f"a fleet runs after {time.monotonic() - began:.0f} s; its logs: {folder}", highlight=False
        )
        began = time.monotonic()
        coming: list[str] = []
        first: checks.Level | None = None
        while played < len(names) or time.monotonic() - began < seconds:
            if not coming:
                coming = dice.sample(names, len(names)) if played else names[::-1]
            verdict = await rig.play(FAULTS[coming.pop()])
            played += 1
            if played == len(names):
                first = rig.level
            elif first and rig.level:  # what leaks slowly is seen against the first round
                problems = [f"since the first round: {each}" for each in checks.grown(first, rig.level)]
                verdict.problems += problems
            console.print(f"{verdict.fault}: {'; '.join(verdict.problems) or 'all held'}", highlight=False)
            told(verdict)


def table(verdicts: list[Verdict]) -> Table:
    """One row per fault, the worst of its rounds."""
    shown = Table(title="faults, the worst of all rounds; seconds")
    shown.add_column("fault")
    for head in (
        "rounds", "lasted", "requests", "failed", "left", "tokens/s", "longest wait", "leader's age", "command",
        "frame", "table", "events dropped", "grown MiB", "problems",
    ):  # fmt: skip
        shown.add_column(head, justify="right")
    for name in dict.fromkeys(verdict.fault for verdict in verdicts):
        of = [verdict for verdict in verdicts if verdict.fault == name]
        worst = [
            max(verdict.seconds for verdict in of), sum(verdict.requests for verdict in of),
            sum(verdict.failed for verdict in of), sum(verdict.left for verdict in of),
            min(verdict.tokens_per_s for verdict in of), max(verdict.gap_s for verdict in of),
            max(verdict.leader_age_s for verdict in of), max(verdict.command_s for verdict in of),
            max(verdict.frame_s for verdict in of), max(verdict.table_s for verdict in of),
            sum(verdict.dropped for verdict in of),
            max(max(verdict.grown_mib.values(), default=0) for verdict in of),
            sum(len(verdict.problems) for verdict in of),
        ]  # fmt: skip
        shown.add_row(name, str(len(of)), *map(str, worst))
    return shown


def markdown(verdicts: list[Verdict]) -> str:
    """The same for a document, with what was done in words."""
    lines = [
        (
            "| fault | injected | requests | longest wait | tokens/s | command | frame | table | leader silent "
            "| events dropped |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in verdicts:
        ends = ", ".join(
            f"{count} {what}"
            for count, what in (
                (one.ended, "ended"),
                (one.failed, "told of the failure"),
                (one.left, "left"),
                (one.empty, "answered with nothing"),
            )
            if count
        )
        tokens = f"{one.tokens_per_s:.0f}" if one.seconds >= 1 else "–"
        recovery = " | ".join(f"{each:.1f}" for each in (one.command_s, one.frame_s, one.table_s))
        lines.append(
            f"| `{one.fault}` | {FAULTS[one.fault].what} | {ends} | {one.gap_s:.1f} | {tokens} "
            f"| {recovery} | {one.leader_age_s:.1f} | {one.dropped} |"
        )
    return "\n".join(lines)


def write(path: Path | None, began: float, verdicts: list[Verdict], runs: list[Taken]) -> None:
    """Write what is known so far, so that a run that is stopped or fails has not been for nothing."""
    if path is None:
        return
    result = {
        "python": platform.python_version(), "cores": len(os.sched_getaffinity(0)),
        "load": [round(each, 1) for each in os.getloadavg()], "seconds": round(time.monotonic() - began),
        "faults": msgspec.to_builtins(verdicts, str_keys=True),
        "steps_total": sum(run.steps for run in runs), "steps": msgspec.to_builtins(runs),
    }  # fmt: skip
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> int:
    """Play faults; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=0.0, help="how long; each fault once at least")
    parser.add_argument("--only", nargs="*", choices=list(FAULTS), metavar="NAME", help="these faults alone")
    parser.add_argument(
        "--steps", type=int, default=0, help="random steering steps on the checked device afterwards"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cores", type=int, default=0, help="for the random steps; without it all")
    parser.add_argument("--json", type=Path, help="written after each fault and each run of steps")
    parser.add_argument(
        "--markdown", type=Path, metavar="JSON", help="print the table of an earlier run and end"
    )
    parser.add_argument("--list", action="store_true", help="name the faults and end")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200)
    if options.list:
        for fault in FAULTS.values():
            console.print(
                f"{fault.name:20} {'short' if fault.short else '     '}  {fault.what}", highlight=False
            )
        return 0
    if options.markdown:
        earlier = msgspec.json.decode(options.markdown.read_bytes())["faults"]
        sys.stdout.write(markdown(msgspec.convert(earlier, list[Verdict], strict=False)) + "\n")
        return 0
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="cox-soak-"))
    names = list(FAULTS) if options.only is None else options.only
    verdicts: list[Verdict] = []
    report = partial(write, options.json, began, verdicts)
    runs: list[Taken] = []

    def told(verdict: Verdict) -> None:
        verdicts.append(verdict)
        report(runs)

    if names:
        asyncio.run(soak(names, options.seconds, options.seed, folder, console, told))
    if options.steps:
        runs = steer(options.steps, options.seed, console, cores=options.cores, told=report)
    if verdicts:
        console.print(table(verdicts))
    failed = [run for run in runs if run.problem]
    if runs:
        said = f"{len(failed)} failed" if failed else "all held"
        console.print(f"{sum(run.steps for run in runs):,} random steps in {len(runs)} runs, {said}")
    return int(bool(failed) or any(verdict.problems for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
