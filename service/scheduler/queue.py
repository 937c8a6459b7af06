"""The waiting queue: classes in order; in a class, tenants by virtual time or all by priority. Pure.

Order: (class position, class name); in a `fair` class (virtual time, tenant), then (priority, arrival, id);
in a `priority` class (priority, arrival, id) across tenants. Before them the head of a class that was passed over
for too long (`age`); behind them what is over its tenant's or its class's cap: of classes that may borrow it runs when
nothing within its caps waits, of others it is not offered at all. Who is at a cap is known from the groups' counts.

Changing one request or one tenant's rank is O(log n): the old heap item stays where it is and is known as
stale by its ticket; it goes when it reaches the top, or when stale items outnumber live ones. Passing over any
number of capped requests is O(classes).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from coxswain.service.scheduler.groups import ClassGroup, Group
from coxswain.service.scheduler.lines import ClassLine, Line, Lines
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.tenants import Account, RankHeap


class SteeredQueue:
    """All that wait, in the order in which they should run."""

    def __init__(self) -> None:
        self._order: list[ClassLine] = []
        self._borrowing: list[ClassLine] = []
        """Those of them that may borrow."""
        self.ageing: list[ClassLine] = []
        """Those of them with a bound on how long they may be passed over."""
        self._overdue: list[ClassLine] = []
        """Those that were passed over for longer when the clock was last read, the longest first."""
        self._tickets = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __bool__(self) -> bool:
        """Whether there is anything that may run: not the same as its length."""
        for class_line in self._order:  # vLLM asks in every step: no generator where one class is all
            if class_line.offers:
                return True
        return bool(self._borrowing) and any(class_line.size for class_line in self._borrowing)

    def __contains__(self, record: Record) -> bool:
        return record.ticket != 0

    def __repr__(self) -> str:
        sizes = ", ".join(f"{line.name}: {line.size}" for line in self._order)
        return f"<SteeredQueue {self._size} waiting ({sizes})>"

    def set_classes(self, groups: dict[str, ClassGroup]) -> None:
        """Put new class policies in force. It must be empty: who owns it takes its members out and adds them again."""
        assert not self._size, f"{self!r} is not empty"
        old = {each.name: each for each in self._order}
        for group in groups.values():
            group.line = ClassLine(group)
        self._order = [group.line for group in sorted(groups.values(), key=lambda group: group.place)]
        self._borrowing = [each for each in self._order if each.group.policy.borrow]
        self.ageing = [each for each in self._order if each.group.policy.ageing_s is not None]
        self._overdue = []
        for each in self.ageing:  # or a table that is edited all the time would stop all clocks
            if each.name in old:
                each.since, each.popped = old[each.name].since, old[each.name].popped

    def add(self, record: Record) -> None:
        """Put a request in its place; its class must be one of those set."""
        assert not record.ticket, f"{record} is already queued"
        self._tickets += 1
        record.ticket = self._tickets
        item = (record.priority, record.arrived_at, record.id, record.ticket, record)
        record.group.line.add(item, record.account)
        self._size += 1

    def remove(self, record: Record) -> bool:
        """Take a request out, wherever it stands; False if it is not here."""
        if not record.ticket:
            return False
        record.ticket = 0
        record.group.line.take(record.account)
        self._size -= 1
        return True

    # What runs next

    def first_class(self) -> ClassGroup | None:
        """The best class of which anything waits within its caps."""
        return next((class_line.group for class_line in self._order if class_line.offers), None)

    def peek(self) -> Record:
        """The request that should run next.

        Raises:
            IndexError: if nothing waits that may run.
        """
        line = self._next()
        if line is None:
            raise IndexError("peek into a queue with nothing that may run")
        return line.head()

    def glance(self) -> Record | None:
        """Who should run next by the virtual times that were last looked at, or None: who wants to tell, not to act.

        Looking at them is most of what a `peek` costs: tenants whose requests run have all been charged since.
        """
        line = self._next(RankHeap.glance)
        return None if line is None else line.head()

    def take(self, record: Record) -> None:
        """Take out the request that `peek` gave, to be admitted."""
        class_line = record.group.line
        record.aged = bool(self._overdue) and class_line in self._overdue and not class_line.popped
        class_line.popped += 1
        self.remove(record)

    def put_back(self, record: Record) -> None:
        """Put back a request that was taken and not admitted: nothing has become of it."""
        record.aged = False
        class_line = record.group.line
        class_line.popped = max(0, class_line.popped - 1)
        self.add(record)

    def _next(self, first: Callable[[RankHeap[Line]], Line | None] = RankHeap.least) -> Line | None:
        for class_line in self._overdue:
            if class_line.offers and not class_line.popped:
                return first(class_line.open.heap)
        for class_line in self._order:
            if class_line.offers:
                return first(class_line.open.heap)
        for class_line in self._borrowing:
            if class_line.size:
                return first(class_line.open.heap) or first(class_line.aside.heap)
        return None

    def offered(self) -> Iterator[tuple[Record, bool]]:
        """What may run, in order, lazily, and whether it would borrow its room.

        Each as if all before it ran by then: caps hold for all of them together.
        """
        taken: Counter[Group] = Counter()

        def fits(group: Group) -> bool:
            return group.max_running is None or group.running + taken[group] < group.max_running

        given: set[Record] = set()
        for record in self._first_within_caps(fits):
            if record not in given:
                given.add(record)
                taken.update((record.account, record.group))
                yield record, False
        for class_line in self._borrowing:
            for lines in (class_line.open, class_line.aside):
                yield from ((record, True) for record in lines.walk() if record not in given)

    def _first_within_caps(self, fits: Callable[[Group], bool]) -> Iterator[Record]:
        yield from (record for record in self._aged_heads() if fits(record.account))
        for class_line in self._order:
            records = class_line.open.offered(fits)
            while fits(class_line.group) and (record := next(records, None)) is not None:
                yield record

    def offers(self, classes: Iterable[ClassGroup]) -> bool:
        """Whether anything of these classes waits that may run without borrowing."""
        return any(group.line.offers for group in classes)

    @property
    def blocked(self) -> int:
        """How many wait that may not run now, because of caps. O(classes)."""
        return sum(
            class_line.size if class_line.group.full else class_line.aside.size
            for class_line in self._order
            if not class_line.group.policy.borrow
        )

    def age(self, now: float) -> None:
        """Read the clock, once per step before anything is popped.

        A class with `ageing_s` that has had something within its caps to offer for that long, and none of it was
        admitted, goes first with its head, once: then its clock begins again. So of a class that is never
        without an offer at least one request is among the first D admissions after every `ageing_s`, where D
        is the number of classes with a bound.
        """
        self._overdue = [class_line for class_line in self.ageing if class_line.age(now)]
        self._overdue.sort(key=lambda class_line: class_line.since or 0.0)

    # What was told

    def room_changed(self, account: Account) -> bool:
        """A tenant may have come to its cap, or under it, or be busy; whether that changed."""
        closed = account.closed
        if closed is account.shut:
            return False
        for class_line in self._order:
            line = class_line.lines.get(account.name)
            if line is not None and line.account is account:
                source, target = class_line.open, class_line.aside
                if not closed:
                    source, target = target, source
                source.leave(line)
                target.join(line)
        account.shut = closed
        return True

    def moved_back(self, account: Account) -> None:
        """A tenant's virtual time fell. Growth needs no telling."""
        for class_line in self._order:
            line = class_line.lines.get(account.name)
            if line is not None and line.account is account:
                class_line.of(account).heap.push(line)

    # What is where

    def walk(self, skip: int = 0) -> Iterator[Record]:
        """Everything that waits from place `skip` on, in order, lazily; what may not run now is last."""
        heads = self._aged_heads()
        yield from heads[skip:]
        skip = max(0, skip - len(heads))
        if heads:
            rest = (record for lines in self._all_lines() for record in lines.walk() if record not in heads)
            yield from islice(rest, skip, None)
            return
        for lines in self._all_lines():
            if skip >= lines.size:
                skip -= lines.size
            else:
                yield from lines.walk(skip)
                skip = 0

    def _aged_heads(self) -> list[Record]:
        return [
            line.head()
            for class_line in self._overdue
            if class_line.offers and not class_line.popped and (line := class_line.open.heap.least())
        ]

    def _all_lines(self) -> Iterator[Lines]:
        """In order: what is within its caps, what may borrow, what may not run now."""
        for class_line in self._order:
            if not class_line.group.full:
                yield class_line.open
        for borrow in (True, False):
            for class_line in self._order:
                if class_line.group.policy.borrow is borrow:
                    if class_line.group.full:
                        yield class_line.open
                    yield class_line.aside

    def position(self, record: Record) -> int | None:
        """The request's place (0 is next), or None if it is not here. O(its class + classes + tenants)."""
        if not record.ticket:
            return None
        heads = self._aged_heads()
        if record in heads:
            return heads.index(record)
        place = self._place(record)
        return place + sum(self._place(head) > place for head in heads)

    def _place(self, record: Record) -> int:
        """The place that it would have if no class had waited for too long."""
        class_line = record.group.line
        mine = class_line.of(record.account)
        place = 0
        for lines in self._all_lines():
            if lines is mine:
                return place + lines.place(record, class_line.lines[record.account.name])
            place += lines.size
        raise AssertionError(f"{record} has a ticket but no line")

    def validate(self) -> None:
        """Check every invariant; for tests."""
        for class_line in self._order:
            assert class_line.group.line is class_line
            class_line.validate()
            accounts = [line.account for line in class_line.lines.values()]
            assert all(account.shut == account.closed for account in accounts), "a cap was not told"
        assert sum(class_line.size for class_line in self._order) == self._size
