"""VTC's evaluation on our scheduler: every suite, every policy, in virtual time.

    COX_TRACES=FOLDER python -m bench.vtc --json PATH [--suite overload real ...] [--side vtc fill ...] [--devices 5]
    python -m bench.vtc --table --json PATH      # Markdown from what is written there; measures nothing

Suites and figures are those of `cox lab` (docs/lab.md): service differences as VTC's authors define them, beside what
they published; and how far backlogged tenants came apart, beside the 2U of their theorem 4.4. The file has a row per
run and is written after each; what is in it is not run again, so a run that was cut short goes on. Runs are the same
each time, and so is the file, whatever the machine. `real` needs a trace file (docs/lab.md).

`--devices 5` runs on five devices, evenly between 2 % faster and 2 % slower: figures of `real` move with small causes.
`--pace 0.9` runs on a device on which each step takes nine tenths of the time: what a side that serves more is to be
held against. `--workers 4` runs on so many workers with as much traffic for each: suites are made with as many seeds.
`--seed 11` makes the traffic with another seed. Such rows are in the file, and not in the tables.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest.mock import patch

import msgspec

from coxswain.lab.bound import Gap, gap
from coxswain.lab.command import seeded
from coxswain.lab.devices import DEVICES, Device
from coxswain.lab.experiment import run
from coxswain.lab.life import Life
from coxswain.lab.metrics import measure
from coxswain.lab.published import peer
from coxswain.lab.report import between
from coxswain.lab.setup import Admission, Setup
from coxswain.lab.suites import SEED, SUITES, Suite
from coxswain.lab.trace import Arrival, ordered, tenants
from coxswain.service.scheduler.victims import Victims

DIGITS: Final = 3


class Side(NamedTuple):
    """A policy and how requests enter."""

    policy: str
    admission: Admission | None = None
    """None: the suite's own, which is `reserve` in all of VTC's."""
    latest: bool = False
    """Whether vLLM preempts who arrived last, as it does without us, and not of the tenant that has had most."""


SIDES: Final = {
    "vtc": Side("vtc"),
    "predict": Side("vtc:predict=average"),
    "oracle": Side("vtc-oracle"),
    "fcfs": Side("fcfs"),
    "bucket": Side("bucket20"),
    "latest": Side("vtc", "vllm", latest=True),
    "share": Side("vtc", "vllm"),
    "fill": Side("vtc:fill=0.75", "vllm"),
    "vllm-predict": Side("vtc:predict=average", "vllm"),
    "vllm-oracle": Side("vtc-oracle", "vllm"),
    "fill65": Side("vtc:fill=0.65", "vllm"),
    "fill85": Side("vtc:fill=0.85", "vllm"),
    "preempt": Side("vtc:preempt_gap=2000", "vllm"),
}
SEEDED: Final = tuple(name for name in SIDES if name not in ("oracle", "fcfs", "bucket", "vllm-oracle"))
"""What `--devices` repeats."""
OF_FCFS: Final = ("overload-fcfs", "poisson_short_long_2-fcfs")
"""Longer or shorter only because FCFS was published so: nothing else is run on them."""

Row = dict[str, Any]


def sides_of(suite: Suite, asked: Sequence[str]) -> list[str]:
    """Those of the asked that say something on a suite."""
    if suite.name in OF_FCFS:
        return [name for name in asked if name == "fcfs"]
    return [name for name in asked if SIDES[name] != Side("vtc", suite.admission)]


def device_of(suite: Suite, number: int, devices: int, pace: float) -> Device:
    """The suite's, or another of `devices`; every step takes `pace` times as long."""
    device = (
        seeded(Setup(device=DEVICES[suite.device]), number, devices).device
        if number
        else DEVICES[suite.device]
    )
    return msgspec.structs.replace(device, pace=device.pace * pace)


def traffic(suite: Suite, workers: int, seed: int) -> tuple[Arrival, ...]:
    """The suite's; for several workers that of as many seeds, together."""
    return ordered([each for more in range(workers) for each in suite.arrivals(seed=seed + more)])


def measured(suite: Suite, name: str, device: Device, workers: int = 1, seed: int = SEED) -> Row:
    """One run."""
    arrivals = traffic(suite, workers, seed)
    side = SIDES[name]
    policy, *settings = side.policy.split(":")
    setup = Setup(
        policy=policy, settings=tuple(settings), device=device, tables=suite.tables,
        admission=side.admission or suite.admission, workers=workers, route="random",
    )  # fmt: skip
    with patch.object(Victims, "mark", lambda _: None) if side.latest else nullcontext():
        outcome = run(arrivals, setup)
    metrics, apart = measure(outcome.lives), gap(outcome.lives, setup)
    theirs = peer(suite.name, side.policy) if side.admission is None and workers == 1 else None
    row = {
        "suite": suite.name, "side": name, "policy": side.policy, "admission": setup.admission,
        "device": suite.device, "pace": setup.device.pace, "workers": workers, "seed": seed,
        "tenants": len(tenants(arrivals)), "metrics": metrics, "gap": apart,
        "alone": _alone(outcome.lives, setup) if workers > 1 else None,
        "commands": outcome.commands, "rejected": outcome.rejected,
        "published": theirs and {"name": theirs[0], **theirs[1]._asdict()},
    }  # fmt: skip
    plain: Row = _rounded(msgspec.to_builtins(row))
    return plain


def _alone(lives: Sequence[Life], setup: Setup) -> Gap:
    """How far tenants came apart on one worker, beside that worker's own bound: where they did most."""
    setup = msgspec.structs.replace(setup, workers=1)
    on = {life.worker: [each for each in lives if each.worker == life.worker] for life in lives}
    return max((gap(some, setup) for some in on.values()), key=lambda found: found.most)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def key(row: Row) -> tuple[str, str, float, int, int]:
    """What makes a row another one."""
    return row["suite"], row["side"], row["pace"], row["workers"], row["seed"]


def wanted(suites: Iterable[str], sides: Sequence[str], devices: int) -> Iterable[tuple[Suite, str, int]]:
    """Suite, side and number of the device of every run that is asked for."""
    for name in suites:
        suite = SUITES[name]
        for side in sides_of(suite, sides):
            for number in range(devices if side in SEEDED else 1):
                yield suite, side, number


def tables(rows: Sequence[Row]) -> str:
    """Markdown: a line per suite and a column per side, for each figure; then `real` over devices."""
    rows = [row for row in rows if row["workers"] == 1 and row["seed"] == SEED]
    plain = [row for row in rows if row["pace"] == 1.0]
    parts = [
        ("service difference, maximum / average (published), weighted tokens/s", _differences),
        ("tokens/s; of how many done, if not all", _throughput),
        ("backlogged tenants apart, most, as a part of 2U", _apart),
    ]
    text = [f"{title}\n\n{_matrix(plain, cell)}" for title, cell in parts]
    weighted = [row for row in rows if SUITES[row["suite"]].tables.tenants]
    text.append(f"backlogged tenants apart, most, weighted tokens ÷ weight\n\n{_for_their_weight(weighted)}")
    return "\n\n".join([*text, f"real over devices\n\n{_over_devices(rows)}"])


def _matrix(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    sides = [name for name in SIDES if any(row["side"] == name for row in rows)]
    lines = ["| suite | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
    for suite in SUITES:
        found = {row["side"]: row for row in rows if row["suite"] == suite}
        if found:
            cells = (cell(found[side]) if side in found else "" for side in sides)
            lines.append(f"| {suite} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _differences(row: Row) -> str:
    ours, theirs = (
        each and f"{each['max_diff']:.1f} / {each['avg_diff']:.1f}"
        for each in (row["metrics"], row["published"])
    )
    return f"{ours} ({theirs})" if theirs else f"{ours}"


def _throughput(row: Row) -> str:
    metrics = row["metrics"]
    done = "" if metrics["done"] == metrics["n"] else f", {metrics['done']:,} of {metrics['n']:,}"
    return f"{metrics['throughput']:.0f}{done}"


def _apart(row: Row) -> str:
    apart = row["gap"]
    return "–" if apart["between"] is None else f"{apart['most'] / apart['bound']:.2f}"


def _for_their_weight(rows: Sequence[Row]) -> str:
    """What VTC's own measure, which knows no weights, does not say of suites with weights."""
    lines = ["| suite | side | steps so many times as long | apart | tokens/s |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['suite']} | {row['side']} | {row['pace']:g} | {row['gap']['most']:,.0f} | {_throughput(row)} |"
        for row in rows
    ]
    return "\n".join(lines)


def _over_devices(rows: Sequence[Row]) -> str:
    lines = ["| side | devices | maximum | average | tokens/s | lost their KV |", "|---|---|---|---|---|---|"]
    for side in SEEDED:
        some = [row["metrics"] for row in rows if (row["suite"], row["side"]) == ("real", side)]
        if some:
            cells = [
                between([each[name] for each in some], digits)
                for name, digits in (("max_diff", 0), ("avg_diff", 0), ("throughput", 0), ("preempted", 0))
            ]
            lines.append(f"| `{SIDES[side].policy}` ({side}) | {len(some)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--suite", nargs="*", choices=SUITES, default=list(SUITES))
    parser.add_argument("--side", nargs="*", choices=SIDES, default=list(SIDES))
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--pace", type=float, default=1.0, help="how much longer each step takes than usual")
    parser.add_argument("--workers", type=int, default=1, help="so many, with as many times the traffic")
    parser.add_argument(
        "--seed", type=int, default=SEED, help="of the traffic, where it is made; the authors'"
    )
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    rows: list[Row] = json.loads(options.json.read_text()) if options.json.exists() else []
    if options.table:
        print(tables(rows))
        return
    order = {name: place for place, name in enumerate([*SUITES, *SIDES])}
    for suite, side, number in wanted(options.suite, options.side, options.devices):
        device = device_of(suite, number, options.devices, options.pace)
        if (suite.name, side, round(device.pace, DIGITS), options.workers, options.seed) in map(key, rows):
            continue
        row = measured(suite, side, device, options.workers, options.seed)
        rows.append(row)
        rows.sort(key=lambda each: (order[each["suite"]], order[each["side"]], abs(each["pace"] - 1.0)))
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
        print(suite.name, side, _differences(row), _throughput(row), _apart(row), flush=True)


if __name__ == "__main__":
    main()
