"""The tenant and class tables for people. Pure; called by `policy_tables.py`."""

from collections.abc import Mapping
from dataclasses import replace

from rich.text import Text

from coxswain.control.cli.grid import Column, Row, grid
from coxswain.control.cli.words import span
from coxswain.schemas.policy import INT32_MAX, INT32_MIN, ClassPolicy, TenantPolicy

_TENANT = (
    Column(title="TENANT", cut=16),
    Column(title="WEIGHT", right=True),
    Column(title="CLASS", cut=8),
    Column(title="MAY ASK FOR", cut=12),
    Column(title="PRIORITY"),
    Column(title="MAX RUNNING", right=True),
    Column(title="MAX QUEUED", right=True),
)
_CLASS = (
    Column(title="POSITION", right=True),
    Column(title="CLASS", cut=8),
    Column(title="ORDER"),
    Column(title="SLO", right=True),
    Column(title="CUT-IN"),
    Column(title="QUANTUM", right=True, drop=6),
    Column(title="COOLDOWN", right=True, drop=7),
    Column(title="AGEING", right=True, drop=4),
    Column(title="PREFILL/STEP", right=True, drop=3),
    Column(title="LINGER", right=True, drop=9),
    Column(title="STAND ASIDE", drop=8),
    Column(title="BORROW", drop=5),
    Column(title="MAX RUNNING", right=True, drop=1),
    Column(title="MAX QUEUED", right=True, drop=2),
)


def tenants(rows: Mapping[str, TenantPolicy], width: int) -> Text:
    """The tenant table, by name."""
    if not rows:
        return Text("no rows: every tenant has weight 1 and class default")
    return grid(_TENANT, [_tenant(name, rows[name]) for name in sorted(rows)], width)


def classes(rows: Mapping[str, ClassPolicy], width: int) -> Text:
    """The class table, in the order in which classes run."""
    if not rows:
        return Text("no rows: there is one class, default, with fair order")
    ordered = sorted(rows, key=lambda name: (rows[name].position, name))
    shown = [_class(name, rows[name]) for name in ordered]
    # Where there is no room for all, what no class has goes first.
    columns = [
        replace(column, drop=column.drop + len(_CLASS)) if column.drop and set(cells) == {"-"} else column
        for column, cells in zip(_CLASS, zip(*(row.cells for row in shown), strict=True), strict=True)
    ]
    return grid(columns, shown, width)


def _tenant(name: str, row: TenantPolicy) -> Row:
    return Row(
        cells=[
            name,
            f"{row.weight:g}",
            row.class_,
            ",".join(row.classes) or "-",
            _range(row.priority_min, row.priority_max),
            _or_dash(row.max_running),
            _or_dash(row.max_queued),
        ],
    )


def _range(least: int, most: int) -> str:
    if (least, most) == (INT32_MIN, INT32_MAX):
        return "any"
    low = "" if least == INT32_MIN else str(least)
    high = "" if most == INT32_MAX else str(most)
    return f"{low}…{high}"


def _class(name: str, row: ClassPolicy) -> Row:
    return Row(
        cells=[
            str(row.position),
            name,
            row.order,
            "-" if row.slo_s is None else span(row.slo_s),
            row.cut_in,
            span(row.quantum_s) if row.quantum_s else "-",
            span(row.cooldown_s) if row.cooldown_s else "-",
            "-" if row.ageing_s is None else span(row.ageing_s),
            _or_dash(row.max_prefill_tokens_per_step),
            span(row.linger_s) if row.linger_s else "-",
            "yes" if row.stand_aside else "-",
            "yes" if row.borrow else "-",
            _or_dash(row.max_running),
            _or_dash(row.max_queued),
        ],
    )


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)
