"""`cox lab`: policies on the real scheduler in virtual time. Options and their words; what they do is `coxswain.lab`.

That package needs vLLM and is imported when a command is called, so that `cox` works and starts without it.
"""

import importlib
import logging
import os
import re
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from coxswain.control.cli import parse
from coxswain.control.cli.app import Cox, option
from coxswain.control.cli.exits import CliError, Exit

ALL: Final = "all"
MISSING: Final = "the lab runs vLLM's scheduler: pip install '.[cpu,lab]' (or '.[gpu,lab]') in a checkout"


def _policy(text: str) -> tuple[str, tuple[str, ...]]:
    """A policy and its settings, `vtc:wq=2:wp=1`."""
    name, *settings = text.strip().split(":")
    if not name:
        raise ValueError(f"{text!r} names no policy: write for example vtc, or vtc:wq=2")
    return name, tuple(settings)


def _policies(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Policies, comma-separated."""
    return tuple(_policy(part) for part in text.split(","))


def _outage(text: str) -> tuple[float, float]:
    """`AT+FOR`, two durations: `2m+30s`."""
    at, plus, length = text.partition("+")
    if not plus:
        raise ValueError(f"{text!r} is not an outage: write when and for how long, for example 2m+30s")
    return parse.duration_s(at), parse.positive_duration_s(length)


def _part(text: str) -> float:
    """A part of a whole, 0 to 1, or a percentage."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value < 1:
        raise ValueError(f"{text!r} is not a share from 0 to below 1: write for example 0.01 or 1%")
    return value


SuiteName = Annotated[
    str, typer.Option("--suite", metavar="NAME", help="A suite of traffic: see `cox lab suites`.")
]
SuiteNames = Annotated[
    str,
    typer.Option("--suite", metavar="NAMES", help="Suites, comma-separated, or `all`: see `cox lab suites`."),
]
Trace = Annotated[
    Path | None,
    typer.Option("--trace", metavar="CSV", help="Traffic from a file, or the file that the suite needs."),
]
Device = Annotated[
    str, typer.Option(metavar="NAME", help="Source of step times. Empty: the suite's, or a10g-7b.")
]
Admission = Annotated[
    str,
    typer.Option(
        metavar="MODE",
        help="reserve: a request enters if all its output is sure to fit, as in VTC's implementation; "
        "vllm: if its prompt fits, as in vLLM. Empty: the suite's, or vllm.",
    ),
]
Workers = Annotated[int, typer.Option(metavar="N", min=1, max=1_000, help="How many engines.")]
Route = Annotated[
    str,
    typer.Option(
        metavar="HOW", help="Requests go to the least loaded worker (least), round, random, or skewed."
    ),
]
Cadence = Annotated[
    Any,
    typer.Option(
        metavar="DURATION", parser=option(parse.cadence_s), help="Time between two decisions: 10ms to 1s."
    ),
]
Latency = Annotated[
    Any,
    typer.Option(metavar="DURATION", parser=option(parse.duration_s), help="Delay of a message, each way."),
]
Loss = Annotated[
    Any, typer.Option(metavar="PART", parser=option(_part), help="Share of messages that never arrive: 1%.")
]
OutageList = Annotated[
    list[str] | None,
    typer.Option(
        "--outage",
        metavar="AT+FOR",
        help="The controller dies AT and its successor starts FOR later; repeatable: 2m+30s.",
    ),
]
Weights = Annotated[
    list[str] | None, typer.Option("--weight", metavar="TENANT=WEIGHT", help="A tenant's weight; repeatable.")
]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of losses and routes.")]
Seeds = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        max=100,
        help="Run everything N times, on devices from 2 % faster to 2 % slower, and show medians.",
    ),
]
TrafficSeed = Annotated[
    int | None,
    typer.Option(metavar="N", show_default=False, help="Seed of a suite's traffic; by default its authors'."),
]
Plots = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", show_default=False, help="Write plots, and a page that shows them, to this folder."
    ),
]
Requests = Annotated[
    Path | None,
    typer.Option(metavar="CSV", show_default=False, help="Write the outcome of every request to this file."),
]


def suites(cox: Cox) -> None:
    """List the named suites of traffic, and the figures published for them."""
    _lab().list_suites(cox)


def run(
    cox: Cox,
    suite: SuiteName = "",
    trace: Trace = None,
    policy: Annotated[
        str, typer.Option(metavar="NAME", help="The policy, with settings: vtc, vtc:wq=2.")
    ] = "vtc",
    device: Device = "",
    admission: Admission = "",
    workers: Workers = 1,
    route: Route = "least",
    cadence: Cadence = "50ms",
    latency: Latency = "10ms",
    loss: Loss = "0",
    outage: OutageList = None,
    weight: Weights = None,
    seed: Seed = 0,
    traffic_seed: TrafficSeed = None,
    plots: Plots = None,
    requests: Requests = None,
) -> int:
    """Run one policy on one suite or trace: figures as VTC's authors define them, and every tenant's latency.

    Policies: any that is installed; vLLM's own as stock-fcfs and stock-priority; and rpm20 (or another number),
    which refuses what a tenant sends beyond 20 requests a minute.
    """
    given = {
        key: value
        for key, value in locals().items()
        if key not in ("cox", "suite", "policy", "plots", "requests")
    }
    asked = _asked(suites=suite, policies=policy, plots=plots, requests=requests, **given)
    if len(asked.suites) > 1 or len(asked.policies) > 1:
        raise CliError(Exit.USAGE, "`run` takes one suite and one policy; `cox lab compare` takes several")
    return int(_lab().run(cox, asked))


def compare(
    cox: Cox,
    suite: SuiteNames = "",
    trace: Trace = None,
    policies: Annotated[
        str, typer.Option(metavar="NAMES", help="Policies, comma-separated: fcfs,vtc,rpm20.")
    ] = "fcfs,vtc",
    device: Device = "",
    admission: Admission = "",
    workers: Workers = 1,
    route: Route = "least",
    cadence: Cadence = "50ms",
    latency: Latency = "10ms",
    loss: Loss = "0",
    outage: OutageList = None,
    weight: Weights = None,
    seed: Seed = 0,
    seeds: Seeds = 1,
    traffic_seed: TrafficSeed = None,
    plots: Plots = None,
) -> int:
    """Run several policies on the same traffic, and show them beside each other and beside published figures."""
    given = {
        key: value for key, value in locals().items() if key not in ("cox", "suite", "policies", "plots")
    }
    asked = _asked(suites=suite, policies=policies, plots=plots, requests=None, **given)
    return int(_lab().compare(cox, asked))


def _asked(*, suites: str, policies: str, **given: Any) -> Any:
    """The options as `coxswain.lab` wants them.

    Raises:
        CliError: one of them says nothing that can be run.
    """
    setup, named, devices = _lab("setup"), _lab("suites", "SUITES"), _lab("devices", "DEVICES")
    names = (
        tuple(named) if suites == ALL else tuple(name.strip() for name in suites.split(",") if name.strip())
    )
    if not names and given["trace"] is None:
        raise CliError(Exit.USAGE, f"no traffic: give --suite NAME ({', '.join(named)}) or --trace CSV")
    for what, value, known in (
        *(("suite", name, named) for name in names),
        ("device", given["device"] or None, devices),
        ("admission", given["admission"] or None, setup.Admission.__args__),
        ("route", given["route"], setup.Route.__args__),
    ):
        if value is not None and value not in known:
            raise CliError(Exit.USAGE, f"no {what} {value!r}: one of {', '.join(known)}")
    try:
        return _lab("command").Asked(
            suites=names,
            trace=given["trace"],
            policies=_policies(policies),
            device=given["device"] or None,
            admission=given["admission"] or None,
            workers=given["workers"],
            route=given["route"],
            cadence_s=given["cadence"],
            latency_s=given["latency"],
            loss=given["loss"],
            outages=tuple(_outage(text) for text in given["outage"] or ()),
            weights=dict(parse.tenant_weight(text) for text in given["weight"] or ()),
            seed=given["seed"],
            seeds=given.get("seeds", 1),
            traffic_seed=given["traffic_seed"],
            plots=given["plots"],
            requests=given["requests"],
        )
    except ValueError as error:
        raise CliError(Exit.USAGE, str(error)) from error


def _lab(module: str = "command", name: str = "") -> Any:
    """A module of the laboratory, or something in it.

    Raises:
        CliError: what it needs is not installed.
    """
    # What vLLM and our engine side say at start is for whoever runs a worker.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    os.environ.setdefault("COX_LOG_LEVEL", "warning")
    try:
        found = importlib.import_module(f"coxswain.lab.{module}")
    except ModuleNotFoundError as error:
        raise CliError(Exit.USAGE, f"{MISSING} (module {error.name} was not found)") from error
    return getattr(found, name) if name else found
