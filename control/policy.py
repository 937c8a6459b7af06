"""What a policy is: it looks at the fleet and says what should rule. Pure; how to write one: docs/policies.md.

Lives here: the `Policy` protocol, what it may direct, and how one is found by name. May not live here: any
particular policy (`policies/`). Called by `core` and `daemon`; third parties import it to add their own under
the entry point group `coxswain.policies`.
"""

from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from inspect import iscoroutinefunction, isgeneratorfunction
from typing import Any, ClassVar, Final, Literal, NamedTuple, Protocol, get_args

import msgspec

from coxswain.control.errors import PolicyError
from coxswain.control.fleet import Fleet, RequestKey
from coxswain.schemas.names import DEFAULT, MAX_LABEL_CHARS
from coxswain.schemas.policy import ClassPolicy, Count, Prices, TenantPolicy, TenantRank

GROUP: Final = "coxswain.policies"
"""Entry point group: name → a class that satisfies `PolicyType`."""

NONE: Final = "none"
"""How people write null, where a parameter may be that."""
Sees = Literal["tenants", "requests", "queue"]
"""Rows of tenants and classes only; requests too, as frames list them (running, held, the first that wait); or also
those that wait behind, for which workers are asked twice a second."""
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
    about to send something to. A worker does to all children of a request what it does to one: where they differ,
    the request gets the least priority and the first class that is named, and is held if all of them are to be.
    """

    classes: Mapping[str, ClassPolicy] | None = None
    """The class table that is to rule (`Tables.classes`, changed); None leaves it as it is."""
    prices: Prices | None = None
    """What tokens cost in virtual time; None leaves the workers' own."""
    ranks: Mapping[str, Mapping[str, TenantRank]] = {}
    """Base and weight per tenant. A tenant that is not named keeps its own."""
    priorities: Mapping[str, Mapping[RequestKey, int]] = {}
    """Priority per request. A request that is not named keeps its own."""
    moves: Mapping[str, Mapping[RequestKey, str]] = {}
    """Class per request; it must be in the class table. A request that is not named stays where it is."""
    holds: Mapping[str, Mapping[RequestKey, Kv]] = {}
    """Who is held, and with what becoming of the KV. A request that is not named is continued."""
    caps: Mapping[str, Mapping[Group, Cap]] = {}
    """Caps per tenant or class. One that is not named is lifted."""


class Policy(Protocol):
    """A policy. No I/O, no clock of its own, no waiting: `observe` and `decide` run 20 times a second."""

    name: ClassVar[str]

    @property
    def sees(self) -> Sees:
        """What it looks at: the less, the less the controller reads. A plain attribute will do."""

    def observe(self, fleet: Fleet, tables: Tables, now: float) -> None:
        """Look at the fleet; `fleet.changed` names what changed since the last call. `now` is Unix seconds.

        Called on standbys too, so that one that takes over knows what the leader knew.
        """

    def decide(self, now: float) -> Directives:
        """What should rule, as of the last `observe`. Called on the leader only."""


class PolicyType(Protocol):
    """The class behind an entry point: its parameters and how it is made."""

    name: ClassVar[str]
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
    """Make the policy `name` with `key=value` settings; a value is JSON, or `none` where it may be null, or text.

    Raises:
        PolicyError: no such policy (lists those that exist), it cannot be imported or made, is none, or a setting is
            wrong.
    """
    found = available()
    if name not in found:
        raise PolicyError(f"no policy {name!r}; installed: {', '.join(found) or 'none'}")
    type_ = _type_of(found[name])
    params = params_of(type_, settings)
    where = _where(found[name])
    try:
        policy = type_(params)
        problem = _problem(policy)
    except Exception as error:  # whatever somebody else's code does
        raise PolicyError(f"{where} cannot be made: {type(error).__name__}: {error}") from error
    if problem:
        raise PolicyError(f"{where} is not a policy: {problem}")
    return policy


def _where(entry: EntryPoint) -> str:
    return f"policy {entry.name!r} ({entry.value})"


def _problem(policy: Policy) -> str | None:
    """What would not be seen before it leads, or never: a typo in `sees`, a coroutine that nobody awaits."""
    if not (isinstance(policy.name, str) and 0 < len(policy.name) <= MAX_LABEL_CHARS):
        return f"its name is {policy.name!r}, not a text of 1 to {MAX_LABEL_CHARS} characters"
    if policy.sees not in get_args(Sees):
        return f"it sees {policy.sees!r}, which is none of {', '.join(get_args(Sees))}"
    for method in (policy.observe, policy.decide):
        if not callable(method) or iscoroutinefunction(method) or isgeneratorfunction(method):
            return f"{method.__qualname__} is not a plain function"
    return None


def _type_of(entry: EntryPoint) -> PolicyType:
    where = _where(entry)
    try:
        policy: PolicyType = entry.load()
        params = policy.Params
    except Exception as error:  # whatever somebody else's module does while it is imported
        raise PolicyError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(params, type) and issubclass(params, msgspec.Struct)):
        raise PolicyError(f"{where} is not a policy: its Params is not a msgspec.Struct")
    return policy


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """One parameter of a policy, for people."""

    name: str
    kind: str
    """What it may be."""
    default: str
    """The way `--set` takes it; empty where there is none."""


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """An installed policy, for people."""

    name: str
    source: str
    """Module and class."""
    what: str = ""
    """The first line of its docstring."""
    parameters: tuple[Parameter, ...] = ()
    error: str = ""
    """Why it cannot be used, if so."""


def describe(entry: EntryPoint) -> Description:
    """What an installed policy is and takes; never raises for one that cannot be used."""
    try:
        policy = _type_of(entry)
        fields = _fields(policy)
    except (PolicyError, TypeError) as error:  # TypeError: a parameter of a type that has no schema
        return Description(name=entry.name, source=entry.value, error=str(error))
    what = (policy.__doc__ or "").strip().partition("\n")[0]
    parameters = tuple(
        Parameter(name=name, kind=_kind(field), default=_text(field.get("default", "")))
        for name, field in fields.items()
    )
    return Description(name=entry.name, source=entry.value, what=what, parameters=parameters)


def _fields(policy: PolicyType) -> dict[str, dict[str, Any]]:
    """The JSON schema of each parameter by its name."""
    schemas = msgspec.json.schema(policy.Params).get("$defs", {})
    fields: dict[str, dict[str, Any]] = schemas.get(policy.Params.__name__, {}).get("properties", {})
    return fields


def _text(value: Any) -> str:
    if value is None:
        return NONE
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _kind(field: Mapping[str, Any]) -> str:
    """A field of a JSON schema in words: `number, at least 0`."""
    if "anyOf" in field:
        return " or ".join(_kind(each) for each in field["anyOf"])
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    bounds = (
        ("minimum", "at least"), ("exclusiveMinimum", "over"),
        ("maximum", "at most"), ("exclusiveMaximum", "below"),
    )  # fmt: skip
    # Bounds that only keep a number finite say nothing to anybody.
    words = [f"{word} {field[bound]:g}" for bound, word in bounds if abs(field.get(bound, 1e9)) < 1e6]
    kind = str(field.get("type", "anything"))
    return ", ".join([NONE if kind == "null" else kind, *words])


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
    for field in msgspec.structs.fields(policy.Params):
        if values.get(field.encode_name) == NONE and type(None) in get_args(field.type):
            values[field.encode_name] = None
    if unknown := sorted(values.keys() - set(known)):
        raise PolicyError(
            f"policy {policy.name!r} has no parameter {', '.join(unknown)}: "
            f"it takes {', '.join(known) or 'none'}",
        )
    try:
        return msgspec.convert(values, policy.Params, strict=False)
    except msgspec.ValidationError as error:
        raise PolicyError(f"policy {policy.name!r}: {_misfit(policy, values, str(error))}") from error


def _misfit(policy: PolicyType, values: Mapping[str, Any], said: str) -> str:
    """Which value does not fit, and what would; msgspec ends with where: "… - at `$.wq`"."""
    name = said.rpartition("`$.")[2].rstrip("`")
    try:
        return f"{name}={_text(values[name])} does not fit: {_kind(_fields(policy)[name])}"
    except (KeyError, TypeError):  # deeper inside, or of a type that has no schema
        return said


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
