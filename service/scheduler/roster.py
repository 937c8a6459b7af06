"""Who is here and where: every request by name and by state, and what changed since the last status frame. Pure.

The core lets requests in and out; core and holds move them. All sets and counts by state are kept here, in one
place (`move`), so that they cannot disagree. Knows no clock, no charge, no reason.
"""

from coxswain.service.scheduler.families import Families
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.states import HELD, State, Transition, after
from coxswain.service.scheduler.tenants import Tenants


class Roster:
    """All requests on one engine that have not ended."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants
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
        if that frame listed them."""
        self.changed = True
        """Whether there is anything new for status."""

    def enter(self, record: Record) -> None:
        """A new request is here, and waits."""
        self.records[record.id] = record
        self.families.enter(record)
        self._tenants.joined(record.account, record)
        self.touch(record)

    def leave(self, record: Record) -> None:
        """Forget a request that has ended, but for the next frame, which says that it is gone."""
        del self.records[record.id]
        self.families.leave(record)
        if record.row is None:
            self.touched.pop(record, None)
        else:
            self.touched[record] = None

    def move(self, record: Record, transition: Transition) -> None:
        """Take a transition and keep the sets and counts in step with it.

        Raises:
            IllegalTransitionError: if it is not in the table; nothing was changed.
        """
        old = record.state
        new = after(old, transition)
        account = record.account
        if old is State.QUEUED:
            self._tenants.left(account, record)
        elif old is State.RUNNING:
            del self.running[record]
            account.running -= 1
        elif new not in HELD:
            del self.held[record]
            account.held -= 1
        self.kept.pop(record, None)
        self.parked.pop(record, None)
        if new is State.QUEUED:
            self._tenants.joined(account, record)
        elif new is State.RUNNING:
            self.running[record] = None
            account.running += 1
        elif new in HELD and old not in HELD:
            self.held[record] = None
            account.held += 1
        if new is State.HELD_KEPT:
            self.kept[record] = None
        elif new is State.HELD_PARKED:
            self.parked[record] = None
        record.state = new
        account.touch()
        self.changed = True

    def touch(self, record: Record) -> None:
        """Something about a request changed that its row in status shows."""
        self.touched[record] = None
        self.changed = True

    def validate(self) -> None:
        """Check every invariant; for tests."""
        counts: dict[str, list[int]] = {name: [0, 0, 0] for name in self._tenants.accounts}
        for record in self.records.values():
            assert record.state is not State.FINISHED
            assert (record.state in HELD) == bool(record.holds) == (record in self.held), record
            assert (record.state is State.RUNNING) == (record in self.running), record
            assert (record.state is State.HELD_KEPT) == (record in self.kept), record
            assert (record.state is State.HELD_PARKED) == (record in self.parked), record
            assert (record.state is State.QUEUED) == (record in record.account.waiting), record
            index = 0 if record.state is State.QUEUED else 1 if record.state is State.RUNNING else 2
            counts[record.account.name][index] += 1
        for name, account in self._tenants.accounts.items():
            assert counts[name] == [account.queued, account.running, account.held], name
        live = set(self.records.values())
        for group in (self.running, self.held, self.kept, self.parked, self.awaiting_first):
            assert group.keys() <= live
        ended = self.touched.keys() - live
        assert all(record.state is State.FINISHED and record.row is not None for record in ended)
        self.families.validate(live)
