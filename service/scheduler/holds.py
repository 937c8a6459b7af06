"""Holds and their leases: who keeps a request from running, until when, and whether it keeps its KV. Pure.

A request has at most one hold per role and goes on when none remains. Called by commands (`verbs.py`), by the
core as time passes, and by the vLLM shell when held KV must go. Acts on the engine through the port `Engine`.
"""

import heapq
from collections.abc import Callable, Iterable
from typing import Final

from coxswain.schemas import events as ev
from coxswain.schemas.subjects import CONTROLLER, ENGINE, ROLES
from coxswain.service.scheduler.engine import Engine
from coxswain.service.scheduler.ledger import Ledger
from coxswain.service.scheduler.queue import SteeredQueue
from coxswain.service.scheduler.record import Hold, Record
from coxswain.service.scheduler.roster import Roster
from coxswain.service.scheduler.states import HELD, HELD_KEPT, HELD_PARKED, KV, QUEUED, Transition

LEASES_EACH: Final = len({*ROLES, ENGINE})
"""Leases that one request can have: one per role."""
WAITS: Final = "released, waits for room"
WITH_KV: Final = (HELD_KEPT, HELD_PARKED)
"""Held states that have KV to lose."""


class Holds:
    """All holds on one engine.

    Args:
        engine: who stops and resumes requests.
        roster: where requests are.
        ledger: told when KV is lost.
        queue: what a held request leaves.
        tell: the core's way to say what happened.
        began: called when a kept request runs again.
        may_run: whether one more like it may run within the caps.
    """

    def __init__(
        self,
        engine: Engine,
        roster: Roster,
        ledger: Ledger,
        queue: SteeredQueue,
        tell: Callable[..., None],
        began: Callable[[float, Record], None],
        may_run: Callable[[Record], bool],
    ) -> None:
        self._engine = engine
        self._roster = roster
        self._ledger = ledger
        self._queue = queue
        self._tell = tell
        self._began = began
        self._may_run = may_run
        self.returning: dict[Record, None] = {}
        """Held by the engine: they go on when there is room (`Room`)."""
        self.returning_version = 0
        """Changes with every change to `returning` or to the holds of one in it."""
        self._leases: list[tuple[float, int, Record, Hold]] = []
        self._serial = 0

    # Begin

    def hold(
        self, now: float, record: Record, role: str, kv: str, lease_until: float | None, reason: str
    ) -> bool:
        """Put or replace one role's hold; False if that changed nothing. `kv` only moves from keep to drop."""
        old = record.holds.get(role)
        if old is not None and old.kv == "drop":
            kv = "drop"
        if old is not None and old.lease_until is None and lease_until is None and old.kv == kv:
            return False
        in_flight = self._engine.in_flight(record)
        if record.state not in HELD:
            self._begin(now, record, kv)
        elif kv == "drop" and record.state in WITH_KV:
            self.drop_kv(now, record, reason)
        hold = Hold(role, kv, old.since if old else now, lease_until, reason)
        record.holds[role] = hold
        self._note_returning(record)
        if lease_until is not None:
            self._serial += 1
            heapq.heappush(self._leases, (lease_until, self._serial, record, hold))
            self.tidy()
        self._roster.touch(record)
        self._tell(
            now, record, ev.Held, by=role, kv=KV.get(record.state, "none"), reason=reason,
            lease_s=None if lease_until is None else lease_until - now,
            in_flight_tokens=in_flight, output_tokens=len(record.outputs),
        )  # fmt: skip
        return True

    def _begin(self, now: float, record: Record, kv: str) -> None:
        was, slotless = record.state, self._engine.waits_with_kv(record)
        self._roster.move(record, Transition.HOLD_DROP if kv == "drop" else Transition.HOLD_KEEP)
        self._ledger.settle(record)
        record.held_since = now
        if was is QUEUED:
            record.queued_s += now - record.queued_since
            self._engine.dequeue(record)
            self._queue.remove(record)
        elif kv == "drop":
            self._ledger.lose_kv(record)
            self._engine.drop(record)
        else:
            if slotless:  # parked, released, and not admitted since
                self._roster.move(record, Transition.PARK)
            self._engine.hold(record)

    def _note_returning(self, record: Record) -> None:
        was = record in self.returning
        if ENGINE in record.holds:
            self.returning[record] = None
        elif was:
            del self.returning[record]
        else:
            return
        self.returning_version += 1

    # Lose the slot or the KV, go on being held

    def park(self, now: float, record: Record, reason: str) -> None:
        """Give back the slot of a kept request; its KV stays."""
        self._roster.move(record, Transition.PARK)
        self._engine.park(record)
        self._roster.touch(record)
        self._tell(now, record, ev.Parked, reason=reason)

    def drop_held(self, now: float, reason: str) -> None:
        """Free the KV of everything that is held."""
        for record in [record for record in self._roster.held if record.state in WITH_KV]:
            self.drop_kv(now, record, reason)

    def drop_kv(self, now: float, record: Record, reason: str) -> None:
        """Free the KV of a held request, which goes on being held."""
        self._roster.move(record, Transition.DROP)
        self._ledger.lose_kv(record)
        self._engine.drop(record)
        self._roster.touch(record)
        self._tell(now, record, ev.Dropped, reason=reason, computed_tokens=record.lost_mark)

    # End

    def release(self, now: float, record: Record, roles: Iterable[str], by: str, reason: str) -> bool:
        """End the holds of `roles`; the request goes on when none is left. False if there was none to end."""
        ended = [role for role in roles if record.holds.pop(role, None)]
        if not ended:
            return False
        self._roster.touch(record)
        if not record.holds and by != ENGINE and not self._can_go_on(record):
            record.holds[ENGINE] = Hold(ENGINE, "keep", now, None, WAITS)
            self._tell(
                now, record, ev.Held, by=ENGINE, kv=KV[record.state], reason=WAITS, lease_s=None,
                in_flight_tokens=self._engine.in_flight(record), output_tokens=len(record.outputs),
            )  # fmt: skip
        self._note_returning(record)
        if not record.holds:
            self._go_on(now, record, by, reason)
        return True

    def _can_go_on(self, record: Record) -> bool:
        """Whether a released request needs nothing that it has not got: if not, `Room` sees to it."""
        if record.state is HELD_KEPT:
            return self._engine.resumable(record) and self._may_run(record)
        return record.state is not HELD_PARKED

    def _go_on(self, now: float, record: Record, by: str, reason: str) -> None:
        was = record.state
        held_s = now - record.held_since
        record.held_s += held_s
        if was is not HELD_KEPT:  # a parked one passes admission, if only for the step at hand
            record.queued_since = now
        # No counter lift here: a tenant whose requests were all held was kept from its share, it did not idle.
        self._roster.move(record, Transition.RELEASE)
        self.tidy()
        if was in WITH_KV:
            self._engine.resume(record)
        else:
            self._engine.enqueue(record)
        if was is HELD_KEPT:
            self._began(now, record)
        self._tell(
            now, record, ev.Continued, by=by, reason=reason, held_s=held_s, output_tokens=len(record.outputs)
        )

    def forget(self, record: Record) -> None:
        """A held request ended: so did its holds."""
        record.holds.clear()
        self._note_returning(record)
        self.tidy()

    def end_leases(self, now: float) -> None:
        """End the holds whose lease is over."""
        while self._leases and self._leases[0][0] <= now:
            _, _, record, hold = heapq.heappop(self._leases)
            if record.holds.get(hold.role) is hold:
                self.release(now, record, (hold.role,), hold.role, "lease")

    def fail_over(self, now: float) -> None:
        """The leader is silent: end the holds of controllers, whatever their leases."""
        for record in [record for record in self._roster.held if CONTROLLER in record.holds]:
            self.release(now, record, (CONTROLLER,), CONTROLLER, "failover")

    def deadline(self) -> float | None:
        """When the next lease ends, or None."""
        leases = self._leases
        while leases and not _in_force(leases[0]):
            heapq.heappop(leases)
        return leases[0][0] if leases else None

    def tidy(self) -> None:
        """Holds that were replaced or ended leave their entries behind: these go when they outnumber the rest.

        Call after a request is no longer held.
        """
        if len(self._leases) > self._most():
            self._leases = [entry for entry in self._leases if _in_force(entry)]
            heapq.heapify(self._leases)

    def _most(self) -> int:
        return 2 * LEASES_EACH * len(self._roster.held) + 64

    def validate(self) -> None:
        """Check every invariant; for tests."""
        assert len(self._leases) <= self._most()
        assert self.returning.keys() == {record for record in self._roster.held if ENGINE in record.holds}
        leased = {hold for _, _, _, hold in self._leases}
        for record in self._roster.held:
            for role, hold in record.holds.items():
                assert hold.role == role
                assert hold.lease_until is None or hold in leased, record


def _in_force(entry: tuple[float, int, Record, Hold]) -> bool:
    _, _, record, hold = entry
    return record.holds.get(hold.role) is hold
