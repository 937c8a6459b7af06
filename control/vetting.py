"""What workers would refuse of what a policy wants: found before it is sent, told as a failure, and left out. Pure.

A worker refuses a command whole: one tenant's weight of 0 would keep everybody's rank from it. What policies say is
made of what others say, and a policy is others' code, so nothing of it is taken on trust; and as it is looked at twenty
times a second, only what is about to be sent is looked at. Called by `core` and `requests`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from coxswain.control.errors import PolicyError
from coxswain.control.policy import Cap, Group, Kv
from coxswain.schemas.commands import MAX_ROWS
from coxswain.schemas.names import MAX_TENANT_BYTES, Token, check_tenant, check_token
from coxswain.schemas.policy import (
    INT32_MAX,
    INT32_MIN,
    MAX_BASE,
    MAX_QUANTITY,
    MAX_WEIGHT,
    MIN_WEIGHT,
    ClassPolicy,
    Int32,
    Prices,
    TenantPolicy,
    TenantRank,
    digest,
    plain,
)

Kind = TypeVar("Kind")
SHOWN: Final = 80
"""Characters of a name in a message."""


class Vetting:
    """What was found wrong since it was `begun`.

    Args:
        patient: whether what is wrong is left out; else it raises `PolicyError`.
    """

    def __init__(self, *, patient: bool) -> None:
        self.error: Exception | None = None
        """The first that was found."""
        self._patient = patient
        self._prices: Prices | None = None
        self._classes: set[str] = set()
        """Names that are good."""

    def begin(self) -> None:
        """Forget what was found."""
        self.error = None

    def refuse(self, what: str, error: Exception) -> None:
        """This cannot be sent."""
        refused = PolicyError(f"{what[:SHOWN]}: {error}; no worker would take it, so it is left out")
        refused.__cause__ = error
        if not self._patient:
            raise refused
        self.error = self.error or refused

    def take(self, what: str, value: Any, kind: type[Kind] | Any) -> Kind | None:
        """The value as a worker would read it; None if it would not."""
        try:
            taken: Kind = msgspec.convert(msgspec.to_builtins(value), kind)
        except Exception as error:  # noqa: BLE001 - it may be anything, and do anything when it is looked at
            self.refuse(what, error)
            return None
        return taken

    def rank(self, tenant: str, rank: TenantRank, *, named: bool = False) -> TenantRank | None:
        """A tenant's, of which the name was looked at before if it is `named`.

        There may be a thousand in a step: the usual is not converted.
        """
        usual = type(tenant) is str and (named or (tenant.isascii() and 0 < len(tenant) <= MAX_TENANT_BYTES))
        if not usual and not self._named(f"rank of tenant {tenant!r}", check_tenant, tenant):
            return None
        if (
            type(rank) is TenantRank
            and type(base := rank.base) is float
            and type(weight := rank.weight) is float
            and type(expected := rank.expected_output) is float
            and -MAX_BASE <= base <= MAX_BASE
            and MIN_WEIGHT <= weight <= MAX_WEIGHT
            and 0.0 <= expected <= MAX_QUANTITY
        ):
            return rank
        return self.take(f"rank of tenant {tenant!r}", rank, TenantRank)

    def prices(self, prices: Prices | None) -> Prices | None:
        """What tokens are to cost."""
        if prices is not None and prices != self._prices:
            taken: Prices | None = self.take("prices", prices, Prices)
            if taken is None:
                return None
            self._prices = taken
        return None if prices is None else self._prices

    def priority(self, request: str, priority: int) -> int | None:
        """A request's."""
        if type(priority) is int and INT32_MIN <= priority <= INT32_MAX:
            return priority
        return self.take(f"priority of {request}", priority, Int32)

    def class_(self, request: str, name: str) -> str | None:
        """A request's: one of few, as a rule."""
        if type(name) is str and name in self._classes:
            return name
        taken: str | None = self.take(f"class of {request}", name, Token)
        if taken is not None and len(self._classes) < MAX_ROWS:
            self._classes.add(taken)
        return taken

    def kv(self, request: str, kv: Kv) -> Kv | None:
        """What becomes of the KV of a request that is held."""
        return self.take(f"hold of {request}", kv, Kv)

    def cap(self, group: Group, cap: Cap) -> Cap | None:
        """Whom a cap is for, too."""
        what = f"cap of {group}"
        if self.take(what, group, Group) is None:
            return None
        kind, name = group
        check = check_tenant if kind == "tenant" else partial(msgspec.convert, type=Token)
        return self.take(what, cap, Cap) if self._named(what, check, name) else None

    def class_row(self, name: str, row: ClassPolicy) -> ClassPolicy | None:
        """With 30.0 where a policy wrote 30, as a worker reads it: or their digests would differ for ever."""
        what = f"class {name!r}"
        return (
            self.take(what, row, ClassPolicy)
            if self._named(what, partial(check_token, "class"), name)
            else None
        )

    def _named(self, what: str, check: Callable[[str], Any], name: str) -> bool:
        try:
            check(name)
        except Exception as error:  # noqa: BLE001 - it may be no text
            self.refuse(what, error)
            return False
        return True


class Config(NamedTuple):
    """Both tables as workers are to have them: what is sent is what was digested, a copy of what others may edit."""

    classes: Mapping[str, ClassPolicy] = {}
    tenants: Mapping[str, TenantPolicy] = {}
    digest: str = ""
    made_of: tuple[Mapping[str, ClassPolicy], Mapping[str, TenantPolicy] | None] = ({}, None)
    """The class table as it was wanted, and whose copy `tenants` is: that is not compared row by row in each step."""
    error: Exception | None = None
    """What is wrong with the class table."""

    @classmethod
    def of(
        cls,
        wanted: Mapping[str, ClassPolicy],
        tenants: Mapping[str, TenantPolicy],
        operators: Mapping[str, ClassPolicy],
        vetting: Vetting,
    ) -> "Config":
        """The tables with the classes that a policy wants; for a row that no worker would take, the operators'."""
        copy = dict(wanted)
        if len(wanted) > MAX_ROWS:
            vetting.refuse("classes", ValueError(f"{len(wanted)} rows, at most {MAX_ROWS} are allowed"))
            wanted = operators
        told = {}
        for name, row in wanted.items():
            good = vetting.class_row(name, row) or operators.get(name)
            if good is not None:
                told[name] = plain(good)
        theirs = {name: plain(row) for name, row in tenants.items()}
        return cls(told, theirs, digest(told, theirs), (copy, tenants), vetting.error)
