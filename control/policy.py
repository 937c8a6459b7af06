"""What a policy is: it looks at the fleet and says what should rule. Pure; how to write one: docs/policies.md.

Lives here: the `Policy` protocol, what it may direct, and how one is found by name. May not live here: any
particular policy (`policies/`). Called by `core` and `daemon`; third parties import it to add their own under
the entry point group `coxswain.policies`.
"""

from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Final, Literal, NamedTuple, Protocol

import msgspec

from coxswain.control.errors import PolicyError
from coxswain.control.fleet import Fleet, RequestKey
from coxswain.schemas.names import DEFAULT
from coxswain.schemas.policy import ClassPolicy, Count, Prices, TenantPolicy, TenantRank

GROUP: Final = "coxswain.policies"
"""Entry point group: name → a class that satisfies `PolicyType`."""

Kv = Literal["keep", "drop"]
Group = tuple[Literal["tenant", "class"], str]
"""Whom a cap is for."""


class Tables(NamedTuple):
    """Both tables as operators want them. The same object as at the last look if nothing in them changed."""

    classes: Mapping[str, ClassPolicy] = {}
    """A row for `default`, for every class of the table, and for every class that any request is in."""
    tenants: Mapping[str, TenantPolicy] = {}
    """Rows of the table only: `weight_of` knows what the others get."""


class Cap(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant or class may have on one worker, beside what the tables say; None: no bound by the policy."""

    max_running: Count | None = None
    max_queued: Count | None = None
    max_prefill_tokens_per_step: Count | None = None


class Directives(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy wants now, whole; the core sends each worker only what it does not have yet.

    All but the first two are per worker. A mapping may be lazy: the core asks it only about workers that it is
    about to send something to.
    """

    classes: Mapping[str, ClassPolicy] | None = None
    """The class table that is to rule (`Tables.classes`, changed); None leaves it as it is."""
    prices: Prices | None = None
    """What tokens cost in virtual time; None leaves the workers' own."""
    ranks: Mapping[str, Mapping[str, TenantRank]] = {}
    """Base and weight per tenant. A tenant that is not named keeps its own."""
    priorities: Mapping[str, Mapping[RequestKey, int]] = {}
    """Priority per request. A request that is not named keeps its own."""
    holds: Mapping[str, Mapping[RequestKey, Kv]] = {}
    """Who is held, and with what becoming of the KV. A request that is not named is continued."""
    caps: Mapping[str, Mapping[Group, Cap]] = {}
    """Caps per tenant or class. One that is not named is lifted."""


class Policy(Protocol):
    """A policy. No I/O, no clock of its own, no waiting: `observe` and `decide` run 20 times a second."""

    name: ClassVar[str]
    sees_requests: ClassVar[bool]
    """Whether it looks at single requests. One that does not saves the controller most of its reading."""

    def observe(self, fleet: Fleet, tables: Tables, now: float) -> None:
        """Look at the fleet; `fleet.changed` names what changed since the last call. `now` is Unix seconds.

        Called on standbys too, so that one that takes over knows what the leader knew.
        """

    def decide(self, now: float) -> Directives:
        """What should rule, as of the last `observe`. Called on the leader only."""


class PolicyType(Protocol):
    """The class behind an entry point: its parameters and how it is made."""

    name: ClassVar[str]
    sees_requests: ClassVar[bool]
    Params: type[msgspec.Struct]

    def __call__(self, params: Any) -> Policy:
        """A policy with these parameters, an instance of `Params`."""


def weight_of(tenants: Mapping[str, TenantPolicy], tenant: str) -> float:
    """The tenant's weight: its row's, else that of tenant `default`, else 1 (as workers do it)."""
    row = tenants.get(tenant) or tenants.get(DEFAULT)
    return row.weight if row else 1.0


def each_class(classes: Mapping[str, ClassPolicy], /, **fields: Any) -> dict[str, ClassPolicy]:
    """The class table with these fields in every row."""
    return {name: msgspec.structs.replace(row, **fields) for name, row in classes.items()}


def available() -> dict[str, EntryPoint]:
    """The policies that are installed, by name."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def load(name: str, settings: Iterable[str] = ()) -> Policy:
    """Make the policy `name` with `key=value` settings; a value is JSON, or text if it is not.

    Raises:
        PolicyError: no such policy (lists those that exist), it cannot be imported, or a setting is wrong.
    """
    found = available()
    if name not in found:
        raise PolicyError(f"no policy {name!r}; installed: {', '.join(found) or 'none'}")
    try:
        policy: PolicyType = found[name].load()
    except (ImportError, AttributeError) as error:
        raise PolicyError(f"policy {name!r} ({found[name].value}) cannot be imported: {error}") from error
    return policy(params_of(policy, settings))


def params_of(policy: PolicyType, settings: Iterable[str]) -> msgspec.Struct:
    """The policy's parameters from `key=value` settings.

    Raises:
        PolicyError: a setting has no `=`, no such parameter exists, or its value does not fit.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise PolicyError(f"setting {setting!r} is not a pair: write key=value")
        values[key.strip()] = _value(text)
    known = policy.Params.__struct_encode_fields__
    if unknown := sorted(values.keys() - set(known)):
        raise PolicyError(
            f"policy {policy.name!r} has no parameter {', '.join(unknown)}: "
            f"it takes {', '.join(known) or 'none'}",
        )
    try:
        return msgspec.convert(values, policy.Params, strict=False)
    except msgspec.ValidationError as error:
        raise PolicyError(f"policy {policy.name!r}: {error}") from error


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
