"""The waiting queue: classes in order; in a class, tenants by virtual time or all by priority. Pure.

Order: (class position, class name); in a `fair` class (virtual time, tenant), then (priority, arrival, id);
in a `priority` class (priority, arrival, id) across tenants, which is one line that all tenants share.
Changing one request or one tenant's rank is O(log n): the old heap item stays where it is and is known as
stale by its ticket; it goes when it reaches the top, or when stale items outnumber live ones.
"""

import heapq
from collections.abc import Iterator
from itertools import islice
from typing import Final

from coxswain.schemas.policy import ClassPolicy
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.tenants import Account, RankHeap

Item = tuple[int, float, str, int, Record]
"""(priority, arrival, id, ticket, record): the order inside a line."""

EVERYBODY: Final = ""
"""Name of the one line of a `priority` class."""


class Line:
    """The requests of one tenant in one class (of all tenants in a `priority` class), in order."""

    __slots__ = ("account", "items", "name", "size")

    def __init__(self, account: Account | None) -> None:
        self.account = account
        self.name = account.name if account else EVERYBODY
        self.items: list[Item] = []
        self.size = 0

    @property
    def virtual_time(self) -> float:
        """The tenant's; a line of everybody has none to compare."""
        return self.account.virtual_time if self.account else 0.0

    def head(self) -> Record:
        """The first live request; the line must not be empty."""
        items = self.items
        while items[0][3] != items[0][4].ticket:
            heapq.heappop(items)
        return items[0][4]

    def compact(self) -> None:
        """Drop stale items when they outnumber live ones, and all of them when nothing is left."""
        if not self.size:
            self.items.clear()
        elif len(self.items) > 2 * self.size + 64:
            self.items = [item for item in self.items if item[3] == item[4].ticket]
            heapq.heapify(self.items)

    def walk(self) -> Iterator[Record]:
        """Live requests in order, lazily: the first k cost O(k log k), whatever the length."""
        items = self.items
        frontier = [(items[0], 0)] if items else []
        while frontier:
            item, index = heapq.heappop(frontier)
            if item[3] == item[4].ticket:
                yield item[4]
            for child in (2 * index + 1, 2 * index + 2):
                if child < len(items):
                    heapq.heappush(frontier, (items[child], child))


class ClassLine:
    """One class: its policy and its lines."""

    __slots__ = ("heap", "lines", "name", "policy", "size")

    def __init__(self, name: str, policy: ClassPolicy) -> None:
        self.name = name
        self.policy = policy
        self.lines: dict[str, Line] = {}
        self.heap: RankHeap[Line] = RankHeap()
        self.size = 0

    def line_of(self, account: Account) -> Line:
        """The line in which a tenant's requests wait, made on first use."""
        fair = self.policy.order == "fair"
        name = account.name if fair else EVERYBODY
        line = self.lines.get(name)
        if line is None:
            line = self.lines[name] = Line(account if fair else None)
        return line


class SteeredQueue:
    """All that wait, in the order in which they should run."""

    def __init__(self) -> None:
        self._classes: dict[str, ClassLine] = {}
        self._order: list[ClassLine] = []
        self._tickets = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __bool__(self) -> bool:
        return self._size > 0

    def __contains__(self, record: Record) -> bool:
        return record.ticket != 0

    def __repr__(self) -> str:
        sizes = ", ".join(f"{line.name}: {line.size}" for line in self._order)
        return f"<SteeredQueue {self._size} waiting ({sizes})>"

    def set_classes(self, policies: dict[str, ClassPolicy]) -> None:
        """Put new class policies in force; members whose class is gone must have been moved before."""
        old = self._classes
        self._classes = {name: ClassLine(name, policy) for name, policy in policies.items()}
        self._order = sorted(self._classes.values(), key=lambda line: (line.policy.position, line.name))
        self._size = 0
        members = [record for line in old.values() for part in line.lines.values() for record in part.walk()]
        for record in members:
            record.ticket = 0
            self.add(record)

    def add(self, record: Record) -> None:
        """Put a request in its place; its class must be one of those set."""
        assert not record.ticket, f"{record} is already queued"
        line_class = self._classes[record.class_]
        line = line_class.line_of(record.account)
        self._tickets += 1
        record.ticket = self._tickets
        heapq.heappush(line.items, (record.priority, record.arrived_at, record.id, record.ticket, record))
        line.size += 1
        if line.size == 1:
            line_class.heap.push(line)
        line_class.size += 1
        self._size += 1

    def remove(self, record: Record) -> bool:
        """Take a request out, wherever it stands; False if it is not here."""
        if not record.ticket:
            return False
        line_class = self._classes[record.class_]
        line = line_class.line_of(record.account)
        record.ticket = 0
        line.size -= 1
        line.compact()
        if not line.size:
            line_class.heap.discard(line)
            del line_class.lines[line.name]
        line_class.size -= 1
        self._size -= 1
        return True

    def first_class(self) -> str | None:
        """The best class of which anything waits."""
        return next((line_class.name for line_class in self._order if line_class.size), None)

    def peek(self) -> Record:
        """The request that should run next.

        Raises:
            IndexError: if nothing waits.
        """
        for line_class in self._order:
            if line_class.size:
                line = line_class.heap.least()
                assert line is not None
                return line.head()
        raise IndexError("peek into an empty queue")

    def pop(self) -> Record:
        """Take out the request that should run next.

        Raises:
            IndexError: if nothing waits.
        """
        record = self.peek()
        self.remove(record)
        return record

    def moved_back(self, account: Account) -> None:
        """A tenant's virtual time fell. Growth needs no telling."""
        for line_class in self._order:
            line = line_class.lines.get(account.name)
            if line is not None and line.account is account:
                line_class.heap.push(line)

    def walk(self, skip: int = 0) -> Iterator[Record]:
        """Everything that waits from place `skip` on, in order, lazily."""
        for line_class in self._order:
            if skip >= line_class.size:
                skip -= line_class.size
                continue
            for line in line_class.heap.walk():
                if skip >= line.size:
                    skip -= line.size
                    continue
                yield from islice(line.walk(), skip, None)
                skip = 0

    def position(self, record: Record) -> int | None:
        """The request's place (0 is next), or None if it is not here. O(its line + classes + tenants)."""
        if not record.ticket:
            return None
        place = 0
        for line_class in self._order:
            if line_class.name != record.class_:
                place += line_class.size
                continue
            mine = line_class.line_of(record.account)
            before = (mine.virtual_time, mine.name)
            place += sum(
                line.size for line in line_class.lines.values() if (line.virtual_time, line.name) < before
            )
            key = (record.priority, record.arrived_at, record.id)
            return place + sum(1 for item in mine.items if item[:3] < key and item[3] == item[4].ticket)
        raise AssertionError(f"{record} has a ticket but no class")

    def validate(self) -> None:
        """Check every invariant; for tests."""
        seen = 0
        for line_class in self._order:
            assert self._classes[line_class.name] is line_class
            assert line_class.size == sum(line.size for line in line_class.lines.values())
            assert set(line_class.heap) == set(line_class.lines.values())
            line_class.heap.validate()
            for line in line_class.lines.values():
                assert len(line.items) <= 2 * line.size + 64
                live = [item for item in line.items if item[3] == item[4].ticket]
                assert line.size == len(live) > 0
                for priority, arrival, name, _, record in live:
                    assert (priority, arrival, name) == (record.priority, record.arrived_at, record.id)
                    assert record.class_ == line_class.name
                    assert line.account in (None, record.account)
            seen += line_class.size
        assert seen == self._size
