"""Draining: a worker that is to become empty refuses new requests at the HTTP edge and holds nobody. Pure.

`verbs.py` begins and ends it; the core ends a controller's when its leader falls silent; status says it.
"""

from coxswain.schemas.subjects import OPERATOR, ROLES
from coxswain.service.scheduler.holds import Holds
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.roster import Roster


class Drain:
    """Who wants this worker empty.

    Args:
        roster: where requests are.
        holds: those of people and controllers end.
    """

    def __init__(self, roster: Roster, holds: Holds) -> None:
        self._roster = roster
        self._holds = holds
        self.roles: set[str] = set()
        """Roles that want it; the worker is draining while there is one."""

    def __bool__(self) -> bool:
        return bool(self.roles)

    def begin(self, now: float, role: str) -> list[Record]:
        """Drain for a role; returns the requests of which a hold ended, in whatever state they are now."""
        self.roles.add(role)
        held = [record for record in self._roster.held if not record.holds.keys().isdisjoint(ROLES)]
        for record in held:
            self._holds.release(now, record, ROLES, role, "drain")
        return held

    def end(self, role: str) -> None:
        """A role does not want it any more; an operator speaks for all."""
        self.roles.difference_update(ROLES if role == OPERATOR else (role,))
