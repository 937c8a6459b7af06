"""What dashboards and alerts ask of Prometheus: every query, and in it every family, label and value."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import promql_parser
import yaml

from coxswain.schemas import metrics as names

ROOT = Path(__file__).parents[2]
OF_PROMETHEUS = {"job", "instance"}
"""Labels that Prometheus adds to every series."""


class Query(NamedTuple):
    """One query and where it stands."""

    where: str
    text: str
    legend: str = ""


class Selector(NamedTuple):
    """A family in a query, as it is named there, and what its labels must be."""

    family: str
    equal: dict[str, str]
    labels: frozenset[str]


def rules() -> list[dict[str, Any]]:
    """Every alert."""
    groups = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboards() -> dict[str, dict[str, Any]]:
    """Every dashboard by the name of its file."""
    return {
        path.stem: json.loads(path.read_text())
        for path in (ROOT / "deploy/grafana/dashboards").glob("*.json")
    }


def queries() -> Iterator[Query]:
    """All that is asked."""
    for rule in rules():
        yield Query(rule["alert"], rule["expr"])
    for name, dashboard in dashboards().items():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                # What Grafana puts there before it asks.
                text = target["expr"].replace("$__rate_interval", "1m")
                yield Query(f"{name}: {panel['title']}", text, target["legendFormat"])


def selectors(text: str) -> list[Selector]:
    """The families that a query reads.

    Raises:
        ValueError: if it is no PromQL.
    """
    found: list[Selector] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            matchers = node.matchers.matchers
            equal = {each.name: each.value for each in matchers if each.op == promql_parser.MatchOp.Equal}
            found.append(Selector(node.name or "", equal, frozenset(each.name for each in matchers)))
        return True

    promql_parser.walk(promql_parser.parse(text), visit)
    return found


def labels_left(node: Any) -> set[str]:
    """The labels that a query's result has; what it groups by must be there to be grouped by.

    Raises:
        ValueError: if it names a label that is not there.
    """
    match node:
        case promql_parser.VectorSelector():
            return labels_of(node.name or "")
        case promql_parser.AggregateExpr():
            inner = labels_left(node.expr)
            by = set(node.modifier.labels) if node.modifier else set()
            if by - inner:
                raise ValueError(f"no label {by - inner} in {node.expr}")
            return by
        case promql_parser.BinaryExpr():
            left, right = labels_left(node.lhs), labels_left(node.rhs)
            number = promql_parser.NumberLiteral
            return right if isinstance(node.lhs, number) else left
        case promql_parser.Call():
            vectors = [each for each in node.args if not isinstance(each, promql_parser.NumberLiteral)]
            inner = set[str]().union(*map(labels_left, vectors))
            return inner - {"le"} if node.func.name == "histogram_quantile" else inner
        case promql_parser.MatrixSelector():
            return labels_left(node.vector_selector)
        case promql_parser.ParenExpr():
            return labels_left(node.expr)
    return set()


def labels_of(family: str) -> set[str]:
    """The labels of a family by the contract.

    Raises:
        ValueError: if there is no such family.
    """
    if family == "up":
        return set(OF_PROMETHEUS)
    for ending in ("_bucket", "_sum", "_count"):
        metric = names.ALL.get(family.removesuffix(ending))
        if family.endswith(ending) and metric is not None and metric.kind == "histogram":
            return {*metric.labels, *OF_PROMETHEUS} | ({"le"} if ending == "_bucket" else set())
    metric = names.ALL.get(family)
    if metric is None or metric.kind == "histogram":
        raise ValueError(f"no family {family!r}")
    return {*metric.labels, *OF_PROMETHEUS}
