"""The names on `/metrics` keep their rules: a contract is easier to learn than a list."""

import re

import pytest

from coxswain.schemas import metrics as names
from coxswain.schemas.metrics import Metric

PARTS = ("worker", "class", "tenant", "edge", "controller")
LABELS = {
    "fleet", "worker", "class", "tenant", "state", "code", "verb", "status", "model", "vllm_version", "controller",
    "policy", "version", "liveness", "reason", "table", "outcome",
}  # fmt: skip
"""Every label there is: none has a request, a client's id or an address in it."""
UNITS = (
    "seconds",
    "tokens",
    "blocks",
    "slots",
    "requests",
    "commands",
    "workers",
    "tenants",
    "rows",
    "events",
)

ALL = pytest.mark.parametrize("metric", names.ALL.values(), ids=str)


@ALL
def test_a_name_says_whose_and_what(metric: Metric):
    """Coxswain, then the part, then words of lower case; what is exported and its name are one."""
    assert re.fullmatch(rf"coxswain_({'|'.join(PARTS)})(_[a-z]+)+", metric.name)
    assert metric.help.endswith(".")
    assert metric.labels[0] == "fleet"
    assert set(metric.labels) <= LABELS


@ALL
def test_counters_alone_end_in_total(metric: Metric):
    """Prometheus's own rule, both ways round."""
    assert (metric.kind == "counter") == metric.name.endswith("_total")


@ALL
def test_units_are_base_units_at_the_end(metric: Metric):
    """No milliseconds, no percentages; a unit that is named stands last."""
    words = metric.name.removesuffix("_total").split("_")
    assert not {"ms", "milliseconds", "percent", "ratio", "kb", "mb"} & set(words)
    assert not [word for word in words[:-1] if word == "seconds"]
    assert metric.kind != "histogram" or words[-1] in UNITS


def test_parts_have_the_labels_of_who_they_are():
    """What is of a worker names it; what is of a class or tenant names that and its worker."""
    for metric in names.ALL.values():
        part = metric.name.split("_")[1]
        if part in ("worker", "class", "tenant", "edge"):
            assert metric.labels[1] == "worker"
        if part in ("class", "tenant"):
            assert metric.labels[2] == part
