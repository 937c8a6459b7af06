"""What one worker says of its tenants, as it is kept: whole rows, or of each the numbers that order it. Pure.

A policy that looks at tenants only is asked 20 times a second about thousands of rows of which each is replaced as
often. A row is a dozen objects all over the memory, and to wait for them is most of what merging costs; so for such
a policy they are let go of at once, and a few numbers are kept in arrays. Called by `fleet`; policies read them.
"""

from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from math import isnan, nan
from sys import intern
from typing import Final

import msgspec

from coxswain.schemas.names import is_tenant
from coxswain.schemas.policy import TenantRank
from coxswain.schemas.status import TenantStatus

MAX_SHARED: Final = 16_384
"""Places that the workers of a fleet share; one that knows a tenant beyond has places of its own. 40 bytes each on
every worker, used there or not: at most 0.7 MB."""
_EXACT: Final = 2**53
"""Whole numbers up to this one are the same as floats."""


class Account(msgspec.Struct, frozen=True, gc=False):
    """What orders a tenant on one worker: so much of its `TenantStatus`."""

    tenant: str
    base: float
    charged: float
    lift: float
    input_tokens: float
    """Of admitted requests, cached or not. Of a tenant that waits as of when it began to, or was last lifted."""
    weight: float = 1.0
    expected_output: float = 0.0
    max_running: int | None = None
    max_queued: int | None = None

    @property
    def virtual_time(self) -> float:
        """What orders it."""
        return self.base + self.charged + self.lift


Terms = tuple[float, float, int | None, int | None]
"""What a tenant was given on a worker, by its row of the table and by commands: weight, expected output, caps."""
USUAL: Final[Terms] = (1.0, 0.0, None, None)

Row = TenantStatus | Account
"""Of a tenant on one worker, what is kept of it."""
News = Iterator[tuple[TenantStatus, Row | None]]
"""Rows of tenants to whom perhaps more happened than that they waited and were served, with those before."""


class Rows(dict[str, TenantStatus]):
    """The latest row of each tenant, whole.

    Args:
        seen: is told of every row that replaces another.
    """

    def __init__(self, seen: Callable[[TenantStatus, TenantStatus], None] | None = None) -> None:
        super().__init__()
        self._seen = seen

    def put(self, rows: Iterable[TenantStatus], served: MutableMapping[str, float]) -> News:
        """Take rows of whoever can be a tenant; add to `served`, per tenant, what was charged since those before."""
        for row in rows:
            name = row.tenant
            if (old := self.get(name)) is None:
                if not is_tenant(name):
                    continue
                # All workers share one string, which every look-up compares: so it stays in the processor's cache.
                name = intern(name)
            self[name] = row
            served[name] += row.charged - (0.0 if old is None else old.charged)
            if old is not None and self._seen is not None:
                self._seen(row, old)
            if old is None or not (old.queued and row.queued) or row.lift != old.lift:
                yield row, old

    def differing(self, rows: Iterable[TenantStatus], busy: Collection[str]) -> list[TenantStatus]:  # noqa: ARG002
        """Those that are other than the ones before."""
        return [row for row in rows if self.get(row.tenant) != row]

    def find(self, tenant: str) -> TenantStatus | None:
        """The row of a tenant, if it is known."""
        return self.get(tenant)

    def rank(self, tenant: str) -> TenantStatus | None:
        """What a tenant was told that is known: its row has that, too."""
        return self.get(tenant)

    def idle(self, tenant: str) -> TenantStatus:
        """The row of a tenant that is known, if it had nothing queued, running or held."""
        return msgspec.structs.replace(self[tenant], queued=0, running=0, held=0)

    def spent(self, tenants: Iterable[str]) -> list[float]:
        """What the virtual time of each is over its base; of one that is not known, 0."""
        rows = map(self.get, tenants)
        return [0.0 if row is None else row.charged + row.lift for row in rows]

    def waiting(self) -> set[str]:
        """Tenants with anything queued."""
        return {name for name, row in self.items() if row.queued}


class Accounts(Mapping[str, Account]):
    """The account of each tenant, a column for each number. Methods as those of `Rows`.

    Args:
        places: where in the columns a tenant is. Workers share it, so that it stays in the processor's cache.
    """

    def __init__(self, places: dict[str, int]) -> None:
        self._places = places
        self._shared = True
        self._known: dict[str, None] = {}
        """Tenants of this worker; others' places are empty."""
        self._base, self._charged, self._lift = array("d"), array("d"), array("d")
        self._input = array("d")
        """Of tenants that are not this worker's, not a number."""
        self._steady = array("d")
        """The lift of a tenant that waits. Of others it is not a number, and so unequal to every lift."""
        self._columns = (self._base, self._charged, self._lift, self._input, self._steady)
        self._terms: dict[str, Terms] = {}
        """Of tenants that have others than `USUAL`."""

    def put(self, rows: Iterable[TenantStatus], served: MutableMapping[str, float]) -> News:
        """Take rows of whoever can be a tenant; add to `served`, per tenant, what was charged since those before."""
        # Thousands of rows in every step of a large fleet, most of tenants that wait, and were served a little.
        places, terms = self._places, self._terms
        bases, charges, steady = self._base, self._charged, self._steady
        if len(charges) < len(places):
            self._grow()
        for row in rows:
            name = row.tenant
            try:
                at = places[name]
            except KeyError:
                if not is_tenant(name):
                    continue
                at = self._place(name)
                places = self._places
            if row.lift != steady[at] or not row.queued:
                if (old := self.find(name)) is None:
                    self._known[intern(name)] = None
                self._lift[at], self._input[at] = row.lift, _input(row)
                steady[at] = row.lift if row.queued else nan
                yield row, old
            if (
                row.weight != 1.0
                or row.expected_output
                or row.max_running is not None
                or row.max_queued is not None
                or name in terms
            ):
                self._agree(row)
            charged = row.charged
            served[name] += charged - charges[at]
            charges[at] = charged
            bases[at] = row.base

    def rebase(self, bases: Mapping[str, float]) -> None:
        """Take the bases that tenants of whom a row was put have now."""
        places, columns = self._places, self._base
        for name, base in bases.items():
            if (at := places.get(name)) is not None and at < len(columns):
                columns[at] = base

    def charge(self, charged: Mapping[str, float], served: MutableMapping[str, float]) -> None:
        """Take what tenants of whom a row was put were charged by now, as `put` does."""
        places, charges = self._places, self._charged
        if len(charges) < len(places):
            self._grow()
        for name, charge in charged.items():
            try:
                at = places[name]
            except KeyError:
                continue
            served[name] += charge - charges[at]
            charges[at] = charge

    def differing(self, rows: Iterable[TenantStatus], busy: Collection[str]) -> list[TenantStatus]:
        """Those that say anything else than the ones before, or might."""
        return [
            row
            for row in rows
            if row.queued or row.running or row.held or row.tenant in busy or not self._repeats(row)
        ]

    def find(self, tenant: str) -> Account | None:
        """The account of a tenant, if it is known."""
        if (at := self._at(tenant)) is None:
            return None
        base, charged, lift, tokens = self._base[at], self._charged[at], self._lift[at], self._input[at]
        if tenant not in self._terms:
            return Account(tenant, base, charged, lift, tokens)
        return Account(tenant, base, charged, lift, tokens, *self._terms[tenant])

    def rank(self, tenant: str) -> TenantRank | None:
        """What a tenant was told that is known, as its account says."""
        if (at := self._at(tenant)) is None:
            return None
        if tenant not in self._terms:
            return TenantRank(base=self._base[at])
        weight, expected_output, *_ = self._terms[tenant]
        return TenantRank(base=self._base[at], weight=weight, expected_output=expected_output)

    def idle(self, tenant: str) -> TenantStatus:
        """A row of a tenant that is known, if it had nothing queued, running or held."""
        account = self[tenant]
        return TenantStatus(
            tenant=tenant, virtual_time=account.virtual_time, base=account.base, charged=account.charged,
            lift=account.lift, weight=account.weight, uncached_input_tokens_total=int(account.input_tokens),
            max_running=account.max_running, max_queued=account.max_queued,
            expected_output=account.expected_output,
        )  # fmt: skip

    def spent(self, tenants: Iterable[str]) -> list[float]:
        """What the virtual time of each is over its base; of one that is not known, 0."""
        charges, lifts, size = self._charged, self._lift, len(self._charged)
        places = map(self._places.get, tenants)
        return [0.0 if at is None or at >= size else charges[at] + lifts[at] for at in places]

    def waiting(self) -> set[str]:
        """Tenants with anything queued."""
        return {name for name in self._known if not isnan(self._steady[self._places[name]])}

    def __getitem__(self, tenant: str) -> Account:
        if (account := self.find(tenant)) is None:
            raise KeyError(tenant)
        return account

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def _at(self, tenant: str) -> int | None:
        """The place of a tenant that is known here."""
        try:
            at = self._places[tenant]
            return None if isnan(self._input[at]) else at
        except LookupError:
            return None

    def _repeats(self, row: TenantStatus) -> bool:
        name = row.tenant
        if name not in self._known:
            return False
        at = self._places[name]
        return (
            row.charged == self._charged[at]
            and row.base == self._base[at]
            and row.lift == self._lift[at]
            and _input(row) == self._input[at]
            and self._terms.get(name, USUAL)
            == (row.weight, row.expected_output, row.max_running, row.max_queued)
        )

    def _agree(self, row: TenantStatus) -> None:
        terms = (row.weight, row.expected_output, row.max_running, row.max_queued)
        if terms == self._terms.get(row.tenant):
            return
        if terms != USUAL:
            self._terms[intern(row.tenant)] = terms
        else:
            self._terms.pop(row.tenant, None)

    def _place(self, tenant: str) -> int:
        """Where a tenant is; columns are as long as all places that there are, since others' tenants come here too."""
        if tenant not in self._places and self._shared and len(self._places) >= MAX_SHARED:
            self._move()
        at = self._places.setdefault(intern(tenant), len(self._places))
        self._grow()
        return at

    def _grow(self) -> None:
        more = len(self._places) - len(self._charged)
        for column in self._columns:
            column.extend([nan if column is self._steady or column is self._input else 0.0] * more)

    def _move(self) -> None:
        """To places of one's own: shared ones, of which each worker uses few, would take too much memory."""
        old = [self._places[tenant] for tenant in self._known]
        for column in self._columns:
            column[:] = array("d", [column[at] for at in old])
        self._places = {tenant: at for at, tenant in enumerate(self._known)}
        self._shared = False


def admitted(row: Row, old: Row | None) -> bool:
    """Whether any request of the tenant was admitted between two rows of it, or before the only one."""
    return _input(row) > (0.0 if old is None else _input(old))


def _input(row: Row) -> float:
    if isinstance(row, Account):
        return row.input_tokens
    tokens = row.uncached_input_tokens_total + row.cached_input_tokens_total
    return min(_EXACT, tokens)
