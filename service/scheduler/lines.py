"""Lines of the waiting queue: one tenant's requests in one class, and one class's lines. Pure; `queue.py` keeps them.

A line whose tenant is at its cap stands aside (`shut`): it is in no heap that `queue.peek` looks at, so that any
number of requests that may not run cost nothing to pass over.
"""

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import Any, Final

from coxswain.service.scheduler.groups import ClassGroup
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.tenants import Account, RankHeap

Item = tuple[int, float, str, int, Record]
"""(priority, arrival, id, ticket, record): the order inside a line."""

NUMBERS: Final = itemgetter(0, 1)
MAX_SKIPPED: Final = 256
"""Places that walking through heaps passes over, or a sixteenth of all; beyond, sorting everything is cheaper."""


class Line:
    """The requests of one tenant in one class, in order."""

    __slots__ = ("account", "by_head", "items", "size")

    def __init__(self, account: Account, *, by_head: bool) -> None:
        self.account = account
        self.by_head = by_head
        """Whether lines are ordered by their first requests, not by their tenants."""
        self.items: list[Item] = []
        self.size = 0

    @property
    def rank(self) -> tuple[Any, ...]:
        """What orders lines of one class; the line must not be empty."""
        if self.by_head:
            self.head()
            return self.items[0][:3]
        return self.account.rank

    def head(self) -> Record:
        """The first live request; the line must not be empty."""
        items = self.items
        while items[0][3] != items[0][4].ticket:
            heapq.heappop(items)
        return items[0][4]

    def compact(self) -> None:
        """Drop stale items."""
        self.items = [item for item in self.items if item[3] == item[4].ticket]
        heapq.heapify(self.items)

    def walk(self) -> Iterator[Item]:
        """Live items in order, lazily: the first k cost O(k log k), whatever the length."""
        items = self.items
        frontier = [(items[0], 0)] if items else []
        while frontier:
            item, index = heapq.heappop(frontier)
            if item[3] == item[4].ticket:
                yield item
            for child in (2 * index + 1, 2 * index + 2):
                if child < len(items):
                    heapq.heappush(frontier, (items[child], child))


class Lines:
    """Lines in the order in which their heads should run."""

    __slots__ = ("by_head", "heap", "size")

    def __init__(self, *, by_head: bool) -> None:
        self.by_head = by_head
        self.heap: RankHeap[Line] = RankHeap()
        self.size = 0
        """Requests in all of them."""

    def join(self, line: Line) -> None:
        """A line that was elsewhere, with all its requests."""
        self.size += line.size
        self.heap.push(line)

    def leave(self, line: Line) -> None:
        """A line that goes elsewhere, with all its requests."""
        self.size -= line.size
        self.heap.discard(line)

    def walk(self, skip: int = 0) -> Iterator[Record]:
        """Requests from place `skip` on, in order, lazily."""
        if self.by_head:
            far = skip > max(MAX_SKIPPED, self.size // 16)
            yield from _far(self.heap, skip) if far else islice(self._merged(), skip, None)
            return
        for line in self.heap.walk():
            if skip >= line.size:
                skip -= line.size
                continue
            if skip > max(MAX_SKIPPED, line.size // 16):
                yield from _far([line], skip)
            else:
                yield from (item[4] for item in islice(line.walk(), skip, None))
            skip = 0

    def offered(self, fits: Callable[[Account], bool]) -> Iterator[Record]:
        """Requests in order, of each tenant as long as it `fits`, which is asked before each."""
        if self.by_head:
            yield from self._merged(fits)
            return
        for line in self.heap.walk():
            for item in line.walk():
                if not fits(line.account):
                    break
                yield item[4]

    def _merged(self, fits: Callable[[Account], bool] | None = None) -> Iterator[Record]:
        """By their own order, across lines: best first through their heaps, each looked into when its head is due."""
        push, pop = heapq.heappush, heapq.heappop
        lines = self.heap.walk()
        coming = next(lines, None)
        frontier: list[tuple[Item, int, list[Item]]] = []
        while True:
            # The head of a line that the heap gave is its first item, and live.
            while coming is not None and (not frontier or coming.items[0] < frontier[0][0]):
                push(frontier, (coming.items[0], 0, coming.items))
                coming = next(lines, None)
            if not frontier:
                return
            item, index, items = pop(frontier)
            record = item[4]
            if item[3] == record.ticket:
                if fits is not None and not fits(record.account):
                    continue
                yield record
            child = 2 * index + 1
            if child < len(items):
                push(frontier, (items[child], child, items))
                if child + 1 < len(items):
                    push(frontier, (items[child + 1], child + 1, items))

    def place(self, record: Record, mine: Line) -> int:
        """How many come before a request of the line `mine`, which is one of these. O(all of them)."""
        key = (record.priority, record.arrived_at, record.id)
        if self.by_head:
            lines, place = list(self.heap), 0
        else:
            rank = mine.rank
            lines, place = [mine], sum(line.size for line in self.heap if line.rank < rank)
        return place + sum(
            1 for line in lines for item in line.items if item[:3] < key and item[3] == item[4].ticket
        )

    def validate(self) -> None:
        """Check every invariant; for tests."""
        assert self.size == sum(line.size for line in self.heap)
        self.heap.validate()


def _far(lines: Iterable[Line], skip: int) -> Iterator[Record]:
    """Requests of all these lines together from a far place on, in their own order: no heap is walked, all is sorted.

    By numbers, which C compares many times faster than items; by id only what is equal in both, from that place on.
    """
    items = [item for line in lines for item in line.items if item[3] == item[4].ticket]
    if skip < len(items):
        items.sort(key=itemgetter(1))
        items.sort(key=itemgetter(0))  # stable
        begin = bisect_left(items, NUMBERS(items[skip]), key=NUMBERS)
        runs = (sorted(run) for _, run in groupby(islice(items, begin, None), NUMBERS))
        yield from (item[4] for item in islice(chain.from_iterable(runs), skip - begin, None))


class ClassLine:
    """One class: its lines, those that may run and those whose tenant is at its cap; and how long it waits.

    Args:
        group: the class's counts, caps and policy.
    """

    __slots__ = ("aside", "group", "lines", "name", "open", "popped", "since")

    def __init__(self, group: ClassGroup) -> None:
        self.group = group
        self.name = group.name
        by_head = group.policy.order == "priority"
        self.lines: dict[str, Line] = {}
        """By tenant; none is empty."""
        self.open = Lines(by_head=by_head)
        self.aside = Lines(by_head=by_head)
        self.since: float | None = None
        """Since when it has had something to offer and none of it was admitted; None without a bound on that."""
        self.popped = 0
        """Requests taken from it since the clock was last read, less those put back."""

    @property
    def size(self) -> int:
        """How many wait."""
        return self.open.size + self.aside.size

    @property
    def offers(self) -> bool:
        """Whether anything of it may run within its caps."""
        return self.open.size > 0 and not self.group.closed

    def of(self, account: Account) -> Lines:
        """Where a tenant's line belongs now."""
        return self.aside if account.shut else self.open

    def add(self, item: Item, account: Account) -> None:
        """One more waits."""
        line = self.lines.get(account.name)
        lines = self.of(account)
        if line is None:
            line = self.lines[account.name] = Line(account, by_head=lines.by_head)
        heapq.heappush(line.items, item)
        line.size += 1
        lines.size += 1
        if line.size == 1 or (lines.by_head and line.items[0] is item):
            lines.heap.push(line)

    def take(self, account: Account) -> None:
        """One of a tenant's waits no more; its ticket says which."""
        line, lines = self.lines[account.name], self.of(account)
        line.size -= 1
        lines.size -= 1
        if not line.size:
            line.items.clear()  # a heap may know the line for a while yet
            lines.heap.discard(line)
            del self.lines[account.name]
        elif len(line.items) > 2 * line.size + 64:  # stale ones outnumber the others
            line.compact()

    def age(self, now: float) -> bool:
        """Read the clock; whether it has waited for too long."""
        if self.popped or not self.offers:
            self.since = None
            self.popped = 0
        if self.since is None and self.offers:
            self.since = now
        bound = self.group.policy.ageing_s
        return self.since is not None and bound is not None and now - self.since >= bound

    def validate(self) -> None:
        """Check every invariant; for tests."""
        for lines, shut in ((self.open, False), (self.aside, True)):
            lines.validate()
            assert set(lines.heap) == {line for line in self.lines.values() if line.account.shut is shut}
        for line in self.lines.values():
            assert len(line.items) <= 2 * line.size + 64
            live = [item for item in line.items if item[3] == item[4].ticket]
            assert line.size == len(live) > 0
            for priority, arrival, name, _, record in live:
                assert (priority, arrival, name) == (record.priority, record.arrived_at, record.id)
                assert record.class_ == self.name
                assert record.account is line.account
