"""Grafana's dashboards, `deploy/grafana/dashboards/*.json`, written from the short lists below.

`generated.py` compares or renews them; the tests hold every query to `schemas/metrics.py`. In Grafana they are read-only:
change them here.
"""

import json
from pathlib import Path
from typing import Any, Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parent.parent
FOLDER: Final = ROOT / "deploy" / "grafana" / "dashboards"
SOURCE: Final = {"type": "prometheus", "uid": "${source}"}
GRID: Final = 24
"""Columns of a dashboard."""


class Panel(NamedTuple):
    """One panel: what it shows, in what unit, and the queries with their legends."""

    title: str
    unit: str
    queries: dict[str, str]
    """Query by legend."""
    about: str = ""
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False


RATE: Final = "[$__rate_interval]"
FLEET: Final = 'fleet=~"$fleet"'
WORKER: Final = 'fleet=~"$fleet", worker=~"$worker"'
TENANT: Final = 'fleet=~"$fleet", tenant=~"$tenant"'
CONTROLLER: Final = 'fleet=~"$fleet", instance=~"$instance"'

ROWS: Final = {
    "fleet": (
        Panel("Workers heard", "short", {"live": f"count(coxswain_worker_status_age_seconds{{{FLEET}}} < 3)"},
              "Those whose status is less than 3 s old.", "stat", 4),
        Panel("Leaders", "short", {"leading": f"sum(coxswain_controller_leading{{{FLEET}}})"},
              "There should be one. With none, workers carry on by themselves.", "stat", 4),
        Panel("Queued", "short", {"queued": f'sum(coxswain_worker_requests{{{FLEET}, state="queued"}})'}, "", "stat", 4),
        Panel("Running", "short", {"running": f'sum(coxswain_worker_requests{{{FLEET}, state="running"}})'}, "", "stat", 4),
        Panel("Held", "short", {"held": f'sum(coxswain_worker_requests{{{FLEET}, state="held"}})'},
              "Held by a person, by a policy, or to make room.", "stat", 4),
        Panel("Output tokens per second", "short",
              {"tokens": f"sum(rate(coxswain_tenant_output_tokens_total{{{FLEET}}}{RATE}))"}, "", "stat", 4),
        Panel("Output by tenant", "short",
              {"{{tenant}}": f"sum by (tenant) (rate(coxswain_tenant_output_tokens_total{{{FLEET}}}{RATE}))"},
              "Tokens per second; `other` is every tenant without a series of its own.", width=12, stacked=True),
        Panel("Fair share: virtual time charged", "short",
              {"{{tenant}}": f'sum by (tenant) (rate(coxswain_tenant_charged_tokens_total{{{FLEET}, tenant!="other"}}{RATE}))'},
              "Tokens × price ÷ weight, per second. Equal for tenants that always have requests waiting.", width=12),
        Panel("Requests", "short", {"{{state}}": f"sum by (state) (coxswain_worker_requests{{{FLEET}}})"}, stacked=True),
        Panel("Queued by class", "short",
              {"{{class}}": f'sum by (class) (coxswain_class_requests{{{FLEET}, state="queued"}})'}, stacked=True),
        Panel("Oldest wait by class", "s",
              {"{{class}}": f"max by (class) (coxswain_class_oldest_queued_seconds{{{FLEET}}})"}),
        Panel("KV cache in use", "percentunit",
              {"{{worker}}": f"coxswain_worker_used_kv_blocks{{{FLEET}}} / coxswain_worker_kv_blocks{{{FLEET}}}"}),
        Panel("Recomputed", "percentunit",
              {"{{worker}}": f"sum by (worker) (rate(coxswain_tenant_recomputed_tokens_total{{{FLEET}}}{RATE})) / (sum by (worker) "
               f"(rate(coxswain_tenant_uncached_input_tokens_total{{{FLEET}}}{RATE})) + sum by (worker) "
               f"(rate(coxswain_tenant_output_tokens_total{{{FLEET}}}{RATE})))"},
              "Share of input and output tokens that were computed a second time."),
        Panel("Refused at the HTTP edge", "short",
              {"{{status}}": f"sum by (status) (rate(coxswain_edge_refusals_total{{{FLEET}}}{RATE}))"},
              "Per second. 429: a full queue; 503: draining; 401, 403: keys."),
    ),
    "tenant": (
        Panel("Output tokens per second", "short",
              {"{{tenant}}": f"sum by (tenant) (rate(coxswain_tenant_output_tokens_total{{{TENANT}}}{RATE}))"}, width=12),
        Panel("Input tokens per second", "short",
              {"{{tenant}} computed": f"sum by (tenant) (rate(coxswain_tenant_uncached_input_tokens_total{{{TENANT}}}{RATE}))",
               "{{tenant}} cached": f"sum by (tenant) (rate(coxswain_tenant_cached_input_tokens_total{{{TENANT}}}{RATE}))"},
              width=12),
        Panel("Requests", "short",
              {"{{tenant}} {{state}}": f"sum by (tenant, state) (coxswain_tenant_requests{{{TENANT}}})"}),
        Panel("Oldest wait", "s",
              {"{{tenant}}": f"max by (tenant) (coxswain_tenant_oldest_queued_seconds{{{TENANT}}})"}),
        Panel("Requests ended per second", "short",
              {"{{tenant}}": f"sum by (tenant) (rate(coxswain_tenant_finished_requests_total{{{TENANT}}}{RATE}))"}),
        Panel("Virtual time charged per second", "short",
              {"{{tenant}}": f"sum by (tenant) (rate(coxswain_tenant_charged_tokens_total{{{TENANT}}}{RATE}))"},
              "Tokens × price ÷ weight. Equal for tenants that always have requests waiting."),
        Panel("Weight", "short", {"{{tenant}}": f"max by (tenant) (coxswain_tenant_weight{{{TENANT}}})"}),
        Panel("Lost work", "short",
              {"{{tenant}} again": f"sum by (tenant) (rate(coxswain_tenant_recomputed_tokens_total{{{TENANT}}}{RATE}))",
               "{{tenant}} for nothing": f"sum by (tenant) (rate(coxswain_tenant_discarded_tokens_total{{{TENANT}}}{RATE}))"},
              "Tokens per second that were recomputed, or computed in vain."),
        Panel("Where it is served", "short",
              {"{{worker}}": f"sum by (worker) (rate(coxswain_tenant_output_tokens_total{{{TENANT}}}{RATE}))"},
              "Output tokens per second.", width=24, stacked=True),
    ),
    "worker": (
        Panel("Runs", "short", {"{{worker}}: {{model}}, vLLM {{vllm_version}}": f"coxswain_worker_info{{{WORKER}}}"}, "", "stat", 6),
        Panel("State", "short", {"{{worker}} {{state}}": f"coxswain_worker_state{{{WORKER}}} > 0"}, "", "stat", 6),
        Panel("Age of status", "s", {"{{worker}}": f"coxswain_worker_status_age_seconds{{{WORKER}}}"},
              "A full frame comes every second.", width=6),
        Panel("Age of the leader", "s", {"{{worker}}": f"coxswain_worker_leader_age_seconds{{{WORKER}}}"},
              "After 5 s a controller's holds end.", width=6),
        Panel("Slots", "short",
              {"{{worker}} {{state}}": f"coxswain_worker_used_slots{{{WORKER}}}",
               "{{worker}} active": f"coxswain_worker_active_slots{{{WORKER}}}",
               "{{worker}} of the runner": f"coxswain_worker_runner_slots{{{WORKER}}}"}),
        Panel("KV cache blocks", "short",
              {"{{worker}} used": f"coxswain_worker_used_kv_blocks{{{WORKER}}}",
               "{{worker}} held": f"coxswain_worker_held_kv_blocks{{{WORKER}}}",
               "{{worker}} there": f"coxswain_worker_kv_blocks{{{WORKER}}}"}),
        Panel("Requests", "short", {"{{worker}} {{state}}": f"coxswain_worker_requests{{{WORKER}}}"}),
        Panel("Step time", "s", {"{{worker}}": f"coxswain_worker_step_seconds{{{WORKER}}}"}, "A moving median, while busy."),
        Panel("Steps per second", "short", {"{{worker}}": f"rate(coxswain_worker_steps_total{{{WORKER}}}{RATE})"}),
        Panel("Preemptions per second", "short",
              {"{{worker}}": f"rate(coxswain_worker_preemptions_total{{{WORKER}}}{RATE})"},
              "By vLLM for lack of KV blocks, and held requests that were dropped."),
        Panel("Commands per second", "short",
              {"{{verb}} {{outcome}}": f"sum by (verb, outcome) (rate(coxswain_worker_commands_total{{{WORKER}}}{RATE}))"},
              "By verb and outcome: applied, partial, or the code of a refusal.", stacked=True),
        Panel("Commands waiting", "short", {"{{worker}}": f"coxswain_worker_queued_commands{{{WORKER}}}"}),
        Panel("Events waiting for the log", "short", {"{{worker}}": f"coxswain_worker_waiting_events{{{WORKER}}}"},
              "A worker keeps 65,536; beyond that the oldest are lost."),
        Panel("Oldest event waiting", "s", {"{{worker}}": f"coxswain_worker_oldest_event_seconds{{{WORKER}}}"}),
        Panel("Lost", "short",
              {"{{worker}} events": f"increase(coxswain_worker_events_dropped_total{{{WORKER}}}{RATE})",
               "{{worker}} restarts": f"increase(coxswain_worker_restarts_total{{{WORKER}}}{RATE})",
               "{{worker}} without NATS": f"1 - coxswain_edge_nats_connected{{{WORKER}}}"},
              "Events dropped, restarts, and 1 while the API server does not hear NATS."),
    ),
    "controller": (
        Panel("Leads", "short", {"{{instance}}": f"coxswain_controller_leading{{{CONTROLLER}}}"}, "", "stat", 6),
        Panel("Leading for", "s", {"{{instance}}": f"coxswain_controller_leading_seconds{{{CONTROLLER}}}"}, "", "stat", 6),
        Panel("Reaches NATS", "short", {"{{instance}}": f"coxswain_controller_nats_connected{{{CONTROLLER}}}"}, "", "stat", 6),
        Panel("Controllers", "short", {"{{controller}}: {{policy}}, {{version}}": f"coxswain_controller_info{{{CONTROLLER}}}"}, "", "stat", 6),
        Panel("Workers", "short", {"{{instance}} {{liveness}}": f"coxswain_controller_workers{{{CONTROLLER}}}"}),
        Panel("Requests it sees", "short", {"{{instance}} {{state}}": f"coxswain_controller_requests{{{CONTROLLER}}}"}),
        Panel("Busy tenants", "short", {"{{instance}}": f"coxswain_controller_busy_tenants{{{CONTROLLER}}}"}),
        Panel("Step time", "s", {
            f"{{{{instance}}}} p{quantile}":
            f"histogram_quantile(0.{quantile}, sum by (instance, le) (rate(coxswain_controller_step_seconds_bucket{{{CONTROLLER}}}{RATE})))"
            for quantile in (50, 99)}),
        Panel("Age of frames", "s", {
            f"{{{{instance}}}} p{quantile}":
            f"histogram_quantile(0.{quantile}, sum by (instance, le) (rate(coxswain_controller_frame_lag_seconds_bucket{{{CONTROLLER}}}{RATE})))"
            for quantile in (50, 99)}),
        Panel("Frames per second", "short",
              {"{{instance}} taken": f"rate(coxswain_controller_frames_total{{{CONTROLLER}}}{RATE})",
               "{{instance}} lost, {{reason}}": f"rate(coxswain_controller_frames_lost_total{{{CONTROLLER}}}{RATE})"}),
        Panel("Commands per second", "short",
              {"{{verb}}": f"sum by (verb) (rate(coxswain_controller_commands_total{{{CONTROLLER}}}{RATE}))"}, stacked=True),
        Panel("Refused per second", "short",
              {"{{verb}} {{code}}": f"sum by (verb, code) (rate(coxswain_controller_commands_refused_total{{{CONTROLLER}}}{RATE}))"},
              "Code `none`: no answer came."),
        Panel("Ranks per second", "short", {"{{instance}}": f"rate(coxswain_controller_ranks_total{{{CONTROLLER}}}{RATE})"}),
        Panel("Rows of the tables", "short",
              {"{{table}} in force": f"max by (table) (coxswain_controller_table_rows{{{CONTROLLER}}})",
               "{{table}} refused": f"max by (table) (coxswain_controller_table_refused_rows{{{CONTROLLER}}})"}),
        Panel("Failures of the policy per second", "short",
              {"{{instance}}": f"rate(coxswain_controller_policy_failures_total{{{CONTROLLER}}}{RATE})"},
              "Steps in which it raised; what it decided before stays in force."),
        Panel("Changes of leader", "short",
              {"{{instance}}": f"increase(coxswain_controller_terms_total{{{CONTROLLER}}}{RATE})"}),
    ),
}  # fmt: skip
VARIABLES: Final = {
    "fleet": ("fleet",),
    "tenant": ("fleet", "tenant"),
    "worker": ("fleet", "worker"),
    "controller": ("fleet", "instance"),
}
VALUES: Final = {
    "fleet": "label_values(coxswain_worker_info, fleet)",
    "tenant": f"label_values(coxswain_tenant_requests{{{FLEET}}}, tenant)",
    "worker": f"label_values(coxswain_worker_info{{{FLEET}}}, worker)",
    "instance": f"label_values(coxswain_controller_info{{{FLEET}}}, instance)",
}
"""Where Grafana finds the choices of a variable."""


def dashboard(name: str) -> dict[str, Any]:
    """One dashboard in Grafana's own form."""
    panels: list[dict[str, Any]] = []
    x = y = 0
    for number, panel in enumerate(ROWS[name], 1):
        height = 4 if panel.kind == "stat" else 8
        if x + panel.width > GRID:
            x, y = 0, y + panels[-1]["gridPos"]["h"]
        panels.append(_panel(panel, number, {"x": x, "y": y, "w": panel.width, "h": height}))
        x += panel.width
    return {
        "uid": f"coxswain-{name}",
        "title": f"Coxswain: {name}",
        "tags": ["coxswain"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [{"type": "dashboards", "title": "Coxswain", "tags": ["coxswain"], "asDropdown": True, "keepTime": True}],
        "templating": {"list": [_source(), *(_variable(each) for each in VARIABLES[name])]},
        "panels": panels,
    }  # fmt: skip


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    custom = {
        "fillOpacity": 10,
        "showPoints": "never",
        "stacking": {"mode": "normal" if panel.stacked else "none"},
    }
    stat = {"textMode": "value_and_name" if "{{" in next(iter(panel.queries)) else "value"}
    return {
        "id": number,
        "title": panel.title,
        "description": panel.about,
        "type": panel.kind,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "custom": custom if panel.kind == "timeseries" else {},
            },
            "overrides": [],
        },
        "options": stat if panel.kind == "stat" else {"tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": SOURCE, "expr": query, "legendFormat": legend}
            for place, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def _source() -> dict[str, Any]:
    return {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _variable(name: str) -> dict[str, Any]:
    return {
        "name": name, "type": "query", "datasource": SOURCE, "refresh": 2, "sort": 1, "multi": True,
        "includeAll": True, "allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]},
        "query": {"query": VALUES[name], "refId": name}, "definition": VALUES[name],
    }  # fmt: skip


def texts() -> dict[Path, str]:
    """Every file and what it should say."""
    return {FOLDER / f"{name}.json": json.dumps(dashboard(name), indent=2) + "\n" for name in ROWS}
