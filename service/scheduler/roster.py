"""Who is here and where: every request by name and by state, and what changed since the last status frame. Pure.

The core lets requests in and out; core and holds move them. All sets and counts by state are kept here, in one
place (`move`), so that they cannot disagree. Knows no clock, no charge, no reason.
"""

from collections.abc import Callable

from coxswain.service.scheduler.families import Families
from coxswain.service.scheduler.groups import ClassGroup
from coxswain.service.scheduler.limits import Limits
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.states import (
    FINISHED,
    HELD,
    HELD_KEPT,
    HELD_PARKED,
    QUEUED,
    RUNNING,
    SLOTTED,
    State,
    Transition,
    after,
)
from coxswain.service.scheduler.tenants import Account, Tenants


class Roster:
    """All requests on one engine that have not ended.

    Args:
        tenants: told who waits.
        limits: told of every change of a count that has a cap.
    """

    def __init__(self, tenants: Tenants, limits: Limits) -> None:
        self._tenants = tenants
        self._limits = limits
        self.classes: dict[str, ClassGroup] = {}
        self.records: dict[str, Record] = {}
        """By the engine's id."""
        self.families = Families()
        """By public id."""
        self.running: dict[Record, None] = {}
        self.held: dict[Record, None] = {}
        self.kept: dict[Record, None] = {}
        """Those of the held that keep KV and slot: no more than there are slots."""
        self.parked: dict[Record, None] = {}
        """Those of the held that keep KV and have no slot."""
        self.awaiting_first: dict[Record, None] = {}
        """Admitted, no token yet."""
        self.touched: dict[Record, None] = {}
        """Changed since the last status frame, running ones' token counts apart; also those that ended since,
        if that frame listed them. Not those that only came: if they are among the first that wait, they are told."""
        self.changed = True
        """Whether there is anything new for status."""

    def enter(self, record: Record) -> None:
        """A new request is here, and waits."""
        self.records[record.id] = record
        self.families.enter(record)
        self._tenants.joined(record.account, record)
        record.group.joined(record)
        self.changed = True

    def leave(self, record: Record) -> None:
        """Forget a request that has ended, but for the next frame, which says that it is gone."""
        del self.records[record.id]
        self.families.leave(record)
        if record.number:
            self.touched[record] = None
        else:
            self.touched.pop(record, None)

    def move(self, record: Record, transition: Transition) -> None:
        """Take a transition and keep the sets and counts in step with it.

        Raises:
            IllegalTransitionError: if it is not in the table; nothing was changed.
        """
        old = record.state
        record.state = new = after(old, transition)
        account, group = record.account, record.group
        if old is QUEUED:
            self._tenants.left(account)
            group.left()
        elif old is RUNNING:
            del self.running[record]
            self._count(account, group, -1)
        else:
            self._leave_hold(record, account, group, new)
        if new is QUEUED:
            self._tenants.joined(account, record)
            group.joined(record)
        elif new is RUNNING:
            self.running[record] = None
            self._count(account, group, 1)
        elif new is not FINISHED:
            self._enter_hold(record, account, group, old, new)
        if (new in SLOTTED) is not (old in SLOTTED):
            (account.meter.start if new in SLOTTED else account.meter.stop)(record)
        self._tenants.touched[account] = True
        self.touched[record] = None
        self.changed = True

    def _enter_hold(
        self, record: Record, account: Account, group: ClassGroup, old: State, new: State
    ) -> None:
        """It is held, or held otherwise."""
        if old not in HELD:
            self.held[record] = None
            account.held += 1
            group.held += 1
        if new is HELD_KEPT:
            self.kept[record] = None
        elif new is HELD_PARKED:
            self.parked[record] = None

    def _leave_hold(self, record: Record, account: Account, group: ClassGroup, new: State) -> None:
        """It is held no more, or held otherwise."""
        self.kept.pop(record, None)
        self.parked.pop(record, None)
        if new not in HELD:
            del self.held[record]
            account.held -= 1
            group.held -= 1

    def _count(self, account: Account, group: ClassGroup, change: int) -> None:
        """One more or one less runs: the one place where caps see it."""
        account.running += change
        if account.max_running is not None:
            self._limits.counted(account)
        self._count_class(account, group, change)

    def _count_class(self, account: Account, group: ClassGroup, change: int) -> None:
        group.running += change
        if group.policy.borrow:
            account.borrowing += change
            group.borrowing += change
        if group.max_running is not None:
            self._limits.counted(group)

    # Classes

    def reclass(self, record: Record, class_: str) -> None:
        """Another class for a request; the queue must not have it at the moment."""
        old, new = record.group, self.classes[class_]
        record.group = new
        if record.state is QUEUED:
            old.left()
            new.joined(record)
            new.reordered = True
        elif record.state is RUNNING:
            self._count_class(record.account, old, -1)
            self._count_class(record.account, new, 1)
        else:
            old.held -= 1
            new.held += 1

    def set_classes(self, classes: dict[str, ClassGroup], group_of: Callable[[Record], ClassGroup]) -> None:
        """Other classes, empty as yet, and the class of every request anew; the queue must not have any."""
        self.classes = classes
        for account in self._tenants.accounts.values():
            account.borrowing = 0
        for group in classes.values():
            group.reordered = True
        for record in self.records.values():
            record.group = group = group_of(record)
            if record.state is QUEUED:
                group.joined(record)
            elif record.state is RUNNING:
                self._count_class(record.account, group, 1)
            else:
                group.held += 1
            self.touch(record)

    def touch(self, record: Record) -> None:
        """Something about a request changed that its row in status shows."""
        self.touched[record] = None
        self.changed = True

    def validate(self) -> None:
        """Check every invariant; for tests."""
        counts: dict[str, list[int]] = {name: [0, 0, 0] for name in self._tenants.accounts}
        by_class: dict[str, list[int]] = {name: [0, 0, 0] for name in self.classes}
        borrowing = 0
        for record in self.records.values():
            assert record.state is not FINISHED
            assert (record.state in HELD) == bool(record.holds) == (record in self.held), record
            assert (record.state is RUNNING) == (record in self.running), record
            assert (record.state is HELD_KEPT) == (record in self.kept), record
            assert (record.state is HELD_PARKED) == (record in self.parked), record
            index = 0 if record.state is QUEUED else 1 if record.state is RUNNING else 2
            counts[record.account.name][index] += 1
            by_class[record.class_][index] += 1
            borrowing += index == 1 and record.group.policy.borrow
        for name, account in self._tenants.accounts.items():
            assert counts[name] == [account.queued, account.running, account.held], name
        for name, group in self.classes.items():
            group.validate()
            assert by_class[name] == [group.queued, group.running, group.held], name
            assert group.borrowing == (group.running if group.policy.borrow else 0)
        assert borrowing == sum(account.borrowing for account in self._tenants.accounts.values())
        live = set(self.records.values())
        for some in (self.running, self.held, self.kept, self.parked, self.awaiting_first):
            assert some.keys() <= live
        ended = self.touched.keys() - live
        assert all(record.state is FINISHED and record.number for record in ended)
        self.families.validate(live)
