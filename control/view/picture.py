"""What people see of a fleet: plain rows, the same for the terminal (`cox top`), for a page and for programs.

Only structs: `overview.py` makes them from status frames, `top/` shows them.
"""

from typing import Literal

import msgspec

from coxswain.control.fleet import Liveness
from coxswain.schemas.policy import Epoch
from coxswain.schemas.status import RequestStatus, State

Weight = Literal["news", "warning"]
"""How much a happening matters: a warning is something to look at."""


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One worker as last heard."""

    worker: str
    liveness: Liveness
    state: State
    model: str
    queued: int
    running: int
    held: int
    active_slots: int
    running_slots: int
    held_slots: int
    kv_used: float
    kv_held: float
    """Of all KV blocks, 0 to 1: in use; kept by held requests."""
    step_s: float
    output_tokens_per_s: float
    """Of late (`overview.WINDOW_S`)."""
    applied_total: int
    rejected_total: int
    leader_policy: str | None
    leader_age_s: float | None
    """Since this worker heard its leader; null: never."""
    silent_s: float
    """Since its last frame."""


class TenantRow(msgspec.Struct, frozen=True, kw_only=True):
    """One tenant over all live workers."""

    tenant: str
    class_: str = msgspec.field(name="class")
    weight: float
    queued: int
    running: int
    held: int
    oldest_queued_s: float
    virtual_time: float
    """The highest over workers."""
    share: float
    """Of all service of late, 0 to 1: priced tokens, as the workers charged them."""
    due: float
    """What its weight is worth: its part, among the tenants of its class that want anything, of what the class got."""
    output_tokens_per_s: float
    """Of late."""
    ttft_s: float | None
    """Median time to first token of the requests that frames showed beginning to speak of late; null: none."""
    output_tokens_total: int
    recomputed_tokens_total: int
    finished_total: int
    max_running: int | None
    max_queued: int | None
    """The strictest cap in force on any worker."""


class ClassRow(msgspec.Struct, frozen=True, kw_only=True):
    """One class over all live workers."""

    class_: str = msgspec.field(name="class")
    queued: int
    running: int
    held: int
    oldest_queued_s: float
    share: float
    """Of all service of late, 0 to 1: that of the tenants whose class it is."""
    max_running: int | None
    max_queued: int | None


class RequestRow(msgspec.Struct, frozen=True, kw_only=True):
    """One request and the worker that has it."""

    worker: str
    status: RequestStatus


class LeaderRow(msgspec.Struct, frozen=True, kw_only=True):
    """The leader that most workers obey: of the newest epoch that any of them heard."""

    epoch: Epoch
    policy: str | None
    age_s: float
    """Since the last worker heard it."""


class Happening(msgspec.Struct, frozen=True, kw_only=True):
    """Something that frames showed to have happened."""

    at: float
    worker: str
    text: str
    weight: Weight = "news"


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """A whole fleet at one moment."""

    fleet: str
    at: float
    leader: LeaderRow | None
    queued: int
    running: int
    held: int
    output_tokens_per_s: float
    workers: tuple[WorkerRow, ...]
    tenants: tuple[TenantRow, ...]
    classes: tuple[ClassRow, ...]
    happenings: tuple[Happening, ...]
    """The latest last."""
