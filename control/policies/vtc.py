"""Weighted VTC, the Virtual Token Counter (Sheng et al., OSDI'24, arXiv 2401.00588), over a whole fleet.

The paper's algorithm 2, for one engine and counters c:

    when a request of client u arrives:
        if u has no request in the queue Q:
            if Q is empty:  c[u] = max(c[u], c[the client that left Q last])
            else:           c[u] = max(c[u], min of c over clients in Q)      # the counter lift
    to admit:  take the earliest request of the client with the least c; c[k] += wp × its input tokens
    per step:  c[i] += wq × output tokens of client i, for every i

Weighted: each charge is divided by the client's weight. Workers do the charging and a lift of their own; here
are the counters of the fleet, V: the sum of what all workers and all their incarnations charged since they
were heard of, lifted only when a tenant returns from idleness on *every* worker. Each worker is told
`base = V − charged − lift`, as it last reported the two, so that its own order is that of V.

`predict` is algorithm 3: output that is expected is charged at admission, what goes beyond it as it comes, and
what does not come is given back at the end. Workers do that too, told what to expect of each tenant: so it is in
the order of the very step, and `charged` has all of it. Unlike the paper's, their lifts leave out what is charged
ahead: others get that from now on, while who returns waits beside them. V of several workers has it, so there who
returns waits up to a request longer. Nor is a long output charged ahead whole while others wait whose own are short
(`NEAR`): as these end, who comes next is decided anew. `preempt_gap` goes beyond the paper, whose engine cannot:
while the least counter of those that wait on a worker is more than that below a running request's, the request is
held. `fill`, where it is set, bounds how many run on a worker that loses KV (`crowd`): what vLLM preempts is
computed again, and a tenant whose requests are struck falls behind meanwhile. Who comes new may wait longer for it.

What a frame shows is up to a frame period old, and a visit may begin and end between two: a tenant that was
idle and whose lift or input total grew has visited. How far to lift: at least to what the floor was a frame
before, at most to what it is now; between the two the worker's own lift says where it was when the request
came. With one worker that makes V its own virtual time exactly, and the base never changes: the controller
only watches.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import copysign, inf
from typing import Annotated, ClassVar, Final, Literal, NamedTuple

import msgspec

from coxswain.control.accounts import Row, admitted
from coxswain.control.estimates.crowd import Crowd
from coxswain.control.estimates.predict import MovingAverage
from coxswain.control.estimates.victims import Victims
from coxswain.control.fleet import Fleet, RequestKey, WorkerView
from coxswain.control.policy import Cap, Directives, Group, Kv, Sees, Tables, weight_of
from coxswain.schemas.names import DEFAULT
from coxswain.schemas.policy import MAX_BASE, Prices, TenantRank

Price = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
Part = Annotated[float, msgspec.Meta(gt=0, lt=1)]

KEEP: Final = 1_024
"""Counters kept whatever their tenants do; beyond, those that a lift would overtake anyway are forgotten."""
ABSENT_ROWS: Final = 8
"""Tenants that do not wait on a worker and are told to it in one rank, in turns: they may come."""
NEAR: Final = 2.0
"""Of a long output, at most so many times the shortest that is expected of anybody who waits is charged ahead.

Charged whole, long ones are let in together until they have all slots, and the short ones are served in bursts when
they end. At 1, two tenants of which one's outputs are four times the other's swing as without prediction: no more than
half of what a request costs is charged when it is let in, so each correction overshoots (docs/results/policies.md).
"""


class Change(NamedTuple):
    """What happened to a tenant since the last look, over all workers, where it is more than being served."""

    visited: bool = False
    """Whether it has, or had in between, anything queued."""
    lifted_to: float | None = None
    """Where the worker that lifted it least put it, before it was charged."""
    lifted_on: frozenset[str] = frozenset()
    """The workers that lifted it: there its queue was empty at some time since the last look."""
    charged: float = 0.0
    """What it was charged in all of this."""

    def join(self, other: "Change") -> "Change":
        """Both, on two workers."""
        return Change(
            self.visited or other.visited,
            _least(self.lifted_to, other.lifted_to),
            self.lifted_on | other.lifted_on,
            self.charged + other.charged,
        )


NOTHING: Final = Change()


class Vtc:
    """Fair shares of service, in weighted tokens, between tenants that want more than there is."""

    name: ClassVar[str] = "vtc"

    class Params(msgspec.Struct, frozen=True, kw_only=True):
        """Prices of a token (the defaults are the paper's wp = 1 and wq = 2), prediction, preemption."""

        wp: Price = 1.0
        """Per input token that the prefix cache did not have."""
        wq: Price = 2.0
        """Per output token."""
        cached: Price = 0.0
        """Per input token found in the prefix cache."""
        predict: Literal["none", "average"] = "none"
        """Whether expected output is charged at admission, by the tenant's moving average."""
        preempt_gap: Price | None = None
        """Hold running requests of tenants that are this far ahead of one that waits; none: never."""
        fill: Part | None = None
        """Where KV is lost, let in more while less than this part of it is in use; none: as many as fit at first."""

    def __init__(self, params: Params) -> None:
        self.prices = Prices(input=params.wp, cached=params.cached, output=params.wq)
        self.lengths = MovingAverage() if params.predict == "average" else None
        self._crowd = None if params.fill is None else Crowd(params.fill)
        whole = self.lengths is not None or params.preempt_gap is not None
        self.sees: Sees = "requests" if whole else "tenants"
        self.virtual: dict[str, float] = {}
        """V: each tenant's counter. Without prediction it never falls, but for `_adopt`'s change of its origin."""
        self._led = False
        """Whether V is in an earlier leader's time."""
        self.active: dict[str, frozenset[str]] = {}
        """Tenants with anything queued, and on which live workers."""
        self._victims = None if params.preempt_gap is None else Victims(params.preempt_gap)
        self._last_left: str | None = None
        self._incarnations: dict[str, str] = {}
        """Per worker, the one whose totals are in V."""
        self._followed: str | None = None
        """The incarnation whose own time V is: the first, as long as there was no other."""
        self._turn: dict[str, int] = {}
        self._forget_at = KEEP
        self._fleet = Fleet()
        self._tables = Tables()

    # Count

    def observe(self, fleet: Fleet, tables: Tables, now: float) -> None:
        """Count what was charged, and lift tenants that returned from fleet-wide idleness."""
        self._fleet, self._tables = fleet, tables
        if self.lengths is not None:
            for row in (row for view in fleet.workers.values() for row in view.left):
                self.lengths.learn(row)
        if self._crowd is not None:
            for view in fleet.live():
                self._crowd.look(view, now)
        charges, changes = self._read(fleet)
        before = self.active
        waiting = fleet.presence.waiting
        returned = [
            tenant
            for tenant, change in changes.items()
            if _returned(change, before.get(tenant, frozenset()), waiting.get(tenant, frozenset()))
        ]
        floors = self._floors_without(returned)
        left = [tenant for tenant in fleet.presence.moved if tenant in before and tenant not in waiting]
        for tenant in fleet.presence.moved:
            if tenant in waiting:
                self.active[tenant] = frozenset(waiting[tenant])
            else:
                self.active.pop(tenant, None)

        virtual = self.virtual
        for tenant, change in changes.items():
            if change != NOTHING:
                virtual.setdefault(tenant, 0.0)
        for tenant, charge in charges.items():
            if charge and tenant not in floors:
                virtual[tenant] = virtual.get(tenant, 0.0) + charge
        self._lift(fleet, changes, charges, floors)

        if left := [*left, *(tenant for tenant in returned if tenant not in self.active)]:
            # Who of several left last is not told: the least is the one that takes nothing from anybody.
            self._last_left = min(left, key=lambda tenant: (virtual[tenant], tenant))
        self._forget()

    def _read(self, fleet: Fleet) -> tuple[dict[str, float], dict[str, Change]]:
        """What was charged per tenant since the last look, and what else happened to some."""
        charges, changes = dict(fleet.served), dict[str, Change]()
        active, strangers = self.active, list[WorkerView]()
        for worker in self._incarnations.keys() - fleet.workers.keys():
            del self._incarnations[worker]
            self._turn.pop(worker, None)
            if self._crowd is not None:
                self._crowd.forget(worker)
        for worker, tenants in fleet.changed.items():
            view = fleet.workers.get(worker)
            if view is None or not view.complete:
                continue
            known = self._incarnations.get(worker)
            stranger = known is None
            if known != view.incarnation:
                self._followed = view.incarnation if not (self._incarnations or self.virtual) else None
                self._incarnations[worker] = view.incarnation
                stranger = stranger or view.returned
            if stranger:
                strangers.append(view)
                continue
            for tenant, old in tenants.items():
                row = view.tenants.find(tenant)
                if row is None or (old is not None and row.lift == old.lift and tenant in active):
                    continue
                change = _change(view, row, old)
                changes[tenant] = changes[tenant].join(change) if tenant in changes else change
        for view in strangers:
            self._adopt(view)
            if not view.returned:
                for row in view.tenants.values():
                    charges[row.tenant] -= row.charged
        return charges, changes

    def _adopt(self, view: WorkerView) -> None:
        """Take over the order on a worker that is heard of for the first time, or again: what it charged is past.

        Workers that an earlier leader ranked have one time, which becomes ours. One that nobody ranked has a time of
        its own, and says only how far its tenants are apart: the least of those that wait there is put to our floor.
        """
        rows, virtual = view.tenants.values(), self.virtual
        if not rows:
            return
        theirs = _floor({row.tenant: row.virtual_time for row in rows}, view.waiting)
        behind = _floor(virtual, self.active) - theirs if virtual else 0.0
        if any(row.base for row in rows):
            if not self._led:
                virtual = self.virtual = {tenant: at - behind for tenant, at in virtual.items()}
            behind, self._led = 0.0, True
        for row in rows:
            at = row.virtual_time + behind
            virtual[row.tenant] = max(virtual.get(row.tenant, at), at)
        if view.counted:
            for tenant in view.waiting:
                self.active[tenant] = self.active.get(tenant, frozenset()) | {view.worker}

    # Lift

    def _floors_without(self, tenants: list[str]) -> dict[str, float | None]:
        """For each, the least V among the other active tenants; with none, that of who left the queue last."""
        if not tenants:
            return {}
        virtual = self.virtual
        first = min(self.active, key=virtual.__getitem__, default=None)
        second = min((each for each in self.active if each != first), key=virtual.__getitem__, default=None)
        last = self._last_left
        floors = {}
        for tenant in tenants:
            least = second if tenant == first else first
            least = last if least is None else least
            floors[tenant] = None if least is None else virtual.get(least)
        return floors

    def _lift(
        self,
        fleet: Fleet,
        changes: Mapping[str, Change],
        charges: Mapping[str, float],
        floors: Mapping[str, float | None],
    ) -> None:
        """Put tenants that returned to the floor, which was `floors` when last looked at; then charge them.

        What was still charged for what they had running before they came back comes before the lift.
        """
        if not floors:
            return
        virtual = self.virtual
        others = [virtual[tenant] for tenant in self.active if tenant not in floors]
        last = virtual.get(self._last_left) if self._last_left is not None else None
        floor_now = min(others) if others else last
        # The own lift of one worker is exact, unless it restarted: then it has forgotten whom it served.
        alone = [view.incarnation for view in fleet.live()] == [self._followed]
        for tenant, floor_before in floors.items():
            change = changes[tenant]
            old = virtual.get(tenant, 0.0) + charges.get(tenant, 0.0) - change.charged
            at = change.lifted_to if alone else _return_to(change.lifted_to, floor_before, floor_now)
            virtual[tenant] = max(old, old if at is None else at) + change.charged

    def _forget(self) -> None:
        """Drop counters of idle tenants that are not above the floor: a return lifts them there anyway."""
        if len(self.virtual) <= self._forget_at or not self.active:
            return
        floor = min(self.virtual[tenant] for tenant in self.active)
        busy = self._fleet.busy()
        self.virtual = {
            tenant: virtual for tenant, virtual in self.virtual.items() if virtual > floor or tenant in busy
        }
        self._forget_at = max(KEEP, 2 * len(self.virtual))

    # Decide

    def decide(self, now: float) -> Directives:  # noqa: ARG002  (the protocol's signature)
        """Bases that make every worker's virtual times those of the fleet, and who is held."""
        holds: Mapping[str, Mapping[RequestKey, Kv]] = {}
        if self._victims is not None:
            holds = self._victims.choose(self._fleet, self.virtual)
        return Directives(prices=self.prices, ranks=_Ranks(self), holds=holds, caps=self._caps())

    def _caps(self) -> dict[str, dict[Group, Cap]]:
        """Per worker that loses KV, how many of each class may run."""
        if (crowd := self._crowd) is None:
            return {}
        caps: dict[str, dict[Group, Cap]] = {}
        for view in self._fleet.live():
            if shares := crowd.shares(view, self._tables.classes):
                caps[view.worker] = {("class", name): Cap(max_running=most) for name, most in shares.items()}
        return caps

    def above_floor(self) -> list[str]:
        """Tenants whom a worker's own lift would put too low if it had not heard of them."""
        if not self.active:
            return list(self.virtual)
        floor = min(map(self.virtual.__getitem__, self.active))
        return [tenant for tenant, virtual in self.virtual.items() if virtual > floor]

    def ranks_of(self, view: WorkerView, above: list[str]) -> dict[str, TenantRank]:
        """Ranks of those that wait on a worker, and of some of the others, which take turns."""
        turn = self._turn.get(view.worker, 0) if len(above) > ABSENT_ROWS else 0
        chosen = [*above[turn : turn + ABSENT_ROWS], *above[: max(0, turn + ABSENT_ROWS - len(above))]]
        self._turn[view.worker] = (turn + ABSENT_ROWS) % max(1, len(above))
        virtual, table, lengths = self.virtual, self._tables.tenants, self.lengths
        usual, near = weight_of(table, DEFAULT), self._near(view)
        ranks = {}
        names = {**dict.fromkeys(sorted(view.waiting)), **dict.fromkeys(chosen)}
        for tenant, spent in zip(names, view.tenants.spent(names), strict=True):
            base = virtual.get(tenant, 0.0) - spent
            if not -MAX_BASE <= base <= MAX_BASE:  # a worker was broken into, and says what it likes
                base = copysign(MAX_BASE, base)
            weight = table[tenant].weight if tenant in table else usual
            expected = min(near, lengths.expect(tenant)) if lengths is not None else 0.0
            ranks[tenant] = TenantRank(base=base, weight=weight, expected_output=expected)
        return ranks

    def _near(self, view: WorkerView) -> float:
        """How much output of one request is charged ahead at most on a worker, in tokens."""
        if (lengths := self.lengths) is None:
            return 0.0
        return NEAR * min(map(lengths.expect, view.waiting), default=inf)


class _Ranks(Mapping[str, Mapping[str, TenantRank]]):
    """Per worker, made when asked for: the core asks about few workers in a step."""

    def __init__(self, policy: Vtc) -> None:
        self._policy = policy
        self._workers = {view.worker: view for view in policy._fleet.live() if view.complete}  # noqa: SLF001
        self._above: list[str] | None = None

    def __getitem__(self, worker: str) -> dict[str, TenantRank]:
        view = self._workers[worker]
        if self._above is None:
            self._above = self._policy.above_floor()
        return self._policy.ranks_of(view, self._above)

    def __iter__(self) -> Iterator[str]:
        return iter(self._workers)

    def __len__(self) -> int:
        return len(self._workers)


def _change(view: WorkerView, row: Row, old: Row | None) -> Change:
    """What a row says beside what it was charged."""
    lifted = row.lift > (old.lift if old else 0.0)
    charged = row.charged - (old.charged if old else 0.0)
    return Change(
        row.tenant in view.waiting or lifted or admitted(row, old),
        row.virtual_time - charged if lifted else None,
        frozenset({view.worker} if lifted else ()),
        charged,
    )


def _returned(change: Change, before: frozenset[str], now: frozenset[str] | set[str]) -> bool:
    """Whether a tenant came back from fleet-wide idleness; `before` and `now` are the workers it waits on.

    On a worker where it waited before, a lift shows that it left and came back meanwhile: that counts if it
    waited nowhere else.
    """
    lifted_on = change.lifted_on
    return change.visited and (not before or (bool(lifted_on) and before <= lifted_on and lifted_on >= now))


def _return_to(lifted_to: float | None, floor_before: float | None, floor_now: float | None) -> float | None:
    """Where a tenant that returns to a fleet of several workers stands; None leaves it where it was."""
    if lifted_to is not None and floor_now is not None:
        lifted_to = min(lifted_to, floor_now)
    if lifted_to is None or floor_before is None:
        return floor_before if lifted_to is None else lifted_to
    return max(lifted_to, floor_before)


def _floor(virtual: Mapping[str, float], waiting: Iterable[str]) -> float:
    """The least of those that wait; with none, the most of all: nobody who returns is lifted beyond."""
    return min((virtual[tenant] for tenant in waiting), default=max(virtual.values()))


def _least(one: float | None, other: float | None) -> float | None:
    return other if one is None else one if other is None else min(one, other)
