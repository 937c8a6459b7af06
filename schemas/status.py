"""Status: what a worker reports of itself, 20 times a second while anything changes, in full every second.

All values are absolute and totals are cumulative since `incarnation`, so a lost frame loses nothing:
the next full frame repairs what a gap in `seq` left out.
"""

from collections.abc import Callable
from typing import Annotated, Final, Literal

import msgspec

from coxswain.schemas.names import DEFAULT, RequestId
from coxswain.schemas.policy import ClassPolicy, Count, Epoch, Int32, Prices, TenantPolicy

MAX_PARTS: Final = 4_096
"""Parts of one frame: what NATS takes in a message, as often, is 4 GiB."""

ZERO: Final = 0.0
ONE: Final = 1.0
"""Defaults of a tenant's numbers. msgspec omits them only where they are these very objects: write `number or ZERO`."""

Number = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
"""Bounded, so that sums and squares of many stay finite, whoever sent them."""
Total = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
ShortName = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
State = Literal["serving", "draining", "paused"]
RequestState = Literal["queued", "running", "held"]
Kv = Literal["none", "kept", "parked", "dropped"]
"""Where a held request's KV is: `none` for one that had computed nothing."""


class Slots(msgspec.Struct, frozen=True, kw_only=True):
    """Room for requests: `active` may run at once, `total` is what the model runner has."""

    active: Count
    total: Count
    running: Count
    held: Count


class KvBlocks(msgspec.Struct, frozen=True, kw_only=True):
    """KV cache blocks: in all, in use, and those that held requests keep."""

    total: Count
    used: Count
    held: Count


class CommandStats(msgspec.Struct, frozen=True, kw_only=True):
    """What became of commands since `incarnation`."""

    applied_total: Total = 0
    rejected_total: dict[str, Total] = {}
    """By refusal code, as text."""
    outcomes_total: dict[str, dict[str, Total]] = {}
    """The same by verb, then by outcome: `applied`, `partial`, or the refusal's code. Unknown verbs count as
    `other`."""
    queue_depth: Total = 0


class Leader(msgspec.Struct, frozen=True, kw_only=True):
    """The leader this worker last heard."""

    epoch: Epoch | None = None
    age_s: Number | None = None
    policy: str | None = None


class TenantStatus(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """One tenant on one worker. virtual_time = base + charged + lift."""

    tenant: str
    class_: str = msgspec.field(name="class", default=DEFAULT)
    queued: Count = 0
    running: Count = 0
    held: Count = 0
    oldest_queued_s: Number = ZERO
    virtual_time: Number = ZERO
    base: Number = ZERO
    charged: Number = ZERO
    lift: Number = ZERO
    weight: Number = ONE
    uncached_input_tokens_total: Total = 0
    cached_input_tokens_total: Total = 0
    output_tokens_total: Total = 0
    recomputed_tokens_total: Total = 0
    finished_total: Total = 0
    external_input_tokens_total: Total = 0
    """Of the cached input: loaded by a KV connector."""
    uncomputed_input_tokens_total: Total = 0
    """Of the uncached input: never computed after all."""
    restored_tokens_total: Total = 0
    reloaded_tokens_total: Total = 0
    """Positions whose KV was lost and found again: in the prefix cache; by a KV connector."""
    discarded_tokens_total: Total = 0
    """Positions computed in vain."""
    max_running: Count | None = None
    max_queued: Count | None = None
    """Caps in force, the strictest of the table's and every role's `limit`; null: none."""
    classes: tuple[str, ...] = ()
    """Classes that its requests may ask for beside `class`, as its row of the table says."""
    expected_output: Number = ZERO
    """Output tokens that the leader expects of each of its requests: charged at admission."""


class ClassStatus(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """One class on one worker, over all tenants."""

    class_: str = msgspec.field(name="class")
    queued: Count
    running: Count
    held: Count
    oldest_queued_s: Number
    max_running: Count | None = None
    max_queued: Count | None = None
    """Caps in force, the strictest of the table's and every role's `limit`; null: none."""


class RequestStatus(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """One request: running, held, or among the first that wait."""

    request: str
    child: Count
    tenant: str
    class_: str = msgspec.field(name="class")
    priority: Int32
    state: RequestState
    kv: Kv
    arrived_at: Number
    prompt_tokens: Count
    cached_tokens: Count
    output_tokens: Count
    deadline_s: Number | None
    held_by: tuple[str, ...] = ()
    """Roles that hold it; `engine` made room with it and continues it by itself."""
    position: Count | None = None
    """Place in the queue, 0 is next; null unless queued."""
    protected_until: Number | None = None
    """Until then (Unix s) a cut-in may not take its place; null: it may now, or never could."""


class Gone(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """A request that a delta no longer lists."""

    request: str
    child: Count
    output_tokens: Count = 0
    """As many as it had been delivered: the last that was said of it is of the frame before."""


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """One status frame, or one part of it."""

    worker: ShortName
    incarnation: ShortName
    seq: Total
    full: bool
    part: Annotated[int, msgspec.Meta(ge=0, le=MAX_PARTS - 1)]
    """From 0."""
    parts: Annotated[int, msgspec.Meta(ge=1, le=MAX_PARTS)]
    sent_at: Number
    step: Total
    model: str
    vllm_version: str
    state: State
    slots: Slots
    kv_blocks: KvBlocks
    step_s: Number
    """Moving median of the time between steps while busy."""
    queued: Count
    running: Count
    held: Count
    preempted_total: Total
    """How often a request lost its KV: preempted (event `preempted`) or dropped while held (event `dropped`)."""
    recomputed_tokens_total: Total
    commands: CommandStats
    leader: Leader
    config: str
    """Digest of the tables in force."""
    events_dropped_total: Total
    events_waiting: Total = 0
    """Events that the log has not acknowledged yet."""
    events_waiting_s: Number = 0.0
    """How long the oldest of them has waited."""
    revision: Total = 0
    """Grows by one with every delta. A full frame has that of the last delta: a reader that merged every revision up to
    it knows all its rows already, except for ages. 0: nothing is promised."""
    classes: tuple[ClassStatus, ...] = ()
    charged: dict[str, Number] = {}
    """In a delta: tenants that were served or ranked and of which nothing else changed, with their `charged`. Their
    rows are the last of `tenants`, in this order; a reader that merged all revisions before and counts no output can
    skip them."""
    bases: dict[str, Number] = {}
    """Of these tenants, those whose `base` changed, with the new one."""
    tenants: tuple[TenantStatus, ...] = ()
    requests: tuple[RequestStatus, ...] = ()
    gone: tuple[Gone, ...] = ()


MAX_PAGE: Final = 1_000
"""Requests on one page of `query queue`."""


class QueuePage(msgspec.Struct, frozen=True, kw_only=True):
    """Reply to `query queue`: the queue in order from `after` on; pages of a queue that moves may overlap."""

    requests: tuple[RequestStatus, ...]
    next: str | None
    """An opaque cursor (a place in the queue, no request's name): pass it as `after`; null at the end."""
    total: Count


class QueueQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Payload of `query queue`; an empty payload asks for the first page."""

    after: Annotated[str, msgspec.Meta(max_length=32)] | None = None
    """What the page before gave as `next`; null for the first page."""
    limit: int = 100
    """1 to 1000."""


class RequestQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Payload of `query request`."""

    request: RequestId


class StoryLine(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened to a request."""

    at: float
    step: int
    kind: str
    detail: str = ""


class Child(msgspec.Struct, frozen=True, kw_only=True):
    """One child of a request and its story so far."""

    status: RequestStatus
    story: tuple[StoryLine, ...]


class RequestReport(msgspec.Struct, frozen=True, kw_only=True):
    """Reply to `query request`."""

    request: str
    children: tuple[Child, ...]


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Reply to `query config`: everything in force on a worker."""

    worker: str
    incarnation: str
    digest: str
    classes: dict[str, ClassPolicy]
    tenants: dict[str, TenantPolicy]
    prices: Prices
    leader: Leader
    vllm_version: str
    scheduler: dict[str, str | int | float | bool | None]
    """vLLM's settings that matter here: slots, budgets, prefix caching, async scheduling, model runner."""


decode_frame = msgspec.json.Decoder(Frame).decode
decode_page = msgspec.json.Decoder(QueuePage).decode
decode_report = msgspec.json.Decoder(RequestReport).decode
decode_config = msgspec.json.Decoder(Config).decode


def decode_glance(payload: bytes, decode: Callable[[bytes], Frame] = decode_frame) -> Frame:
    """A frame as `decode` gives it, but without single requests: a fraction of the time where there are many."""
    # Workers write requests last, and no JSON string can contain these bytes: what follows need not be read.
    tenants = payload.find(b'"tenants":[')
    # Searching for the end of their rows first is many times faster.
    end = payload.find(b',"requests":[', payload.find(b"]", tenants))
    if end > tenants > 0 and payload.find(b'"classes":[', 0, end) > 0:
        try:
            return decode(payload[:end] + b"}")
        except msgspec.MsgspecError:
            pass  # somebody else's order of fields
    return msgspec.structs.replace(decode(payload), requests=(), gone=())
