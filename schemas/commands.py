"""Commands: what is asked of a worker, and what it answers.

One struct per verb; `decode` turns a payload into the struct and the names of unknown fields;
`encode` is its inverse. Rules that need state (epoch, expiry, targets) are the worker's to check.
"""

from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any, Final, Literal

import msgspec

from coxswain.schemas.errors import UNREADABLE, Code, RefusedError
from coxswain.schemas.names import NameRefusedError, RequestId, TenantName, Token, check_tenant
from coxswain.schemas.policy import (
    ClassPolicy,
    Count,
    Epoch,
    Int32,
    Prices,
    TenantPolicy,
    TenantRank,
)

MAX_TARGETS: Final = 10_000
"""Ids that one command may name."""
MAX_AHEAD_S: Final = 60.0
"""How far ahead `expires_at` may lie, and how long an id without it is remembered."""
MAX_RESULTS: Final = 1_000
"""Per-target results in one reply; the rest are counted in `results_omitted`."""
MAX_ROWS: Final = 10_000
"""Tenants or classes in one `rank` or `configure`."""

CommandId = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}(?!\n)$")]
Lease = Annotated[float, msgspec.Meta(gt=0, le=86_400.0)]


class Targets(msgspec.Struct, frozen=True, kw_only=True):
    """Which requests a command means: the union of these, resolved once when it is applied."""

    requests: tuple[RequestId, ...] = ()
    tenants: tuple[TenantName, ...] = ()
    classes: tuple[Token, ...] = ()
    all: bool = False

    @property
    def count(self) -> int:
        """How many ids are named."""
        return len(self.requests) + len(self.tenants) + len(self.classes)


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """The envelope of every command."""

    id: CommandId
    """A ULID, or any token that the issuer uses once: a repeated id is answered again and not applied again."""
    issuer: Annotated[str, msgspec.Meta(max_length=128)] = ""
    """Who asks, for logs and events."""
    epoch: Epoch | None = None
    """Required of controllers."""
    expires_at: float | None = None
    """Unix seconds; past it the command is refused, never applied late. At most 60 s ahead."""


class Targeted(Command, frozen=True, kw_only=True):
    """A command about requests."""

    targets: Targets


class Prioritize(Targeted, frozen=True, kw_only=True):
    """Change the priority or class of queued and running requests, from the next step on."""

    priority: Int32 | None = None
    class_: Token | None = msgspec.field(default=None, name="class")


class Preempt(Targeted, frozen=True, kw_only=True):
    """Hold requests: not scheduled again until no hold is left."""

    kv: Literal["keep", "drop"] = "keep"
    """`keep`: nothing is computed twice; `drop`: the blocks are freed and recomputed on continue."""
    lease_s: Lease | None = None
    """The hold ends by itself after this. Required of controllers; null for an operator: until continued."""


class Continue(Targeted, frozen=True, kw_only=True):
    """End this role's hold; an operator's ends every hold."""


class Limit(Targeted, frozen=True, kw_only=True):
    """Caps per tenant or class; null lifts one, an absent field leaves it."""

    max_running: Count | msgspec.UnsetType | None = msgspec.UNSET
    max_queued: Count | msgspec.UnsetType | None = msgspec.UNSET
    max_prefill_tokens_per_step: Count | msgspec.UnsetType | None = msgspec.UNSET


class Rank(Command, frozen=True, kw_only=True):
    """Order between tenants on one worker: bases, weights and prices of virtual time."""

    incarnation: str
    tenants: Annotated[dict[TenantName, TenantRank], msgspec.Meta(max_length=MAX_ROWS)] = {}
    prices: Prices | None = None


class Configure(Command, frozen=True, kw_only=True):
    """Replace both tables, whole."""

    classes: Annotated[dict[Token, ClassPolicy], msgspec.Meta(max_length=MAX_ROWS)] = {}
    tenants: Annotated[dict[TenantName, TenantPolicy], msgspec.Meta(max_length=MAX_ROWS)] = {}


class Abort(Targeted, frozen=True, kw_only=True):
    """End requests; the client sees finish_reason `abort` at once."""

    reason: Annotated[str, msgspec.Meta(max_length=512)] = ""


class Drain(Command, frozen=True, kw_only=True):
    """Refuse new requests; queued ones run, holds end."""

    on: bool


COMMANDS: Final[dict[str, type[Command]]] = {
    "prioritize": Prioritize,
    "preempt": Preempt,
    "continue": Continue,
    "limit": Limit,
    "rank": Rank,
    "configure": Configure,
    "abort": Abort,
    "drain": Drain,
}
VERBS: Final = tuple(COMMANDS)
Outcome = Literal["applied", "unchanged", "not_found", "not_possible"]


class TargetResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one target, where there is more to say than plain success."""

    request: str
    outcome: Outcome
    child: int | None = None
    detail: str = ""
    in_flight_tokens: int = 0
    """Tokens already in flight when a hold was applied: they still reach the client."""


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's answer. `applied` means: no step from number `step` on contradicts the command."""

    id: str
    worker: str
    incarnation: str
    worker_now: float
    step: int
    outcome: Literal["applied", "partial", "rejected"]
    counts: dict[str, int] = {}
    """Targets per outcome."""
    ignored: tuple[str, ...] = ()
    """Unknown fields: a typo shows here."""
    results: tuple[TargetResult, ...] = ()
    results_omitted: int = 0
    code: int | None = None
    error: str | None = None


decode_reply = msgspec.json.Decoder(Reply).decode
encode = msgspec.json.Encoder().encode
_decode_any = msgspec.json.Decoder().decode


def decode(verb: str, payload: bytes) -> tuple[Command, tuple[str, ...]]:
    """Turn a payload into its command and the paths of fields that were ignored.

    Raises:
        RefusedError: 400 for an unknown verb or a payload that does not fit (the text says where),
            413 for more than 10,000 targets.
    """
    struct = COMMANDS.get(verb)
    if struct is None:
        raise RefusedError(Code.MALFORMED, f"unknown verb {verb!r}: one of {', '.join(COMMANDS)}")
    try:
        raw = _decode_any(payload)
        command: Command = msgspec.convert(raw, struct)
        for tenant in _tenants_named(command):
            check_tenant(tenant)
    except (*UNREADABLE, NameRefusedError) as error:
        raise RefusedError(Code.MALFORMED, f"{verb}: {error}") from error
    if isinstance(command, Targeted):
        count = command.targets.count
        if count > MAX_TARGETS:
            raise RefusedError(
                Code.TOO_LARGE,
                f"{count} targets in one command, at most {MAX_TARGETS} are allowed: split it",
            )
        if not count and not command.targets.all:
            raise RefusedError(Code.MALFORMED, "targets are empty: name requests, tenants, classes or all")
    return command, _ignored(raw, struct)


def _tenants_named(command: Command) -> Iterable[str]:
    """Tenant names in a command: the schema bounds their characters, only a check bounds their bytes."""
    match command:
        case Targeted(targets=targets):
            return targets.tenants
        case Rank(tenants=tenants) | Configure(tenants=tenants):
            return tenants
    return ()


def _ignored(raw: dict[str, Any], struct: type[Command]) -> tuple[str, ...]:
    found = _unknown(raw, struct, "")
    if isinstance(targets := raw.get("targets"), dict):
        found += _unknown(targets, Targets, "targets.")
    if struct is Configure:
        for table, row_type in (("classes", ClassPolicy), ("tenants", TenantPolicy)):
            for name, row in raw.get(table, {}).items():
                found += _unknown(row, row_type, f"{table}.{name}.")
    if struct is Rank:
        for name, row in raw.get("tenants", {}).items():
            found += _unknown(row, TenantRank, f"tenants.{name}.")
        if isinstance(prices := raw.get("prices"), dict):
            found += _unknown(prices, Prices, "prices.")
    return tuple(found[:MAX_RESULTS])


def _unknown(raw: dict[str, Any], struct: type[msgspec.Struct], path: str) -> list[str]:
    known = _fields(struct)
    return [] if raw.keys() <= known else [path + str(name)[:128] for name in raw if name not in known]


@cache
def _fields(struct: type[msgspec.Struct]) -> frozenset[str]:
    return frozenset(struct.__struct_encode_fields__)
