"""Requests by the public id that clients and commands know: one, or all children of a client's request. Pure.

Most clients ask for one completion, so one record stands for itself and only several make a collection: at a
hundred thousand waiting requests that is a quarter of what steering remembers of each. Kept by `roster.py`.
"""

from collections.abc import Collection

from coxswain.schemas.request_id import normalise
from coxswain.service.scheduler.record import Record


class Siblings:
    """Children of one client's request, of which there were several."""

    __slots__ = ("born", "members")

    def __init__(self, first: Record) -> None:
        self.members: dict[Record, None] = {first: None}
        self.born = 1
        """How many there have been; the next one's number."""


class Families:
    """All requests that have not ended, by public id."""

    def __init__(self) -> None:
        self._families: dict[str, Record | Siblings] = {}

    def __len__(self) -> int:
        return len(self._families)

    def __getitem__(self, request: str) -> Collection[Record]:
        family = self._families[request]
        return family.members.keys() if isinstance(family, Siblings) else (family,)

    def get(self, request: str) -> Collection[Record]:
        """All children of a client's request that have not ended, in order; empty if there are none."""
        return self[request] if request in self._families else ()

    def find(self, name: str) -> Collection[Record]:
        """As `get`, by whatever name people have for the request: the id of a body or of a log does, too."""
        return self.get(name) or self.get(normalise(name))

    def enter(self, record: Record) -> None:
        """One more child: it gets its number, the first 0."""
        family = self._families.setdefault(record.request, record)
        if family is record:
            return
        if not isinstance(family, Siblings):
            family = self._families[record.request] = Siblings(family)
        family.members[record] = None
        record.child = family.born
        family.born += 1

    def leave(self, record: Record) -> None:
        """A child has ended; numbers begin again when all have."""
        family = self._families.pop(record.request)
        if isinstance(family, Siblings):
            del family.members[record]
            if family.members:
                self._families[record.request] = family

    def validate(self, live: Collection[Record]) -> None:
        """Check every invariant; for tests."""
        members = [record for request in self._families for record in self[request]]
        assert len(members) == len(live)
        assert set(members) == set(live)
        assert all(record in self[record.request] for record in members)
