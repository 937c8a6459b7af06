"""Dashboards, alerts and the runbook: what they ask exists, and they lead to each other.

That live processes export the names of the contract, `tests/integration/test_metrics.py` shows.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import promql_parser
import pytest
import yaml

from coxswain.control.cli import main as cox_main
from coxswain.schemas import metrics as names
from scripts import ask_prometheus
from scripts import dashboards as written
from tests.support.promql import (
    Query,
    dashboards,
    labels_left,
    labels_of,
    queries,
    rules,
    selectors,
)

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus"
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
QUERIES = list(queries())
STEPS = names.CONTROLLER_STEP.name
ASKED = pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())


def check(query: Query) -> None:
    """Every family, every label it is chosen by, grouped by, joined by and named by in the legend exists."""
    for selector in selectors(query.text):
        assert selector.labels <= labels_of(selector.family), selector
    left = labels_left(promql_parser.parse(query.text))
    assert set(re.findall(r"\{\{(\w+)\}\}", query.legend)) <= left, (query.legend, left)


@ASKED
def test_what_is_asked_exists(query: Query) -> None:
    """A renamed metric or label breaks the build, not the dashboard."""
    assert selectors(query.text)
    check(query)


@pytest.mark.parametrize(
    "query",
    [
        Query("family", "rate(coxswain_tenant_tokens_total[1m])"),
        Query("a histogram is not a value", "coxswain_controller_step_seconds"),
        Query("matcher", 'coxswain_worker_requests{tenant="a"}'),
        Query("group", "sum by (tenant) (coxswain_worker_requests)"),
        Query("legend", "sum by (worker) (coxswain_worker_requests)", "{{state}}"),
        Query("quantile", f"histogram_quantile(0.9, sum by (le) (rate({STEPS}_bucket[1m])))", "{{le}}"),
        Query("no PromQL", "sum by (worker (coxswain_worker_requests)"),
    ],
    ids=lambda query: query.where,
)  # fmt: skip
def test_what_does_not_exist_is_found(query: Query) -> None:
    """The check above can fail."""
    with pytest.raises((AssertionError, ValueError)):
        check(query)


def test_counters_are_looked_at_by_rate_and_levels_are_not() -> None:
    """A counter's own value says how long a process has lived; the rate of a level is nonsense."""
    for query in QUERIES:
        rated = set(re.findall(r"(?:rate|increase)\((coxswain_\w+)", query.text))
        for selector in selectors(query.text):
            counts = selector.family.endswith(("_total", "_bucket"))
            assert (selector.family in rated) == counts, query


def test_every_family_is_asked_for_somewhere() -> None:
    """What nobody looks at need not be exported."""
    asked = {selector.family for query in QUERIES for selector in selectors(query.text)}
    asked |= {family.removesuffix("_bucket") for family in asked}
    assert names.ALL.keys() - asked == set()


def test_alerts_and_the_runbook_lead_to_each_other() -> None:
    """Each alert links its section, each section is an alert's, with its severity, how to look and how to fix."""
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", RUNBOOK, re.MULTILINE | re.DOTALL))
    alerts = {rule["alert"]: rule for rule in rules()}
    assert list(sections) == list(alerts), "the same, in the same order"
    for name, rule in alerts.items():
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"
        assert rule["annotations"].keys() >= {"summary", "description"}
        assert sections[name].lstrip().startswith(f"**{rule['labels']['severity']}** · ")
        assert "\n- Look: " in sections[name]
        assert "\n- Fix: " in sections[name]


def test_each_alert_is_tried() -> None:
    """For each there is a time at which it fires and one at which it does not, in the file that promtool reads."""
    tests = yaml.safe_load((RULES / "alerts.test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for name in (rule["alert"] for rule in rules()):
        fires = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == name}
        assert fires == {True, False}, name


def test_alerts_fire_when_they_should() -> None:
    """Prometheus's own tool finds rules and configuration right, and each alert fires when its test says so."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("NO PROMTOOL: alerts were not tried (Debian: `apt-get install prometheus`)")
    for words in (("check", "config", "prometheus.yml"), ("test", "rules", "alerts.test.yml")):
        done = subprocess.run([promtool, *words], cwd=RULES, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_live_prometheus_is_asked_what_dashboards_ask() -> None:
    """`scripts.ask_prometheus` asks the query of every panel, with nothing left for Grafana to fill in."""
    asked = dict(ask_prometheus.panels())
    assert len(asked) == sum(
        len(panel["targets"]) for each in dashboards().values() for panel in each["panels"]
    )
    for query in asked.values():
        assert "$" not in query
        promql_parser.parse(query)


def test_texts_of_alerts_name_labels_that_their_alert_has() -> None:
    """`{{ $labels.worker }}` of an alert over fleets would be empty."""
    for rule in rules():
        words = " ".join(rule["annotations"].values())
        used = set(re.findall(r"\$labels\.(\w+)", words))
        assert used <= labels_left(promql_parser.parse(rule["expr"])), rule["alert"]


def test_the_runbook_names_commands_that_cox_has(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is woken at night types what stands there."""
    spans = {span for span in re.findall(r"`(cox [^`]+)`", RUNBOOK) if "FILE" not in span}
    assert len(spans) > 15
    for span in sorted(spans):
        words = shlex.split(span)[1:]
        commands = [word for word in words if re.fullmatch(r"[a-z]+", word)]
        depth = 2 if words[0] in ("tenants", "classes") else 1
        monkeypatch.setattr(sys, "argv", ["cox", *commands[:depth], "--help"])
        with pytest.raises(SystemExit) as end:
            sys.exit(cox_main())
        shown = capsys.readouterr().out
        assert end.value.code == 0, span
        for option in (word for word in words if word.startswith("--")):
            assert option in shown, span


def test_dashboards_are_those_of_the_script_and_fit_the_screen() -> None:
    """Nobody edits the JSON by hand; panels neither overlap nor stand out."""
    for path, text in written.texts().items():
        assert path.read_text() == text, path.name
    assert dashboards().keys() == written.ROWS.keys()
    for dashboard in dashboards().values():
        taken: set[tuple[int, int]] = set()
        for place in (panel["gridPos"] for panel in dashboard["panels"]):
            cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
            assert place["x"] + place["w"] <= written.GRID
            assert not cells & taken
            taken |= cells


def test_choices_of_a_dashboard_are_those_that_its_queries_use() -> None:
    """A variable that nobody uses chooses nothing; one that is not there shows nothing."""
    for name, dashboard in dashboards().items():
        variables = {each["name"]: each for each in dashboard["templating"]["list"]}
        text = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
        assert set(re.findall(r"\$(?!__)\{?(\w+)", text)) == variables.keys() - {"source"}, name
        for variable in (each for each in variables.values() if each["type"] == "query"):
            query, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
            (selector,) = selectors(query)
            assert {label} | selector.labels <= labels_of(selector.family)


def test_what_compose_mounts_is_here_and_asks_the_services_that_are_there() -> None:
    """Prometheus scrapes names of services and the port that the controller is told; Grafana finds its files."""
    services = COMPOSE["services"]
    for name in ("prometheus", "grafana"):
        assert services[name]["profiles"] == ["observability"]
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", services[name]["image"]), "pinned"
        for volume in services[name]["volumes"]:
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    jobs = {job["job_name"]: job["dns_sd_configs"][0] for job in config["scrape_configs"]}
    for job in jobs.values():
        assert set(job["names"]) <= services.keys()
    told = services["controller"]["command"]
    assert told[told.index("--metrics") + 1] == f"0.0.0.0:{jobs['coxswain-controller']['port']}"
    asked = {
        selector.equal["job"]
        for query in QUERIES
        for selector in selectors(query.text)
        if "job" in selector.equal
    }
    assert asked <= jobs.keys()
