"""Weighted VTC, the Virtual Token Counter (Sheng et al., OSDI'24, arXiv 2401.00588), over a whole fleet.

The paper's algorithm 2, for one engine and counters c:

    when a request of client u arrives:
        if u has no request in the queue Q:
            if Q is empty:  c[u] = max(c[u], c[the client that left Q last])
            else:           c[u] = max(c[u], min of c over clients in Q)      # the counter lift
    to admit:  take the earliest request of the client with the least c; c[k] += wp × its input tokens
    per step:  c[i] += wq × output tokens of client i, for every i

Weighted: each charge is divided by the client's weight. Workers do the charging and a lift of their own; here
are the counters of the fleet, V: the sum of what all workers and all their incarnations charged, lifted only
when a tenant returns from idleness on *every* worker. Each worker is told `base = V − charged − lift`, as it
last reported the two, so that its own order is that of V.

What a frame shows is up to a frame period old, and a visit may begin and end between two: a tenant that was
idle and whose lift or input total grew has visited. How far to lift: at least to what the floor was a frame
before, at most to what it is now; between the two the worker's own lift says where it was when the request
came. With one worker that makes V its own virtual time exactly, and the base never changes: the controller
only watches.
"""

from collections.abc import Collection, Mapping
from typing import Annotated, ClassVar, Final, NamedTuple

import msgspec

from coxswain.control.fleet import Fleet
from coxswain.control.policy import Directives, weight_of
from coxswain.schemas.policy import Prices, TenantPolicy, TenantRank
from coxswain.schemas.status import TenantStatus

Price = Annotated[float, msgspec.Meta(ge=0, le=1e12)]

KEEP: Final = 1_024
"""Counters kept whatever their tenants do; beyond, those that a lift would overtake anyway are forgotten."""


class Seen(NamedTuple):
    """What of a tenant on a worker is already in V."""

    charged: float = 0.0
    lift: float = 0.0
    input_tokens: int = 0


class Change(NamedTuple):
    """What happened to a tenant since the last look, over all workers."""

    charged: float = 0.0
    """How much was charged."""
    visited: bool = False
    """Whether it has, or had in between, anything queued."""
    lifted_to: float | None = None
    """Where the worker that lifted it least put it, before those charges."""
    lifted_on: frozenset[str] = frozenset()
    """The workers that lifted it: there its queue was empty at some time since the last look."""
    adopt: float | None = None
    """A virtual time that an earlier leader gave it."""

    def join(self, other: "Change") -> "Change":
        """Both, on two workers."""
        return Change(
            self.charged + other.charged,
            self.visited or other.visited,
            _least(self.lifted_to, other.lifted_to),
            self.lifted_on | other.lifted_on,
            max((at for at in (self.adopt, other.adopt) if at is not None), default=None),
        )


class Vtc:
    """Fair shares of service, in weighted tokens, between tenants that want more than there is."""

    name: ClassVar[str] = "vtc"

    class Params(msgspec.Struct, frozen=True, kw_only=True):
        """Prices of a token; the defaults are the paper's wp = 1 and wq = 2."""

        wp: Price = 1.0
        """Per input token that the prefix cache did not have."""
        wq: Price = 2.0
        """Per output token."""
        cached: Price = 0.0
        """Per input token found in the prefix cache."""

    def __init__(self, params: Params) -> None:
        self.prices = Prices(input=params.wp, cached=params.cached, output=params.wq)
        self.virtual: dict[str, float] = {}
        """V: each tenant's counter. Never falls."""
        self.active: dict[str, frozenset[str]] = {}
        """Tenants with anything queued, and on which live workers."""
        self._last_left: str | None = None
        self._seen: dict[str, tuple[str, dict[str, Seen]]] = {}
        self._fleet: Fleet | None = None
        self._tenants: Mapping[str, TenantPolicy] = {}

    def observe(self, fleet: Fleet, tenants: Mapping[str, TenantPolicy], now: float) -> None:  # noqa: ARG002
        """Count what was charged, and lift tenants that returned from fleet-wide idleness."""
        self._fleet, self._tenants = fleet, tenants
        alone = sum(1 for _ in fleet.live()) == 1
        changes = self._changes(fleet)
        now_on = {tenant: fleet.waits_on(tenant) for tenant in changes}
        before = self.active
        returned = {
            tenant: self._floor(before.keys() - {tenant})
            for tenant, change in changes.items()
            if _returned(change, before.get(tenant, frozenset()), now_on[tenant])
        }
        self.active = {tenant: on for tenant, on in (before | now_on).items() if on}

        for tenant, change in changes.items():
            if change == Change() and tenant not in self.virtual:
                continue
            if change.adopt is not None:
                self.virtual[tenant] = max(self.virtual.get(tenant, change.adopt), change.adopt)
            if tenant not in returned:
                self.virtual[tenant] = self.virtual.get(tenant, 0.0) + change.charged
        floor_now = self._floor(self.active.keys() - returned.keys())
        for tenant, floor_before in returned.items():
            change, old = changes[tenant], self.virtual.get(tenant, 0.0)
            at = change.lifted_to if alone else _return_to(change.lifted_to, floor_before, floor_now)
            self.virtual[tenant] = max(old, old if at is None else at) + change.charged

        if left := (before.keys() | returned.keys()) - self.active.keys():
            # Who of several left last is not told: the least is the one that takes nothing from anybody.
            self._last_left = min(left, key=lambda tenant: (self.virtual[tenant], tenant))
        self._forget()

    def decide(self, now: float) -> Directives:  # noqa: ARG002  (the protocol's signature)
        """Each live worker's bases, so that its virtual times are those of the fleet."""
        if self._fleet is None:
            return Directives()
        counters = [
            (tenant, virtual, weight_of(self._tenants, tenant)) for tenant, virtual in self.virtual.items()
        ]
        ranks = {
            view.worker: {
                tenant: TenantRank(base=_base(virtual, view.tenants.get(tenant)), weight=weight)
                for tenant, virtual, weight in counters
            }
            for view in self._fleet.live()
            if view.complete
        }
        return Directives(prices=self.prices, ranks=ranks)

    def _floor(self, active: Collection[str]) -> float | None:
        """The least V among `active`; with none, that of the tenant that left the queue last."""
        if active:
            return min(self.virtual[tenant] for tenant in active)
        return self.virtual.get(self._last_left) if self._last_left is not None else None

    def _changes(self, fleet: Fleet) -> dict[str, Change]:
        heard = {view.worker: view for view in fleet.workers.values() if view.complete}
        self._seen = {worker: seen for worker, seen in self._seen.items() if worker in fleet.workers}
        first = {
            worker
            for worker, view in heard.items()
            if worker not in self._seen or self._seen[worker][0] != view.incarnation
        }
        self._seen.update((worker, (heard[worker].incarnation, {})) for worker in first)
        changes: dict[str, Change] = {}
        for worker, tenant in sorted(fleet.changed):
            row = heard[worker].tenants.get(tenant) if worker in heard else None
            change = self._change(worker, row, first=worker in first) if row else Change()
            changes[tenant] = changes[tenant].join(change) if tenant in changes else change
        return changes

    def _change(self, worker: str, row: TenantStatus, *, first: bool) -> Change:
        seen = self._seen[worker][1]
        old = seen.get(row.tenant, Seen())
        new = Seen(row.charged, row.lift, row.uncached_input_tokens_total + row.cached_input_tokens_total)
        seen[row.tenant] = new
        if first and row.base:
            return Change(adopt=row.virtual_time)
        charged = max(0.0, new.charged - old.charged)
        lifted = new.lift > old.lift
        return Change(
            charged,
            row.queued > 0 or lifted or new.input_tokens > old.input_tokens,
            row.virtual_time - charged if lifted else None,
            frozenset({worker} if lifted else ()),
        )

    def _forget(self) -> None:
        """Drop counters of idle tenants that are not above the floor: a return lifts them there anyway."""
        if len(self.virtual) <= KEEP or not self.active or self._fleet is None:
            return
        floor = min(self.virtual[tenant] for tenant in self.active)
        busy = {
            tenant
            for view in self._fleet.workers.values()
            for tenant, row in view.tenants.items()
            if row.queued or row.running or row.held
        }
        self.virtual = {
            tenant: virtual for tenant, virtual in self.virtual.items() if virtual > floor or tenant in busy
        }


def _returned(change: Change, before: frozenset[str], now: frozenset[str]) -> bool:
    """Whether a tenant came back from fleet-wide idleness; `before` and `now` are the workers it waits on.

    On a worker where it waited before, a lift shows that it left and came back meanwhile: that counts if it
    waited nowhere else.
    """
    return change.visited and (not before or (bool(change.lifted_on) and before | now <= change.lifted_on))


def _return_to(lifted_to: float | None, floor_before: float | None, floor_now: float | None) -> float | None:
    """Where a tenant that returns to a fleet of several workers stands; None leaves it where it was."""
    if lifted_to is not None and floor_now is not None:
        lifted_to = min(lifted_to, floor_now)
    if lifted_to is None or floor_before is None:
        return floor_before if lifted_to is None else lifted_to
    return max(lifted_to, floor_before)


def _base(virtual: float, row: TenantStatus | None) -> float:
    return virtual if row is None else virtual - row.charged - row.lift


def _least(one: float | None, other: float | None) -> float | None:
    return other if one is None else one if other is None else min(one, other)
