"""The waiting queue against a naive sort, and what its operations may cost."""

from collections import Counter
from itertools import islice
from math import log2
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coxswain.schemas.policy import ClassPolicy, TenantPolicy
from coxswain.service.scheduler.groups import Caps, ClassGroup
from coxswain.service.scheduler.lines import Line
from coxswain.service.scheduler.queue import SteeredQueue
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.tenants import Account, Tenants

EXAMPLES, OPERATIONS = 70, 150
TENANTS = ("a", "b", "c", "d")
TABLES = (
    {"default": ClassPolicy()},
    {"default": ClassPolicy(ageing_s=3.0), "gold": ClassPolicy(position=-1)},
    {"default": ClassPolicy(order="priority"), "gold": ClassPolicy(position=1, order="fair", borrow=True)},
    {
        "default": ClassPolicy(borrow=True),
        "gold": ClassPolicy(order="priority", ageing_s=2.0),
        "batch": ClassPolicy(position=3, ageing_s=0.0),
    },
    {
        "default": ClassPolicy(order="priority", borrow=True, ageing_s=1.0),
        "gold": ClassPolicy(position=-1, order="priority", borrow=True),
        "batch": ClassPolicy(position=3, order="priority", ageing_s=4.0),
    },
)


def make_record(account: Account, name: str, group: ClassGroup, *, priority: Any = 0) -> Record:
    """A request that waits nowhere yet."""
    record = Record(
        id=name, request=name, tenant=account.name, asked_class="", priority=priority, arrived_at=0.0,
        prompt_tokens=1, outputs=[],
    )  # fmt: skip
    record.account, record.group = account, group
    return record


def groups_of(table: dict[str, ClassPolicy]) -> dict[str, ClassGroup]:
    """The classes of a table, with nothing in them."""
    ordered = sorted(table, key=lambda name: (table[name].position, name))
    return {name: ClassGroup(name, table[name], place) for place, name in enumerate(ordered)}


class Pair:
    """The queue under test and the naive one: sets that are sorted whenever somebody asks."""

    def __init__(self) -> None:
        self.queue = SteeredQueue()
        self.accounts = [Account(name, TenantPolicy(), Tenants()) for name in TENANTS]
        self.members: dict[Record, None] = {}
        self.running: dict[Record, None] = {}
        self.table = TABLES[0]
        self.groups = groups_of(self.table)
        self.queue.set_classes(self.groups)
        self.made = 0
        self.now = 0.0
        self.since: dict[str, float] = {}
        """Per class with a bound: since when it has been passed over."""
        self.popped: set[str] = set()
        """Classes of which something was taken since the clock was read."""
        self.overdue: list[str] = []

    # What the documentation says, literally

    def has_room(self, record: Record) -> bool:
        """Whether one more of its tenant and of its class may run."""
        return not any(
            group.max_running is not None and group.running >= group.max_running
            for group in (record.account, self.groups[record.class_])
        )

    def key(self, record: Record) -> tuple[Any, ...]:
        """What orders requests, those apart whose class was passed over for too long."""
        policy = self.table[record.class_]
        tier = 0 if self.has_room(record) else 1 if policy.borrow else 2
        rank = (record.account.virtual_time, record.account.name) if policy.order == "fair" else ()
        full = record.account.full
        return (
            tier, policy.position, record.class_, full, *rank, record.priority, record.arrived_at, record.id,
        )  # fmt: skip

    def within(self, class_: str) -> list[Record]:
        """What of a class may run within its caps, in order."""
        within = [each for each in self.members if each.class_ == class_ and self.has_room(each)]
        return sorted(within, key=self.key)

    def order(self) -> list[Record]:
        """Everything that waits."""
        heads = [
            within[0] for name in self.overdue if name not in self.popped and (within := self.within(name))
        ]
        return heads + [each for each in sorted(self.members, key=self.key) if each not in heads]

    def may_run(self) -> list[Record]:
        """What of it may run now."""
        return [each for each in self.order() if self.key(each)[0] < 2]

    def offered(self) -> list[tuple[Record, bool]]:
        """What may run one after the other, each counted as running from then on, and whether it borrows."""
        taken: Counter[Any] = Counter()
        order = self.order()
        given: dict[Record, bool] = {}

        def room(record: Record) -> bool:
            groups = (record.account, self.groups[record.class_])
            return all(
                each.max_running is None or each.running + taken[each] < each.max_running for each in groups
            )

        for record in order:  # once is enough: room only shrinks
            if room(record):
                given[record] = False
                taken.update((record.account, self.groups[record.class_]))
        borrow = [each for each in self.members if self.table[each.class_].borrow and each not in given]
        return [
            *given.items(),
            *((each, True) for each in sorted(borrow, key=lambda each: self.key(each)[1:])),
        ]

    def age(self) -> None:
        """Read the clock."""
        self.queue.age(self.now)
        for name, policy in self.table.items():
            if policy.ageing_s is None:
                continue
            if name in self.popped or not self.within(name):
                self.since.pop(name, None)
            if self.within(name):
                self.since.setdefault(name, self.now)
        late = [
            name for name, at in self.since.items() if self.now - at >= (self.table[name].ageing_s or 0.0)
        ]
        place = {name: (self.since[name], self.table[name].position, name) for name in late}
        self.overdue = sorted(late, key=place.__getitem__)
        self.popped.clear()

    # What happens

    def do(self, operation: int, choice: int, value: int) -> None:
        """One operation on both, chosen by three numbers."""
        accounts, members = self.accounts, list(self.members)
        account = accounts[choice % len(accounts)]
        record = members[choice % len(members)] if members else None
        if operation == 0 or record is None:
            self.made += 1
            group = self.groups[sorted(self.table)[choice % len(self.table)]]
            record = make_record(account, f"r{self.made}", group, priority=value)
            record.arrived_at = float(value % 3)
            self.add(record)
        elif operation == 1:
            assert self.queue.remove(record)
            assert not self.queue.remove(record)
            del self.members[record]
        elif operation in (2, 8):
            self.admit(put_back=operation == 8)
        elif operation == 3:  # another priority
            self.queue.remove(record)
            record.priority = value
            self.add(record)
        elif operation == 4:  # another class
            self.queue.remove(record)
            record.group = self.groups[sorted(self.table)[value % len(self.table)]]
            self.add(record)
        elif operation == 5:
            account.charge(abs(value) / 2)
        elif operation == 6:
            before = account.virtual_time
            account.rebase(float(value))
            if account.virtual_time < before:
                self.queue.moved_back(account)
        elif operation == 7:
            self.replace_table(TABLES[choice % len(TABLES)])
        else:
            self.do_caps(operation, choice, value)

    def do_caps(self, operation: int, choice: int, value: int) -> None:
        """Operations on caps, on what runs, and on the clock."""
        groups = [*self.accounts, *self.groups.values()]
        if operation == 9 and self.running:
            record = list(self.running)[choice % len(self.running)]
            del self.running[record]
            self.count(record, -1)
        elif operation == 10:
            group = groups[choice % len(groups)]
            group.put_caps(Caps(max_running=value if value >= 0 else None))
            if isinstance(group, Account):
                self.queue.room_changed(group)
        else:
            self.now += abs(value) / 2
            self.age()

    def admit(self, *, put_back: bool) -> None:
        """Take the head, and perhaps put it back at once."""
        may_run = self.may_run()
        if not may_run:
            with pytest.raises(IndexError):
                self.queue.peek()
            return
        record = self.queue.peek()
        self.queue.take(record)
        assert record is may_run[0]
        assert record.aged == (record.class_ in self.overdue and record.class_ not in self.popped)
        self.count(record, 1)
        if put_back:
            self.count(record, -1)
            self.queue.put_back(record)
            assert not record.aged
        else:
            self.popped.add(record.class_)
            self.running[record] = None
            del self.members[record]

    def count(self, record: Record, change: int) -> None:
        """One more or one less runs."""
        record.account.running += change
        self.groups[record.class_].running += change
        self.queue.room_changed(record.account)

    def add(self, record: Record) -> None:
        """To both."""
        self.queue.add(record)
        self.members[record] = None

    def replace_table(self, table: dict[str, ClassPolicy]) -> None:
        """New classes, for an empty queue; those in a class that is no more go to `default`."""
        for record in self.members:
            self.queue.remove(record)
        groups = groups_of(table)
        for record in (*self.members, *self.running):
            record.group = groups.get(record.class_) or groups["default"]
        for record in self.running:
            groups[record.class_].running += 1
        for name in groups.keys() & self.groups.keys():
            groups[name].put_caps(self.groups[name].caps)
        self.table, self.groups = table, groups
        bounded = [name for name, policy in table.items() if policy.ageing_s is not None]
        self.since = {name: at for name, at in self.since.items() if name in bounded}
        self.popped &= table.keys()
        self.overdue = []
        self.queue.set_classes(groups)
        for record in self.members:
            self.queue.add(record)
        self.age()

    def compare(self, skip: int) -> None:
        """Everything that can be asked of the two has the same answer."""
        self.queue.validate()
        order, may_run = self.order(), self.may_run()
        assert list(self.queue.walk()) == order
        assert list(self.queue.walk(skip)) == order[skip:]
        assert len(self.queue) == len(order)
        assert bool(self.queue) == bool(may_run)
        assert self.queue.blocked == len(order) - len(may_run)
        assert list(self.queue.offered()) == self.offered()
        first = next((each.group for each in sorted(order, key=self.key) if self.has_room(each)), None)
        assert self.queue.first_class() == first
        if may_run:
            assert self.queue.peek() is may_run[0]
        assert self.queue.glance() is (may_run[0] if may_run else None)
        if order:
            place = skip % len(order)
            assert self.queue.position(order[place]) == place


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(st.integers(0, 11), st.integers(0, 30), st.integers(-3, 3)),
        min_size=OPERATIONS, max_size=OPERATIONS,
    ),
)  # fmt: skip
def test_queue_is_a_sort(operations: list[tuple[int, int, int]]) -> None:
    """After any of 10,000 and more operations the queue's order is that of a plain sort, caps and clocks included."""
    assert EXAMPLES * OPERATIONS >= 10_000
    pair = Pair()
    for operation in operations:
        pair.do(*operation)
        pair.compare(skip=operation[1])
    while pair.may_run():  # and it empties in that order
        pair.admit(put_back=False)
    pair.compare(skip=0)


def test_empty_queue_has_no_head() -> None:
    """Peek of nothing raises, as vLLM expects."""
    queue = SteeredQueue()
    groups = groups_of(TABLES[1])
    queue.set_classes(groups)
    with pytest.raises(IndexError):
        queue.peek()
    assert queue.glance() is None
    absent = make_record(Account("a", TenantPolicy(), Tenants()), "r", groups["default"])
    assert queue.position(absent) is None
    assert absent not in queue
    assert list(queue.walk(5)) == []


def test_request_cannot_be_queued_twice() -> None:
    """A second add of the same request is a bug of the caller and is not believed."""
    queue = SteeredQueue()
    groups = groups_of(TABLES[0])
    queue.set_classes(groups)
    record = make_record(Account("a", TenantPolicy(), Tenants()), "r", groups["default"])
    queue.add(record)
    with pytest.raises(AssertionError, match="already queued"):
        queue.add(record)
    assert len(queue) == 1


# What it may cost: counted, not timed


class Counted(int):
    """A priority that counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return int(self) == other

    def __lt__(self, other: int) -> bool:
        Counted.compared += 1
        return int(self) < int(other)

    __hash__ = int.__hash__


def crowd(count: int, tenants: int = 1, order: str = "fair") -> tuple[SteeredQueue, list[Record]]:
    """A queue of `count` requests with counted priorities."""
    queue = SteeredQueue()
    groups = groups_of({"default": ClassPolicy(order=order)})
    queue.set_classes(groups)
    accounts = [Account(f"t{i}", TenantPolicy(), Tenants()) for i in range(tenants)]
    records = [
        make_record(accounts[i % tenants], f"r{i}", groups["default"], priority=Counted(i * 7_919 % 10_007))
        for i in range(count)
    ]
    for record in records:
        queue.add(record)
    Counted.compared = 0
    return queue, records


@pytest.mark.parametrize("count", [1, 100, 10_000])
def test_reprioritizing_compares_a_logarithm(count: int) -> None:
    """A change of priority costs O(log n) comparisons, the clearing of what it leaves behind included."""
    queue, records = crowd(count, order="priority")
    changes = 20_000
    for i in range(changes):
        record = records[i * 31 % count]
        queue.remove(record)
        record.priority = Counted(i * 104_729 % 10_007)
        queue.add(record)
    assert Counted.compared / changes < 4 * (log2(count) + 4)
    queue.validate()


def test_first_k_cost_the_same_in_any_queue() -> None:
    """Listing the first 64 compares no more in a queue of 20,000 than in one of 1,000, give or take."""
    costs = []
    for count in (1_000, 20_000):
        queue, _ = crowd(count)
        assert len(list(islice(queue.walk(), 64))) == 64
        costs.append(Counted.compared)
    assert costs[1] < 2 * costs[0]
    assert costs[1] < 64 * 8 * log2(64)


def test_first_k_of_many_tenants_look_at_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing the first 64 of 5,000 tenants does not sort the tenants, also when the first have grown."""
    queue, records = crowd(5_000, tenants=5_000)
    for record in records[:100]:
        record.account.charge(5)
    reads = []
    rank = Line.rank.fget
    monkeypatch.setattr(Line, "rank", property(lambda line: (reads.append(line), rank(line))[1]))
    assert len(list(islice(queue.walk(), 64))) == 64
    assert len(reads) < 500


@pytest.mark.parametrize("count", [1, 2, 100])
def test_reprioritizing_one_request_for_ever_leaves_nothing_behind(count: int) -> None:
    """100,000 changes of one request leave no more stale items than there are live ones, plus a constant."""
    queue, records = crowd(count)
    record, longest = records[-1], 0
    for i in range(100_000):
        queue.remove(record)
        record.priority = i
        queue.add(record)
        if i % 1_000 == 0:
            queue.validate()
            longest = max(longest, items(queue))
    assert longest <= 2 * count + 64


def test_rank_that_falls_for_ever_leaves_nothing_behind() -> None:
    """A tenant's rank can fall 10,000 times without a trace in any heap."""
    queue, records = crowd(6, tenants=3)
    account = records[0].account
    for i in range(10_000):
        account.rebase(float(-i))
        queue.moved_back(account)
    queue.validate()
    assert queue.peek().account is account


def test_what_has_left_is_not_remembered() -> None:
    """A queue that was emptied keeps no request alive, however many tenants it had."""
    queue, _ = crowd(2_000, tenants=1_000)
    lines = [line for line_class in queue._order for line in line_class.lines.values()]
    while queue:
        queue.take(queue.peek())
    queue.validate()
    assert all(not line.items for line in lines)
    assert items(queue) == 0


def items(queue: SteeredQueue) -> int:
    """Heap items of the queue, live and stale."""
    return sum(len(line.items) for line_class in queue._order for line in line_class.lines.values())
