"""What `cox lab` does: runs setups, shows what came of them, writes files. The words and options are the CLI's.

`compare` with several seeds runs every policy that many times, each time on a device that is a little faster or slower,
the same for all policies: where a small cause moves a figure, only what holds for most of them says anything.

Called by `control.cli.lab` alone, with options already checked for their form.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from coxswain.control.cli.app import Cox
from coxswain.control.cli.exits import CliError, Exit
from coxswain.control.policy import Tables
from coxswain.lab import report
from coxswain.lab.bound import gap
from coxswain.lab.devices import DEVICES
from coxswain.lab.experiment import Outcome, StuckError, chosen
from coxswain.lab.experiment import run as run_one
from coxswain.lab.life import Life
from coxswain.lab.metrics import Metrics, measure
from coxswain.lab.published import VTC, peer
from coxswain.lab.setup import Setup
from coxswain.lab.suites import SUITES, Suite
from coxswain.lab.trace import Arrival, TraceError, read, slos, tenants
from coxswain.schemas.policy import ClassPolicy, TenantPolicy

SPREAD: Final = 0.02
"""How much faster or slower the device is at most with another seed; the seeds lie evenly between."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `run` and `compare`; None is not given, and then the suite's own or the default holds."""

    suites: tuple[str, ...]
    trace: Path | None
    policies: tuple[tuple[str, tuple[str, ...]], ...]
    """Name and settings of each."""
    device: str | None
    admission: str | None
    workers: int
    route: str
    cadence_s: float
    latency_s: float
    loss: float
    outages: tuple[tuple[float, float], ...]
    weights: Mapping[str, float]
    seed: int
    seeds: int = 1
    """How often `compare` runs every policy."""
    traffic_seed: int | None
    plots: Path | None = None
    requests: Path | None = None


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One traffic with everything but a policy."""

    name: str
    arrivals: tuple[Arrival, ...]
    setup: Setup


def list_suites(cox: Cox) -> None:
    """Show every suite, and what was published of it."""
    listed: list[tuple[Suite, int | None, int | None, Sequence[str]]] = []
    for suite in SUITES.values():
        try:
            arrivals = suite.arrivals()
        except TraceError:
            n = who = None
        else:
            n, who = len(arrivals), len(tenants(arrivals))
        listed.append((suite, n, who, tuple(VTC.get(suite.name, {}))))
    cox.say(report.suites(listed, cox.out.width))
    cox.emit(
        [
            {"suite": suite.name, "n": n, "tenants": who, "published": published, "what": suite.what}
            for suite, n, who, published in listed
        ]
    )


def run(cox: Cox, asked: Asked) -> Exit:
    """Run one policy on one suite and show what came of it."""
    (case,) = _cases(asked)
    _check(asked)
    ((policy, settings),) = asked.policies
    setup = msgspec.structs.replace(case.setup, policy=policy, settings=settings)
    outcome = _run(cox, case, setup)
    metrics = measure(outcome.lives)
    label = _label(policy, settings)
    theirs, title = peer(case.name, label), f"{case.name}, {label}"
    cox.say(report.heading(title, setup, outcome))
    published = {label: theirs} if theirs else {}
    cox.say(report.comparison([(label, metrics, outcome)], published, cox.out.width))
    cox.say(report.gaps({label: gap(outcome.lives, setup)}, cox.out.width))
    cox.say("")
    cox.say(report.tenants(outcome.lives, metrics, cox.out.width))
    cox.emit(_document(case, [(policy, settings, metrics, outcome)])[0])
    if asked.requests is not None:
        _write_requests(asked.requests, outcome.lives)
        cox.say(f"{asked.requests}: every request")
    if asked.plots is not None:
        for path in _draw(outcome.lives, title, asked.plots):
            cox.say(str(path))
    return Exit.DONE


def compare(cox: Cox, asked: Asked) -> Exit:
    """Run every policy on every suite, and show them beside each other and what was published."""
    documents, cases = [], _cases(asked)
    drawings: list[tuple[Sequence[Life], str, Path]] = []
    _check(asked)
    for case in cases:
        runs = []
        for policy, settings in asked.policies:
            setup = msgspec.structs.replace(case.setup, policy=policy, settings=settings)
            outcome = _run(cox, case, setup)
            runs.append((policy, settings, measure(outcome.lives), outcome))
            if asked.plots is not None:
                label = _label(policy, settings)
                folder = asked.plots / case.name / label.replace(":", "-")
                drawings.append((outcome.lives, f"{case.name}, {label}", folder))
        labelled = [
            (_label(policy, settings), metrics, outcome) for policy, settings, metrics, outcome in runs
        ]
        theirs = {
            _label(policy, settings): row
            for policy, settings, _, _ in runs
            if (row := peer(case.name, _label(policy, settings)))
        }
        cox.say(report.heading(case.name, case.setup, None))
        cox.say(report.comparison(labelled, theirs, cox.out.width))
        cox.say(
            report.gaps(
                {label: gap(outcome.lives, case.setup) for label, _, outcome in labelled}, cox.out.width
            )
        )
        cox.say("")
        documents += _document(case, runs)
        if asked.seeds > 1:
            documents += _again(cox, case, asked, [metrics for _, metrics, _ in labelled])
    cox.emit(documents)
    for drawing in drawings:
        _draw(*drawing)
    return Exit.DONE


def _again(cox: Cox, case: Case, asked: Asked, first: Sequence[Metrics]) -> list[dict[str, Any]]:
    """Run everything again with the other seeds; show medians and ranges, beside the first policy with each seed."""
    runs = {_label(*each): [metrics] for each, metrics in zip(asked.policies, first, strict=True)}
    documents = []
    for number in range(1, asked.seeds):
        setup = seeded(case.setup, number, asked.seeds)
        for policy, settings in asked.policies:
            outcome = _run(cox, case, msgspec.structs.replace(setup, policy=policy, settings=settings))
            metrics = measure(outcome.lives)
            runs[_label(policy, settings)].append(metrics)
            of_seed = msgspec.structs.replace(case, setup=setup)
            documents += _document(of_seed, [(policy, settings, metrics, outcome)])
    cox.say(report.heading(f"{case.name}, {asked.seeds} seeds: median [least … most]", case.setup, None))
    cox.say(report.seeds(runs, cox.out.width))
    cox.say("")
    return documents


def seeded(setup: Setup, number: int, seeds: int) -> Setup:
    """The setup with this seed more: other losses and routes, and a device faster or slower, in turns, to `SPREAD`."""
    pace = 1.0 + (-1) ** number * SPREAD * ((number + 1) // 2) / (seeds // 2)
    device = msgspec.structs.replace(setup.device, pace=pace)
    return msgspec.structs.replace(setup, device=device, seed=setup.seed + number)


# What is to be run


def _cases(asked: Asked) -> list[Case]:
    try:
        if asked.trace is not None and not (asked.suites and set(asked.suites) <= _read_from_files()):
            return [_case(asked, None)]
        return [_case(asked, SUITES[name]) for name in asked.suites]
    except TraceError as error:
        raise CliError(Exit.USAGE, str(error)) from error


def _read_from_files() -> set[str]:
    return {name for name, suite in SUITES.items() if suite.file}


def _case(asked: Asked, suite: Suite | None) -> Case:
    if suite is None:
        assert asked.trace is not None, "a case is of a suite or of a trace"
        arrivals, name, defaults = read(asked.trace), asked.trace.stem, Setup()
        device, admission = asked.device or "a10g-7b", asked.admission or defaults.admission
    else:
        seed = {} if asked.traffic_seed is None else {"seed": asked.traffic_seed}
        arrivals, name = suite.arrivals(path=asked.trace, **seed), suite.name
        device, admission = asked.device or suite.device, asked.admission or suite.admission
    tables = _tables(arrivals, suite.tables if suite else Tables(), asked.weights)
    setup = msgspec.convert(
        {
            "admission": admission, "workers": asked.workers, "route": asked.route, "cadence_s": asked.cadence_s,
            "latency_s": asked.latency_s, "loss": asked.loss, "outages": asked.outages, "seed": asked.seed,
        },
        Setup,
    )  # fmt: skip
    return Case(
        name=name,
        arrivals=arrivals,
        setup=msgspec.structs.replace(setup, device=DEVICES[device], tables=tables),
    )


def _tables(arrivals: Sequence[Arrival], own: Tables, weights: Mapping[str, float]) -> Tables:
    """The suite's tables, with the weights that were asked for and a row for every class of the trace.

    Raises:
        TraceError: the trace gives a class two SLOs.
    """
    rows = dict(own.tenants)
    for tenant, weight in weights.items():
        rows[tenant] = msgspec.structs.replace(rows.get(tenant, TenantPolicy()), weight=weight)
    classes = dict(own.classes)
    asked = tuple(sorted({arrival.class_ for arrival in arrivals if arrival.class_}))
    for name in asked:
        classes.setdefault(name, ClassPolicy())
    for name, slo_s in slos(arrivals).items():
        classes[name] = msgspec.structs.replace(classes.get(name, ClassPolicy()), slo_s=slo_s)
    if asked:
        everybody = {"default": TenantPolicy(), **rows}
        rows = {name: msgspec.structs.replace(row, classes=asked) for name, row in everybody.items()}
    return Tables(classes, rows)


def _label(policy: str, settings: Sequence[str]) -> str:
    return ":".join((policy, *settings))


# Running


def _run(cox: Cox, case: Case, setup: Setup) -> Outcome:
    with _progress(cox, f"{case.name} {_label(setup.policy, setup.settings)}", len(case.arrivals)) as told:
        try:
            return run_one(case.arrivals, setup, told)
        except TraceError as error:
            raise CliError(Exit.USAGE, f"{case.name}: {error}") from error
        except StuckError as error:
            raise CliError(Exit.PARTIAL, f"{case.name}: {error}") from error


@contextmanager
def _progress(cox: Cox, what: str, total: int) -> Iterator[Any]:
    """A bar on stderr while a run goes on, if that is a terminal."""
    if not cox.err.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[at]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, at="")
        yield lambda ended, at_s: bar.update(task, completed=ended, at=f"{at_s:.0f} s of traffic")


# Files and documents


def _check(asked: Asked) -> None:
    """Make sure, before anything runs, that every policy can be made and every file written.

    Raises:
        CliError, PolicyError: what cannot.
    """
    for policy, settings in asked.policies:
        chosen(Setup(policy=policy, settings=settings))
    try:
        if asked.requests is not None:
            asked.requests.open("a").close()
        if asked.plots is not None:
            import_module("matplotlib")
            asked.plots.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=asked.plots).close()
    except OSError as error:
        raise CliError(Exit.USAGE, f"{error.filename} cannot be written: {error.strerror}") from error
    except ModuleNotFoundError as error:
        raise CliError(
            Exit.USAGE,
            f"plots need {error.name}, which is not installed: pip install '.[lab]' in a checkout of Coxswain",
        ) from error


def _draw(lives: Sequence[Life], title: str, folder: Path) -> list[Path]:
    from coxswain.lab import plots

    return plots.draw(lives, title, folder)


def _write_requests(path: Path, lives: Sequence[Life]) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["arrival_s", "tenant", "class", "prompt_tokens", "output_tokens", "worker", "first_token_s", "finished_s",
             "delivered_tokens", "done", "preempted"]
        )  # fmt: skip
        for life in lives:
            arrival = life.arrival
            rows.writerow(
                [arrival.at_s, arrival.tenant, arrival.class_, arrival.prompt_tokens, arrival.output_tokens,
                 life.worker, life.first_token_s, life.finished_s, life.tokens, int(life.done), life.preempted]
            )  # fmt: skip


def _document(
    case: Case, runs: Sequence[tuple[str, tuple[str, ...], Metrics, Outcome]]
) -> list[dict[str, Any]]:
    """Every run as JSON: what it was, what came of it, and what was published."""
    return [
        {
            "suite": case.name,
            "policy": policy,
            "settings": settings,
            "setup": _plain(case.setup),
            "metrics": metrics,
            "gap": gap(outcome.lives, case.setup),
            "run": {name: getattr(outcome, name) for name in Outcome.__struct_fields__ if name != "lives"},
            "published": None
            if (theirs := peer(case.name, _label(policy, settings))) is None
            else {
                "name": theirs[0],
                **theirs[1]._asdict(),
                "deviation": report.deviation(metrics, theirs[1]),
            },
        }
        for policy, settings, metrics, outcome in runs
    ]


def _plain(setup: Setup) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(setup)
    for name in ("policy", "settings"):
        del plain[name]
    return plain
