"""Policy tables and the leader's heartbeat: what a class or tenant means, who leads.

The tables live in JetStream KV, one key per class or tenant; the leader applies both with `configure`.
"""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Final, Literal, TypeVar

import msgspec

from coxswain.schemas.names import DEFAULT, Label, Token

Int32 = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e9
Weight = Annotated[float, msgspec.Meta(ge=MIN_WEIGHT, le=MAX_WEIGHT)]
"""Not only positive: tokens ÷ weight must stay finite, or virtual times could not be ordered."""
MAX_QUANTITY: Final = 1e12
NotNegative = Annotated[float, msgspec.Meta(ge=0, le=MAX_QUANTITY)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
MAX_BASE: Final = 1e18
Finite = Annotated[float, msgspec.Meta(ge=-MAX_BASE, le=MAX_BASE)]

LEADER_LEASE_S: Final = 5.0
"""How long workers obey a leader that is silent, unless `COX_LEADER_LEASE_S` says otherwise."""

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1

Epoch = tuple[float, Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]]
"""`[bucket created at (s), create revision]` of the lease; compared in order; the fencing token."""

Order = Literal["fair", "priority"]
CutIn = Literal["off", "queue", "slots", "kv"]


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """What a token costs in virtual time. The defaults are VTC's wp = 1 and wq = 2 (OSDI'24, section 4.1)."""

    input: NotNegative = 1.0
    """Per input token that the prefix cache did not have, at admission."""
    cached: NotNegative = 0.0
    """Per input token found in the prefix cache, at admission."""
    output: NotNegative = 2.0
    """Per output token, as delivered or expected. Recomputed tokens are free."""


class ClassPolicy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One row of the class table."""

    position: Int32 = 0
    """Classes with a lower position run first; equal positions by name."""
    order: Order = "fair"
    """`fair`: by tenant virtual time; `priority`: by priority, then arrival, across tenants."""
    cut_in: CutIn = "off"
    quantum_s: NotNegative = 0.0
    cooldown_s: NotNegative = 0.0
    ageing_s: NotNegative | None = None
    max_prefill_tokens_per_step: Count | None = None
    borrow: bool = False
    slo_s: Positive | None = None
    """Deadline of a request = its arrival + this."""
    max_running: Count | None = None
    """Requests of the class, of all tenants together, that may run at once on one worker."""
    max_queued: Count | None = None
    """Requests of the class that may wait on one worker; the HTTP edge refuses more (429)."""
    linger_s: NotNegative = 0.0
    """How long its step budget stays in force after a better class was last present."""
    stand_aside: bool = False
    """Running requests of the class wait while one of a better class computes its first token."""


class TenantPolicy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One row of the tenant table. A tenant without a row has that of tenant `default`, or these defaults."""

    weight: Weight = 1.0
    """Share relative to other tenants."""
    class_: Token = msgspec.field(default=DEFAULT, name="class")
    """The class of requests that ask for none."""
    classes: Annotated[tuple[Token, ...], msgspec.Meta(max_length=64)] = ()
    """Classes that the tenant may ask for beside its own."""
    priority_min: Int32 = INT32_MIN
    priority_max: Int32 = INT32_MAX
    """A request's priority is clamped to this range."""
    max_running: Count | None = None
    """Requests of the tenant, of all classes together, that may run at once on one worker."""
    max_queued: Count | None = None
    """Requests of the tenant that may wait on one worker; the HTTP edge refuses more (429)."""

    def problem(self) -> str | None:
        """What is wrong with the row beyond its types, or None."""
        if self.priority_min > self.priority_max:
            return f"priority_min {self.priority_min} is above priority_max {self.priority_max}"
        return None


Row = TypeVar("Row", ClassPolicy, TenantPolicy)


class TenantRank(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """What a `rank` says of one tenant on one worker."""

    base: Finite = 0.0
    """virtual_time = base + charged + lift; may be negative."""
    weight: Weight = 1.0
    expected_output: NotNegative = 0.0
    """Output tokens charged when a request is admitted: beyond them it is charged as they come, and at the end what
    did not come is given back (VTC, OSDI'24, algorithm 3)."""


class Sight(msgspec.Struct, frozen=True, kw_only=True):
    """What a leader sees of its fleet."""

    workers: int = 0
    tenants: int = 0
    queued: int = 0
    running: int = 0
    held: int = 0


class Lead(msgspec.Struct, frozen=True, kw_only=True):
    """The leader's heartbeat on `lead`."""

    epoch: Epoch
    controller: Label
    policy: Label
    at: float
    sees: Sight = Sight()


class LeaseHolder(msgspec.Struct, frozen=True, kw_only=True):
    """The value of the lease key: who holds it."""

    controller: Label
    policy: Label
    since: float
    version: str = ""
    """Of Coxswain, on the controller."""


def plain(row: Row) -> Row:
    """An equal row that leaves out every default when it is encoded, also for a `digest`.

    msgspec leaves out only what *is* the default: a 1.0 that was decoded is not the object in the struct.
    """
    fields = zip(row.__struct_fields__, row.__struct_defaults__, strict=True)
    spelt = {name: default for name, default in fields if _spells_out(getattr(row, name), default)}
    return msgspec.structs.replace(row, **spelt) if spelt else row


def _spells_out(value: object, default: object) -> bool:
    return value is not default and value == default


def digest(classes: Mapping[str, ClassPolicy], tenants: Mapping[str, TenantPolicy]) -> str:
    """16 hex digits that name the two tables: equal tables of `plain` rows have equal digests, wherever computed.

    Defaults are left out: a version that does not know a field computes the same digest while nobody uses it.
    """
    text = msgspec.json.encode({"classes": classes, "tenants": tenants}, order="deterministic")
    return hashlib.sha256(text).hexdigest()[:16]
