"""Tenants on one worker: what each was served, and the virtual time that orders them.

virtual_time = base + charged + lift (docs/protocol.md). `charged` grows by tokens × price ÷ weight as work
is done here; `lift` grows when a tenant returns from idle (VTC's counter lift, OSDI'24, algorithm 2, lines
5-13); `base` is the controller's, and carries what happened on other workers. Pure: no clock, no vLLM.
"""

import heapq
from collections.abc import Callable, Iterator
from math import isfinite
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

from coxswain.schemas.names import OTHER
from coxswain.schemas.policy import Prices, TenantPolicy
from coxswain.service.scheduler.groups import Group
from coxswain.service.scheduler.meter import Meter

if TYPE_CHECKING:
    from coxswain.service.scheduler.record import Record

MAX_TENANTS: Final = 65_536
"""Accounts kept; the requests of tenants beyond share the account `OTHER`."""


class Account(Group):
    """One tenant's counts and totals since this incarnation began.

    Args:
        name: the tenant.
        policy: its row of the table in force.
        tenants: all accounts of its worker: prices, and where it notes itself when it changes.
    """

    __slots__ = (
        "ahead", "base", "cached_input_tokens", "charged", "discarded_tokens", "expected_output",
        "external_input_tokens", "finished", "lift", "meter", "output_tokens", "policy", "recomputed_tokens",
        "reloaded_tokens", "restored_tokens", "seen", "settled_at", "shut", "tenants",
        "uncached_input_tokens", "uncomputed_input_tokens", "virtual_time", "weight",
    )  # fmt: skip

    def __init__(self, name: str, policy: TenantPolicy, tenants: "Tenants") -> None:
        super().__init__(name)
        self.policy = policy
        self.weight = policy.weight
        self.base = 0.0
        self.charged = 0.0
        self.ahead = 0.0
        """As much of `charged` as is for output that is expected and was not delivered yet."""
        self.expected_output = 0.0
        """Output tokens that the controller expects of a request."""
        self.lift = 0.0
        self.virtual_time = 0.0
        """base + charged + lift, as of when it was last settled; `rank` is as of now."""
        self.uncached_input_tokens = self.cached_input_tokens = self.external_input_tokens = 0
        self.uncomputed_input_tokens = self.output_tokens = self.finished = 0
        self.recomputed_tokens = self.restored_tokens = self.reloaded_tokens = self.discarded_tokens = 0
        self.meter = Meter()
        """What was delivered; `output_tokens` is as much of it as was charged."""
        self.seen = False
        """Whether it ever had a request here, or caps of its own: only those are listed in status."""
        self.shut = False
        """The queue's: whether its lines stand aside because it was full when the queue was last told."""
        self.tenants = tenants
        self.settled_at = 0
        """What `Tenants.deliveries` was then."""

    def __repr__(self) -> str:
        return (
            f"<Account {self.name!r} vt={self.virtual_time:.1f} queued={self.queued} "
            f"running={self.running} held={self.held}>"
        )

    @property
    def rank(self) -> tuple[float, str]:
        """What orders tenants. Settles first, but for who is charged ahead: that may fall (`Ledger.settle_ahead`)."""
        if self.settled_at != self.tenants.deliveries and not self.ahead:
            self.settle()
        return self.virtual_time, self.name

    @property
    def level(self) -> float:
        """Virtual time without what is charged ahead: what it has been given. Lifts go by this."""
        return self.rank[0] - self.ahead

    def settle(self) -> None:
        """Count and charge the output that was delivered since this was last called; nobody expected it.

        `Meter.read` and `deliver` in one, without their calls: every step that admits asks this of many tenants.
        No news for status: its reader settles for itself, by the same sum (`bus/board.py`).
        """
        tenants, meter = self.tenants, self.meter
        self.settled_at = tenants.deliveries
        if news := meter.past + sum(map(len, meter.lists.values())) - self.output_tokens:
            self.output_tokens += news
            self.charged += news * tenants.prices.output / self.weight
            self.virtual_time = self.base + self.charged + self.lift

    def charge(self, cost: float) -> None:
        """Add `cost` (tokens × price) at the weight in force now."""
        self.charged += cost / self.weight
        self.virtual_time = self.base + self.charged + self.lift
        self.tenants.touched.setdefault(self, False)

    def deliver(self, tokens: int, price: float, owed: float = 0.0) -> None:
        """Count and charge output tokens; `owed` more are expected, and charged at the price and weight in force."""
        self.output_tokens += tokens
        ahead, self.ahead = self.ahead, owed * price / self.weight
        self.charged += tokens * price / self.weight + (self.ahead - ahead)
        self.virtual_time = self.base + self.charged + self.lift
        self.tenants.touched.setdefault(self, False)

    def rebase(self, base: float) -> None:
        """Set the controller's base."""
        self.base = base
        self.virtual_time = self.base + self.charged + self.lift
        self.tenants.touched.setdefault(self, False)

    def lift_to(self, floor: float) -> None:
        """Raise its level to `floor` if it is below."""
        if self.level < floor:
            self.lift += floor - self.level
            self.virtual_time = self.base + self.charged + self.lift
            self.touch()

    def touch(self) -> None:
        """Something changed that its row in status shows, beyond what a charge or a base changes."""
        self.tenants.touched[self] = True


class Tenants:
    """All accounts of a worker, the prices, and who is active (has anything queued)."""

    def __init__(self) -> None:
        self.on_new: Callable[[Account], None] | None = None
        """Told of each account that is made."""
        self.prices = Prices()
        self.table: dict[str, TenantPolicy] = {}
        self.accounts: dict[str, Account] = {}
        self.touched: dict[Account, bool] = {}
        """Changed since the last status frame, by more than output, its charge and its base; False: only by these."""
        self.ahead: dict[Account, None] = {}
        """Those that are charged for output that is expected."""
        self.deliveries = 0
        """How often requests were delivered tokens: whoever was settled since then need not be looked at."""
        self._open: RankHeap[Account] = RankHeap()
        """Those with anything queued that are not at their cap."""
        self._last_left: Account | None = None

    def policy_of(self, name: str) -> TenantPolicy:
        """The tenant's row; without one, that of tenant `default`; without that, the built-in defaults."""
        return self.table.get(name) or self.table.get("default") or TenantPolicy()

    def account(self, name: str) -> Account:
        """The tenant's account, made on first sight; past `MAX_TENANTS` a shared one."""
        found = self.accounts.get(name)
        if found is None:
            if not self.room_for(name):
                return self.account(OTHER)
            found = self.accounts[name] = Account(name, self.policy_of(name), self)
            if self.on_new is not None:
                self.on_new(found)
        return found

    def room_for(self, name: str) -> bool:
        """Whether the tenant has an account of its own, or can get one."""
        return name in self.accounts or len(self.accounts) < MAX_TENANTS or name == OTHER

    def arriving(self, account: Account) -> None:
        """Lift a tenant that returns from idle; call before its request is queued."""
        account.seen = True
        if not account.queued and (floor := self.floor()) is not None:
            account.lift_to(floor)

    def floor(self) -> float | None:
        """The level of the tenant that is next: of those with anything queued that are not at their cap.

        With none, that of the tenant that left the queue last; None if there never was any.

        Not its virtual time: what it is charged ahead it gets from now on, while who returns waits beside it.
        """
        least = self._open.least() or self._last_left
        return least.level if least is not None else None

    def joined(self, account: Account, record: "Record") -> None:
        """One more of its requests waits."""
        account.joined(record)
        self.touched[account] = True
        if account.queued == 1 and not account.shut:
            self._open.push(account)

    def left(self, account: Account) -> None:
        """One of its requests waits no more."""
        account.left()
        self.touched[account] = True
        if not account.queued:
            self._open.discard(account)
            self._last_left = account

    def moved_back(self, account: Account) -> None:
        """Its virtual time fell: heaps that only notice growth must be told."""
        if account.queued and not account.shut:
            self._open.push(account)

    def room_changed(self, account: Account) -> None:
        """It came to its cap, or under it."""
        if account.shut:
            self._open.discard(account)
        elif account.queued:
            self._open.push(account)

    def validate(self) -> None:
        """Check every invariant; for tests."""
        self._open.validate()
        active = {account for account in self.accounts.values() if account.queued}
        assert set(self._open) == {account for account in active if not account.shut}
        assert len(self.accounts) <= MAX_TENANTS + 1
        assert self.touched.keys() <= set(self.accounts.values())
        for account in self.accounts.values():
            account.validate()
            assert account.virtual_time == account.base + account.charged + account.lift, account
            assert isfinite(account.virtual_time), account


class Ranked(Protocol):
    """What a `RankHeap` orders."""

    @property
    def rank(self) -> tuple[Any, ...]:
        """Least comes first; no two members of a heap have the same."""


R = TypeVar("R", bound=Ranked)


class RankHeap(Generic[R]):
    """A heap of things whose rank grows while they are in it.

    Growth costs nothing when it happens: a stored key is then too small, which is noticed and mended when it
    reaches the top. A fall must be told by `push`. Every operation is O(log n) amortised.
    """

    __slots__ = ("_heap", "_serial", "_serials")

    def __init__(self) -> None:
        # Flat, for they are compared a lot: (*rank, serial, item).
        self._heap: list[tuple[Any, ...]] = []
        self._serials: dict[R, int] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._serials)

    def __iter__(self) -> Iterator[R]:
        """Members in no order."""
        return iter(self._serials)

    def push(self, item: R) -> None:
        """Add a member, or tell that its rank fell."""
        self._serial += 1
        self._serials[item] = self._serial
        heapq.heappush(self._heap, (*item.rank, self._serial, item))
        self._compact()

    def discard(self, item: R) -> None:
        """Take a member out; its heap entry goes when it reaches the top, or when such are too many."""
        self._serials.pop(item, None)
        self._compact()

    def _compact(self) -> None:
        if len(self._heap) > 2 * len(self._serials) + 64:
            self._heap = [(*item.rank, serial, item) for item, serial in self._serials.items()]
            heapq.heapify(self._heap)

    def least(self) -> R | None:
        """The member that comes first, or None; whoever is alone does, and its rank need not be looked at."""
        heap, serials = self._heap, self._serials
        if len(serials) == 1:
            return next(iter(serials))
        while heap:
            entry = heap[0]
            item: R = entry[-1]
            serial = serials.get(item)
            if serial != entry[-2]:
                heapq.heappop(heap)
            elif (now := (*item.rank, serial, item)) > entry:
                heapq.heapreplace(heap, now)
            else:
                return item
        return None

    def glance(self) -> R | None:
        """The member that came first by the ranks that were last looked at, or None; no rank is looked at."""
        heap, serials = self._heap, self._serials
        while heap:
            entry = heap[0]
            item: R = entry[-1]
            if serials.get(item) == entry[-2]:
                return item
            heapq.heappop(heap)
        return None

    def walk(self) -> Iterator[R]:
        """Members in order, lazily: the first k cost O(k log k), whatever the number, where few have grown.

        Best first through the heap, whose stored keys are never too large: a member that grew is put in its place
        when its old key is reached, and the next walk finds it there.
        """
        heap, serials = self._heap, self._serials
        frontier = [(heap[0], 0)] if heap else []
        while frontier:
            entry, index = heapq.heappop(frontier)
            item: R = entry[-1]
            serial = serials.get(item)
            if serial == entry[-2] and (now := (*item.rank, serial, item)) > entry:
                # What lies below this place was not looked at yet, and nothing else is moved.
                _sink(heap, index, now)
                heapq.heappush(frontier, (heap[index], index))
                continue
            for child in range(2 * index + 1, min(2 * index + 3, len(heap))):
                heapq.heappush(frontier, (heap[child], child))
            if serial == entry[-2]:
                yield item

    def validate(self) -> None:
        """Check every invariant; for tests."""
        assert len(self._heap) <= 2 * len(self._serials) + 64
        live = {entry[-1]: entry for entry in self._heap if self._serials.get(entry[-1]) == entry[-2]}
        assert live.keys() == self._serials.keys()
        assert all(entry[:-2] <= item.rank for item, entry in live.items()), "a fall was not told"


def _sink(heap: list[tuple[Any, ...]], index: int, entry: tuple[Any, ...]) -> None:
    """Put an entry into the place of a smaller one, or as far below it as it belongs."""
    while (child := 2 * index + 1) < len(heap):
        if child + 1 < len(heap) and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] > entry:
            break
        heap[index] = heap[child]
        index = child
    heap[index] = entry
