"""A run's figures for people: lines for `control.cli.grid`. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from textwrap import fill
from typing import Final

from rich.text import Text

from coxswain.control.cli.grid import Cell, Column, Row, grid
from coxswain.control.cli.words import count, span
from coxswain.lab.bound import Gap
from coxswain.lab.experiment import Outcome
from coxswain.lab.life import Life
from coxswain.lab.metrics import Metrics
from coxswain.lab.published import Row as Published
from coxswain.lab.setup import Setup
from coxswain.lab.suites import Suite

_COMPARISON: Final = (
    Column(title="POLICY"),
    Column(title="N", right=True),
    Column(title="DONE", right=True),
    Column(title="MAX", right=True),
    Column(title="AVG", right=True),
    Column(title="VAR", right=True),
    Column(title="TOK/S", right=True),
    Column(title="TOTAL", right=True),
    Column(title="ACC", right=True, drop=1),
    Column(title="TTFT MIN", right=True, drop=1),
    Column(title="MED", right=True, drop=1),
    Column(title="MAX", right=True, drop=1),
    Column(title="×REAL", right=True, drop=2),
)
_TENANTS: Final = (
    Column(title="TENANT", cut=12),
    Column(title="N", right=True),
    Column(title="DONE", right=True),
    Column(title="SERVICE", right=True),
    Column(title="TTFT", right=True),
    Column(title="P50", right=True),
    Column(title="P99", right=True),
    Column(title="HELD", right=True, drop=1),
)
_SUITES: Final = (
    Column(title="SUITE"),
    Column(title="N", right=True),
    Column(title="TENANTS", right=True),
    Column(title="PUBLISHED"),
    Column(title="WHAT"),
)


_SEEDS: Final = (
    Column(title="POLICY"),
    Column(title="DONE", right=True),
    Column(title="MAX", right=True),
    Column(title="÷ FIRST", right=True),
    Column(title="AVG", right=True),
    Column(title="÷ FIRST", right=True),
    Column(title="TOK/S", right=True),
    Column(title="÷ FIRST", right=True),
)


def heading(title: str, setup: Setup, outcome: Outcome | None) -> Text:
    """What was run: its name, how, and how fast."""
    how = [f"admission {setup.admission}", f"{setup.workers} worker{'s' if setup.workers > 1 else ''}"]
    how += [f"cadence {span(setup.cadence_s)}", f"latency {span(setup.latency_s)}"]
    how += [f"loss {setup.loss:.1%}"] if setup.loss else []
    how += [f"controller dead from {span(at_s)} for {span(for_s)}" for at_s, for_s in setup.outages]
    if outcome is not None:
        how += [f"{outcome.steps} steps", f"{outcome.commands} commands, {outcome.rejected} refused"]
        how += [f"{outcome.messages} messages, {outcome.lost} lost"]
    return Text.assemble((title, "bold"), "  ", (", ".join(how), "dim"))


def comparison(
    ours: Iterable[tuple[str, Metrics, Outcome]], theirs: Mapping[str, tuple[str, Published]], width: int
) -> Text:
    """A line per policy; under it the published run and how far ours is from it."""
    rows = []
    for policy, metrics, outcome in ours:
        rows.append(_ours(policy, metrics, outcome))
        if policy in theirs:
            name, row = theirs[policy]
            rows += [_theirs(name, row), _difference(metrics, row)]
    return grid(_COMPARISON, rows, width)


def gaps(found: Mapping[str, Gap], width: int) -> Text:
    """A paragraph per policy: how far backlogged tenants came apart, and whether VTC's theorem 4.4 has it."""
    lines = []
    for policy, gap in found.items():
        if gap.between is None:
            lines.append(f"{policy}: no two tenants were backlogged at once")
            continue
        holds = "holds" if gap.most <= gap.bound else "does NOT hold"
        line = f"{policy}: backlogged {' and '.join(gap.between)} came {gap.most:,.0f} apart"
        line += f", 2U = {gap.bound:,.0f} {holds}"
        if gap.uneven is not None:
            line += f"; all backlogged for {span(gap.together_s)}, service ÷ weight within {gap.uneven:.1%}"
        lines.append(line)
    return Text("\n".join(fill(line, width, subsequent_indent="  ") for line in lines), style="dim")


def seeds(runs: Mapping[str, Sequence[Metrics]], width: int) -> Text:
    """A line per policy: medians over seeds, and those of the ratios to the first policy with the same seed."""
    first = next(iter(runs.values()))
    rows = []
    for policy, mine in runs.items():
        done = min(mine, key=lambda metrics: metrics.done)
        cells: list[Cell] = [policy, _done(done.n, done.done)]
        for name, digits in (("max_diff", 1), ("avg_diff", 1), ("throughput", 0)):
            values = [getattr(metrics, name) for metrics in mine]
            ratios = [
                value / (getattr(other, name) or 1.0) for value, other in zip(values, first, strict=True)
            ]
            cells += [between(values, digits), between(ratios, 2 if digits else 3)]
        rows.append(Row(cells=cells))
    return grid(_SEEDS, rows, width)


def between(values: Sequence[float], digits: int) -> str:
    """The median, and in brackets the least and the most."""
    middle, least, most = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} [{least} … {most}]"


def tenants(lives: Sequence[Life], metrics: Metrics, width: int) -> Text:
    """A line per tenant: what it was served (weighted tokens) and how long it waited for first tokens."""
    rows = []
    for name, latency in metrics.tenants.items():
        mine = [life for life in lives if life.arrival.tenant == name]
        held_s = sum(
            until - since for life in mine for since, until, state in life.spans() if state == "held"
        )
        rows.append(
            Row(
                cells=[
                    name,
                    str(latency.n),
                    _done(latency.n, latency.done),
                    count(sum(life.arrival.cost for life in mine if life.done)),
                    *(_seconds(value) for value in (latency.mean_s, latency.p50_s, latency.p99_s)),
                    span(held_s) if held_s else "-",
                ]
            )
        )
    return grid(_TENANTS, rows, width)


def suites(listed: Iterable[tuple[Suite, int | None, int | None, Sequence[str]]], width: int) -> Text:
    """A line per suite: its requests and tenants where they are known, and what was published."""
    rows = [
        Row(cells=[suite.name, _or_dash(n), _or_dash(who), ", ".join(published) or "-", suite.what])
        for suite, n, who, published in listed
    ]
    return grid(_SUITES, rows, width)


def spread(metrics: Metrics) -> tuple[float, ...]:
    """Least, median and greatest of the tenants' mean first-token latencies, seconds."""
    means = [latency.mean_s for latency in metrics.tenants.values() if latency.mean_s is not None]
    return (min(means), median(means), max(means)) if means else ()


def deviation(metrics: Metrics, row: Published) -> dict[str, float]:
    """Ours ÷ theirs − 1, of what the papers lead with."""
    pairs = {
        "max_diff": (metrics.max_diff, row.max_diff),
        "avg_diff": (metrics.avg_diff, row.avg_diff),
        "throughput": (metrics.throughput, row.throughput),
    }
    return {name: mine / other - 1 for name, (mine, other) in pairs.items()}


def _ours(policy: str, metrics: Metrics, outcome: Outcome) -> Row:
    waits = spread(metrics) or (None,) * 3
    speed = outcome.virtual_s / outcome.cpu_s if outcome.cpu_s else 0.0
    cells: list[Cell] = [policy, str(metrics.n), _done(metrics.n, metrics.done)]
    cells += [f"{metrics.max_diff:.1f}", f"{metrics.avg_diff:.1f}", f"{metrics.var_diff:.0f}"]
    cells += [f"{metrics.throughput:.0f}", f"{metrics.total_s:.0f}s", f"{metrics.acc_max:.0f}"]
    return Row(cells=[*cells, *(_seconds(wait) for wait in waits), f"{speed:.0f}"])


def _theirs(name: str, row: Published) -> Row:
    waits = sorted(row.ttft_s)
    shown = (waits[0], median(waits), waits[-1]) if waits else (None,) * 3
    cells = [
        f"  {name}, published",
        str(row.n),
        _done(row.n, row.done),
        f"{row.max_diff:.1f}",
        f"{row.avg_diff:.1f}",
    ]
    cells += [f"{row.var_diff:.0f}", f"{row.throughput:.0f}", f"{row.total_s:.0f}s", f"{row.acc_max:.0f}"]
    return Row(
        cells=[Text(str(cell), style="dim") for cell in (*cells, *(_seconds(wait) for wait in shown), "")]
    )


def _difference(metrics: Metrics, row: Published) -> Row:
    off = deviation(metrics, row)
    cells = ["  ours is off by", "", "", f"{off['max_diff']:+.0%}", f"{off['avg_diff']:+.0%}", ""]
    cells += [f"{off['throughput']:+.0%}", f"{metrics.total_s / row.total_s - 1:+.0%}", "", "", "", "", ""]
    return Row(cells=[Text(cell, style="dim") for cell in cells])


def _done(n: int, done: int) -> Text:
    """How many are done; it stands out when that is not all, because nothing else may then be compared."""
    return Text(str(done), style="" if done == n else "yellow")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}s"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)
