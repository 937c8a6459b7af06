"""What the policies are for, on the real scheduler in virtual time: quality, deadlines, two kinds of traffic.

    python -m bench.policies [--json PATH] [--suite quality|deadlines|colocate ...] [--policies fcfs,andes] [--short]
                             [--seed 7] [--load 1.0]
    python -m bench.policies --plot PNG --json PATH     # colocate's frontier from what was written there; matplotlib

Three suites beside those of `cox lab`, which has none for these. Traffic is fixed by its seed; every request is done,
but for those that a token bucket per tenant (`bucket60`: as many a minute) turns away: n and done say how many.
Parameters were chosen on the default seed and load (a factor on all rates): what others give is held out.

* quality: a burst at twice what the engine can do, then a load that it can; users read 4.8 tokens per second and
  expect the first after 1 s. The mean of their qualities of experience (`control.qoe`).
* deadlines: classes whose first token is due in 20 s, in a minute, in an hour, more than the engine can do at once.
  The part of requests whose first token came in time.
* colocate: interactive requests over as much batch work as fits. First-token latency of the interactive ones, with
  and without batch; and what batch was served, per second.
"""

import argparse
import json
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from coxswain.control.estimates.qoe import quality
from coxswain.lab.devices import DEVICES, Device
from coxswain.lab.experiment import run
from coxswain.lab.life import Life
from coxswain.lab.setup import Setup, Tables
from coxswain.lab.trace import Arrival
from coxswain.schemas.policy import ClassPolicy, TenantPolicy

READING: Final = 4.8
TTFT_S: Final = 1.0
WARM_UP_S: Final = 10.0
"""Of `colocate`: before the first interactive request is there, batch fills the engine, and rightly so."""


def device(slots: int, kv_tokens: int) -> Device:
    """An A10G with a 7B model, with so many slots and so much KV (on a larger card, in 8 bits, or with GQA)."""
    preset = DEVICES["a10g-7b"].preset
    return Device(preset=msgspec.structs.replace(preset, max_num_seqs=slots, kv_tokens=kv_tokens))


class Traffic(NamedTuple):
    """How much of a suite's traffic: part of its length, seed, factor on its rates."""

    scale: float = 1.0
    seed: int = 7
    load: float = 1.0


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A suite: its traffic, engine and tables, and what is reported."""

    arrivals: tuple[Arrival, ...]
    device: Device
    tables: Tables
    policies: tuple[str, ...]
    report: Callable[[Sequence[Life]], dict[str, float]]


def poisson(
    draw: random.Random,
    rate: Callable[[float], float],
    most: float,
    until_s: float,
    make: Callable[[float], Arrival],
) -> list[Arrival]:
    """Arrivals of a Poisson process whose rate, at most `most` per second, changes with time (by thinning)."""
    at_s, found = 0.0, []
    while (at_s := at_s + draw.expovariate(most)) < until_s:
        if draw.random() < rate(at_s) / most:
            found.append(make(at_s))
    return found


def quality_case(traffic: Traffic) -> Case:
    """A burst of 26 s at nearly twice what the engine can do, then nine tenths of it: under fcfs the backlog stays."""
    draw, load = random.Random(traffic.seed), traffic.load

    def make(at_s: float) -> Arrival:
        return Arrival(
            at_s=at_s, tenant="a", prompt_tokens=draw.randint(64, 192), output_tokens=draw.randint(32, 96)
        )

    arrivals = poisson(
        draw, lambda at: load * (23.0 if at < 26 else 9.7), load * 23.0, 26 + 100 * traffic.scale, make
    )
    return Case(
        arrivals=tuple(arrivals), device=device(32, 60_000), tables=Tables(),
        policies=("fcfs", "bucket600", "vtc", "andes"), report=_quality,
    )  # fmt: skip


def _quality(lives: Sequence[Life]) -> dict[str, float]:
    # Who is turned away has no experience to speak of.
    values = [quality(_tokens_at(life), ttft_s=TTFT_S, speed=READING) if life.done else 0.0 for life in lives]
    return {
        "mean_qoe": statistics.mean(values),
        "qoe_at_least_0.95": sum(value >= 0.95 for value in values) / len(values),
        "ttft_p50_s": statistics.median(life.ttft_s or 0.0 for life in lives if life.done),
    }


def _tokens_at(life: Life) -> list[float]:
    """When each token came after the arrival: the first is known, the rest evenly over the time that it ran since."""
    assert life.first_token_s is not None
    assert life.finished_s is not None
    ran = [
        (max(begin, life.first_token_s), min(end, life.finished_s))
        for begin, end, state in life.spans()
        if state == "running" and end > life.first_token_s
    ]
    total, count = sum(end - begin for begin, end in ran), life.tokens - 1
    times, done = [life.first_token_s], 0.0
    for begin, end in ran:
        while len(times) <= count and (at := len(times) * total / count) <= done + end - begin + 1e-9:
            times.append(begin + at - done)
        done += end - begin
    times += [life.finished_s] * (life.tokens - len(times))
    return [at - life.arrival.at_s for at in times]


def deadlines_case(traffic: Traffic) -> Case:
    """Three classes in equal parts, and for two minutes two and a half times what the engine can do."""
    draw, load = random.Random(traffic.seed), traffic.load
    slos = {"urgent": 20.0, "soon": 60.0, "later": 3_600.0}

    def make(at_s: float) -> Arrival:
        name = draw.choice(list(slos))
        lengths = {"prompt_tokens": draw.randint(64, 192), "output_tokens": draw.randint(128, 384)}
        return Arrival(at_s=at_s, tenant=name, class_=name, slo_s=slos[name], **lengths)

    arrivals = poisson(draw, lambda _: load * 7.8, load * 7.8, 120 * traffic.scale, make)
    classes = {name: ClassPolicy(slo_s=slo_s) for name, slo_s in slos.items()}
    tenants = {name: TenantPolicy(class_=name) for name in slos}
    return Case(
        arrivals=tuple(arrivals), device=device(32, 30_000), tables=Tables(classes, tenants),
        policies=("fcfs", "bucket60", "strict", "edf"), report=_deadlines,
    )  # fmt: skip


def _deadlines(lives: Sequence[Life]) -> dict[str, float]:
    def attained(some: Sequence[Life]) -> float:
        return sum((life.ttft_s or 1e9) <= (life.arrival.slo_s or 1e9) for life in some) / len(some)

    names = dict.fromkeys(life.arrival.class_ for life in lives)
    return {"attained": attained(lives)} | {
        f"attained_{name}": attained([life for life in lives if life.arrival.class_ == name])
        for name in names
    }


def colocate_case(traffic: Traffic, *, batch: bool = True) -> Case:
    """Interactive requests at a third of what the engine can do, over batch with long prompts."""
    draw, load = random.Random(traffic.seed), traffic.load

    def chat(at_s: float) -> Arrival:
        lengths = {"prompt_tokens": draw.randint(64, 192), "output_tokens": draw.randint(64, 192)}
        return Arrival(at_s=at_s, tenant="chat", class_="chat", **lengths)

    arrivals = poisson(draw, lambda _: load, load, 200 * traffic.scale, chat)
    if batch:
        arrivals += [
            Arrival(at_s=0.0, tenant="bulk", class_="bulk", prompt_tokens=1_500, output_tokens=150)
            for _ in range(int(300 * traffic.scale))
        ]
    classes = {"chat": ClassPolicy(position=0), "bulk": ClassPolicy(position=10)}
    tenants = {name: TenantPolicy(class_=name) for name in classes}
    return Case(
        arrivals=tuple(sorted(arrivals, key=lambda each: each.at_s)), device=device(32, 30_000),
        tables=Tables(classes, tenants),
        policies=("fcfs", "bucket60", "strict", "colocate", "colocate:prefill_tokens=32"),
        report=lambda lives: _colocate(lives, 200 * traffic.scale),
    )  # fmt: skip


def _colocate(lives: Sequence[Life], until_s: float) -> dict[str, float]:
    chat = [
        life.ttft_s or 0.0
        for life in lives
        if life.arrival.class_ == "chat" and life.arrival.at_s >= WARM_UP_S and life.done
    ]
    bulk = [
        life.arrival.cost
        for life in lives
        if life.arrival.class_ == "bulk" and (life.finished_s or 1e9) <= until_s
    ]
    centiles = statistics.quantiles(chat, n=100)
    return {"ttft_p50_s": centiles[49], "ttft_p99_s": centiles[98], "batch_per_s": sum(bulk) / until_s}


def alone_case(traffic: Traffic) -> Case:
    """The interactive requests of `colocate` without batch."""
    return msgspec.structs.replace(colocate_case(traffic, batch=False), policies=("fcfs",))


CASES: Final[Mapping[str, Callable[[Traffic], Case]]] = {
    "quality": quality_case,
    "deadlines": deadlines_case,
    "alone": alone_case,
    "colocate": colocate_case,
}


def plot(results: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """First-token latency of the interactive requests against what batch was served meanwhile, per policy."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    (alone,) = results["alone"]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for key, colour, marker in (("ttft_p50_s", "tab:blue", "o"), ("ttft_p99_s", "tab:orange", "s")):
        name = key.split("_")[1]
        some = results["colocate"]
        at = [row["batch_per_s"] for row in some]
        axes.scatter(at, [1e3 * row[key] for row in some], color=colour, marker=marker, label=name)
        axes.axhline(1e3 * alone[key], color=colour, linewidth=0.8, linestyle=":", label=f"{name} alone")
    for row in results["colocate"]:
        text = row["policy"].replace("prefill_tokens=", "")
        axes.annotate(text, (row["batch_per_s"], 1e3 * row["ttft_p50_s"]), fontsize=7, rotation=30)
    axes.axhline(
        1.25e3 * alone["ttft_p50_s"], color="grey", linewidth=0.8, linestyle="--", label="1.25 × p50 alone"
    )
    axes.set_yscale("log")
    axes.set_xlabel("batch served (weighted tokens per second)")
    axes.set_ylabel("time to first token of interactive requests (ms)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def measure(case: Case, policy: str) -> dict[str, Any]:
    """One run: what it reports, and what must hold in every one."""
    name, *settings = policy.split(":")
    setup = Setup(policy=name, settings=tuple(settings), device=case.device, tables=case.tables)
    outcome = run(case.arrivals, setup)
    done = sum(life.done for life in outcome.lives)
    assert all(begin <= end for life in outcome.lives for begin, end in pairwise(at for at, _ in life.states))
    return {
        "policy": policy, "n": len(outcome.lives), "done": done,
        **{key: round(value, 4) for key, value in case.report(outcome.lives).items()},
        "total_s": round(outcome.virtual_s, 1), "commands": outcome.commands, "rejected": outcome.rejected,
        "preempted": sum(life.preempted for life in outcome.lives), "wall_s": round(outcome.wall_s, 1),
    }  # fmt: skip


def main() -> None:
    """Run suites."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--suite", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--policies", help="comma-separated, instead of the suite's own")
    parser.add_argument("--short", action="store_true", help="a quarter of the traffic")
    parser.add_argument("--seed", type=int, default=Traffic().seed)
    parser.add_argument("--load", type=float, default=Traffic().load)
    parser.add_argument("--plot", type=Path, help="draw what is in --json instead of measuring")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(options.json.read_text()), options.plot)
        return
    traffic = Traffic(0.25 if options.short else 1.0, options.seed, options.load)
    results: dict[str, list[dict[str, Any]]] = {}
    for suite in options.suite:
        case = CASES[suite](traffic)
        for policy in options.policies.split(",") if options.policies else case.policies:
            result = measure(case, policy)
            results.setdefault(suite, []).append(result)
            print(suite, json.dumps(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
