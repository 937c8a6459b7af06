"""The names of everything on `/metrics`, and what they mean: a contract, like subjects. Pure data.

The HTTP edge (`service/edge/metrics.py`) and the controller (`control/metrics.py`) export nothing that is not here;
dashboards and alerts query nothing else (a test holds all three to it).

Rules:
  - `coxswain_<part>_<what>`, where the part says whose it is: `worker`, `class`, `tenant`, `edge`, `controller`;
  - counters end in `_total`, and nothing else does; they never go backwards, whatever restarts;
  - base units: `_seconds`, tokens, blocks, slots, never a percentage: divide in the query;
  - one word for one thing, the wire's own where it has one (`schemas/status.py`);
  - no total beside its parts: what is split by a label is summed by whoever wants the sum;
  - labels have few values: of tenants the N most served, and `other` for the rest (`service/edge/tally.py`).
"""

from typing import Final, Literal, NamedTuple

LONG_SILENT_S: Final = 30.0
"""Gauges of a worker that has been silent for longer are no longer exported."""


class Metric(NamedTuple):
    """One family."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


_WORKER: Final = ("fleet", "worker")
_CLASS: Final = (*_WORKER, "class")
_TENANT: Final = (*_WORKER, "tenant")
_FLEET: Final = ("fleet",)

# A worker, as its last full status frame has it.

WORKER_INFO: Final = Metric(
    "coxswain_worker_info",
    "gauge",
    "1; the labels say what the worker runs.",
    (*_WORKER, "model", "vllm_version"),
)
WORKER_STATUS_AGE: Final = Metric(
    "coxswain_worker_status_age_seconds",
    "gauge",
    "Time since its last status frame; one comes at least every second.",
    _WORKER,
)
WORKER_STATE: Final = Metric(
    "coxswain_worker_state", "gauge", "1 for its current state, 0 for the others.", (*_WORKER, "state")
)
WORKER_RESTARTS: Final = Metric(
    "coxswain_worker_restarts_total", "counter", "New incarnations seen under this name.", _WORKER
)
WORKER_STEPS: Final = Metric("coxswain_worker_steps_total", "counter", "Steps of the engine.", _WORKER)
WORKER_STEP: Final = Metric(
    "coxswain_worker_step_seconds", "gauge", "Time between steps while busy, a moving median.", _WORKER
)
WORKER_ACTIVE_SLOTS: Final = Metric(
    "coxswain_worker_active_slots", "gauge", "Requests that may run at once.", _WORKER
)
WORKER_RUNNER_SLOTS: Final = Metric(
    "coxswain_worker_runner_slots",
    "gauge",
    "Slots of the model runner: active ones and spare ones for holds.",
    _WORKER,
)
WORKER_USED_SLOTS: Final = Metric(
    "coxswain_worker_used_slots",
    "gauge",
    "Slots taken, by running and by held requests.",
    (*_WORKER, "state"),
)
WORKER_KV_BLOCKS: Final = Metric("coxswain_worker_kv_blocks", "gauge", "KV cache blocks in total.", _WORKER)
WORKER_USED_KV_BLOCKS: Final = Metric(
    "coxswain_worker_used_kv_blocks", "gauge", "KV cache blocks in use.", _WORKER
)
WORKER_HELD_KV_BLOCKS: Final = Metric(
    "coxswain_worker_held_kv_blocks",
    "gauge",
    "KV cache blocks, of those in use, that held requests keep.",
    _WORKER,
)
WORKER_REQUESTS: Final = Metric(
    "coxswain_worker_requests", "gauge", "Requests queued, running and held.", (*_WORKER, "state")
)
WORKER_PREEMPTIONS: Final = Metric(
    "coxswain_worker_preemptions_total",
    "counter",
    "Times that a request lost its KV: preempted, or dropped while held.",
    _WORKER,
)
WORKER_COMMANDS: Final = Metric(
    "coxswain_worker_commands_total",
    "counter",
    "Commands answered: `applied`, `partial`, or the code of the refusal.",
    (*_WORKER, "verb", "outcome"),
)
WORKER_QUEUED_COMMANDS: Final = Metric(
    "coxswain_worker_queued_commands", "gauge", "Commands that wait for the next step.", _WORKER
)
WORKER_EVENTS_DROPPED: Final = Metric(
    "coxswain_worker_events_dropped_total",
    "counter",
    "Events that were dropped and are missing from the log.",
    _WORKER,
)
WORKER_WAITING_EVENTS: Final = Metric(
    "coxswain_worker_waiting_events", "gauge", "Events that the log has not stored yet.", _WORKER
)
WORKER_OLDEST_EVENT: Final = Metric(
    "coxswain_worker_oldest_event_seconds", "gauge", "How long the oldest of them has waited.", _WORKER
)
WORKER_LEADER_AGE: Final = Metric(
    "coxswain_worker_leader_age_seconds",
    "gauge",
    "Time since it heard its leader; absent until it has heard one.",
    _WORKER,
)

# A class on a worker.

CLASS_REQUESTS: Final = Metric(
    "coxswain_class_requests", "gauge", "Requests of a class, queued, running and held.", (*_CLASS, "state")
)
CLASS_OLDEST_QUEUED: Final = Metric(
    "coxswain_class_oldest_queued_seconds",
    "gauge",
    "How long the oldest of its queued requests has waited.",
    _CLASS,
)

# A tenant on a worker.

TENANT_REQUESTS: Final = Metric(
    "coxswain_tenant_requests",
    "gauge",
    "Requests of a tenant, queued, running and held.",
    (*_TENANT, "state"),
)
TENANT_OLDEST_QUEUED: Final = Metric(
    "coxswain_tenant_oldest_queued_seconds",
    "gauge",
    "How long the oldest of its queued requests has waited.",
    _TENANT,
)
TENANT_WEIGHT: Final = Metric(
    "coxswain_tenant_weight", "gauge", "Its weight in force; not given for `other`.", _TENANT
)
TENANT_CHARGED: Final = Metric(
    "coxswain_tenant_charged_tokens_total",
    "counter",
    "Virtual time charged: tokens, times price, over weight. Equal rates are fair shares.",
    _TENANT,
)
TENANT_UNCACHED_INPUT: Final = Metric(
    "coxswain_tenant_uncached_input_tokens_total", "counter", "Input tokens found in no cache.", _TENANT
)
TENANT_CACHED_INPUT: Final = Metric(
    "coxswain_tenant_cached_input_tokens_total", "counter", "Input tokens found in a cache.", _TENANT
)
TENANT_OUTPUT: Final = Metric(
    "coxswain_tenant_output_tokens_total", "counter", "Output tokens delivered.", _TENANT
)
TENANT_RECOMPUTED: Final = Metric(
    "coxswain_tenant_recomputed_tokens_total",
    "counter",
    "Tokens computed again after their KV was lost.",
    _TENANT,
)
TENANT_DISCARDED: Final = Metric(
    "coxswain_tenant_discarded_tokens_total", "counter", "Positions computed in vain.", _TENANT
)
TENANT_FINISHED: Final = Metric(
    "coxswain_tenant_finished_requests_total", "counter", "Requests that ended, for any reason.", _TENANT
)

# The HTTP edge, which exports all of the above.

EDGE_CONNECTED: Final = Metric(
    "coxswain_edge_nats_connected", "gauge", "1 while the API server hears NATS, else 0.", _WORKER
)
EDGE_REFUSALS: Final = Metric(
    "coxswain_edge_refusals_total",
    "counter",
    "HTTP requests that were refused before vLLM saw them.",
    (*_WORKER, "status"),
)

# A controller: its own port, `cox controller --metrics`.

CONTROLLER_INFO: Final = Metric(
    "coxswain_controller_info",
    "gauge",
    "1; the labels identify the controller.",
    (*_FLEET, "controller", "policy", "version"),
)
CONTROLLER_CONNECTED: Final = Metric(
    "coxswain_controller_nats_connected", "gauge", "1 while NATS can be reached, else 0.", _FLEET
)
CONTROLLER_LEADING: Final = Metric(
    "coxswain_controller_leading", "gauge", "1 while it holds the lease, else 0.", _FLEET
)
CONTROLLER_LEADING_SECONDS: Final = Metric(
    "coxswain_controller_leading_seconds", "gauge", "How long it has led; 0 while it does not lead.", _FLEET
)
CONTROLLER_TERMS: Final = Metric(
    "coxswain_controller_terms_total", "counter", "How often it began to lead.", _FLEET
)
CONTROLLER_WORKERS: Final = Metric(
    "coxswain_controller_workers",
    "gauge",
    "Known workers, by whether they were heard recently.",
    (*_FLEET, "liveness"),
)
CONTROLLER_REQUESTS: Final = Metric(
    "coxswain_controller_requests",
    "gauge",
    "Requests on live workers, queued, running and held.",
    (*_FLEET, "state"),
)
CONTROLLER_TENANTS: Final = Metric(
    "coxswain_controller_busy_tenants", "gauge", "Tenants with any request on a live worker.", _FLEET
)
CONTROLLER_STEP: Final = Metric(
    "coxswain_controller_step_seconds", "histogram", "Length of a step: frames in, decisions out.", _FLEET
)
CONTROLLER_FRAME_LAG: Final = Metric(
    "coxswain_controller_frame_lag_seconds",
    "histogram",
    "Time from making a frame to reading it, with the difference of the clocks.",
    _FLEET,
)
CONTROLLER_FRAMES: Final = Metric(
    "coxswain_controller_frames_total", "counter", "Status frames that were read.", _FLEET
)
CONTROLLER_FRAMES_LOST: Final = Metric(
    "coxswain_controller_frames_lost_total",
    "counter",
    "Status frames that were not used: `unreadable`, or of an `impostor`.",
    (*_FLEET, "reason"),
)
CONTROLLER_COMMANDS: Final = Metric(
    "coxswain_controller_commands_total", "counter", "Commands sent.", (*_FLEET, "verb")
)
CONTROLLER_REFUSED: Final = Metric(
    "coxswain_controller_commands_refused_total",
    "counter",
    "Commands that were refused; code `none` if no answer came.",
    (*_FLEET, "verb", "code"),
)
CONTROLLER_RANKS: Final = Metric(
    "coxswain_controller_ranks_total", "counter", "Tenants' ranks sent, one for each row of a `rank`.", _FLEET
)
CONTROLLER_POLICY_FAILURES: Final = Metric(
    "coxswain_controller_policy_failures_total", "counter", "How often the policy raised.", _FLEET
)
CONTROLLER_TABLE_ROWS: Final = Metric(
    "coxswain_controller_table_rows",
    "gauge",
    "Rows in force in the tenant and class tables.",
    (*_FLEET, "table"),
)
CONTROLLER_TABLE_REFUSED: Final = Metric(
    "coxswain_controller_table_refused_rows", "gauge", "Rows that are not in force, because of what they say.",
    (*_FLEET, "table"),
)  # fmt: skip

ALL: Final[dict[str, Metric]] = {
    each.name: each for each in tuple(globals().values()) if isinstance(each, Metric)
}
"""Every family by its name."""
