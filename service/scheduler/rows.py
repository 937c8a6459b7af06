"""Rows of status: a request's, a tenant's, a class's, and which of them have changed since the last frame. Pure.

A frame costs what changed, not what is there: a row is kept until something touches its request or tenant, and of
what was only served the numbers are handed over beside the old row (`port.Draft`). Called by `report.py` only.
"""

from collections.abc import Iterable, Mapping
from itertools import chain, islice

from msgspec.structs import replace

from coxswain.schemas import status as st
from coxswain.service.port import Charged, Served
from coxswain.service.scheduler.core import SteeringCore
from coxswain.service.scheduler.groups import ClassGroup
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.roster import Roster
from coxswain.service.scheduler.states import HELD, KV, State
from coxswain.service.scheduler.tenants import Account, Tenants


class RequestRows:
    """Rows of what a frame lists: all running and held requests and the first that wait.

    Args:
        core: whose requests.
        head: how many waiting requests are listed.
    """

    def __init__(self, core: SteeringCore, head: int) -> None:
        self._core = core
        self._head = head
        self._places: Mapping[Record, int] = {}
        """The waiting requests that the last frame listed."""

    def full(self, *, peek: bool) -> list[Served]:
        """All rows. `peek` takes no note of them: the next delta is what it would have been."""
        places = self._first()
        roster = self._core.roster
        served: list[Served] = []
        for record in chain(roster.running, roster.held, places):
            new, tokens = self._row(record, places.get(record)), len(record.outputs)
            served.append((new, tokens))
            if not peek:
                record.row, record.shown = new, tokens
        if not peek:
            self._drop_unlisted(places)
        return served

    def delta(self) -> tuple[list[Served], tuple[st.Gone, ...]]:
        """Rows that the last frame did not have, or had otherwise, and what it had that is no longer listed."""
        places = self._first()
        roster = self._core.roster
        touched = roster.touched
        served: list[Served] = []
        others = [record for record in touched if record in roster.held and record not in roster.kept]
        # Without being touched, only what has a slot changes, by its tokens. (What was in flight when a request
        # lost its KV arrives later: the next full frame has it.)
        for record in chain(roster.running, roster.kept):
            tokens = len(record.outputs)
            if record in touched or record.row is None:
                others.append(record)
            elif tokens != record.shown:
                record.shown = tokens
                served.append((record.row, tokens))
        for record in chain(others, places):
            new, tokens = self._row(record, places.get(record)), len(record.outputs)
            if tokens != record.shown or (new is not record.row and new != record.row):
                record.row, record.shown = new, tokens
                served.append((new, tokens))
        return served, self._gone(self._drop_unlisted(places))

    def _first(self) -> Mapping[Record, int]:
        return {record: place for place, record in enumerate(islice(self._core.queue.walk(), self._head))}

    def _row(self, record: Record, place: int | None) -> st.RequestStatus:
        """The request's row as of now, output tokens apart: the last one if that still says what is the case."""
        old = record.row
        if old is None or record in self._core.roster.touched:
            return row(self._core, record, place)
        return old if old.position == place else replace(old, position=place)

    def _drop_unlisted(self, places: Mapping[Record, int]) -> list[Record]:
        """Forget the rows of what is no longer listed; begin a new account of what is touched."""
        touched = self._core.roster.touched
        dropped = []
        for record in chain(touched, self._places):
            listed = record in places or record.state not in (State.QUEUED, State.FINISHED)
            if record.row is not None and not listed:
                record.row = None
                dropped.append(record)
        touched.clear()
        self._places = places
        return dropped

    def _gone(self, dropped: Iterable[Record]) -> tuple[st.Gone, ...]:
        """Their names, without those that another listed request has by now."""
        names = {(record.request, record.child): len(record.outputs) for record in dropped}
        families = self._core.roster.families
        again = {
            (record.request, record.child)
            for request in {request for request, _ in names}
            for record in families.get(request)
            if record.row is not None
        }
        return tuple(
            st.Gone(request=request, child=child, output_tokens=tokens)
            for (request, child), tokens in names.items()
            if (request, child) not in again
        )


class TenantRows:
    """Rows of all tenants that ever had a request here."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants
        seen = (account for account in tenants.accounts.values() if account.seen)
        self._rows = {account: tenant_row(0.0, account) for account in seen}
        """As made when more than its charge changed last; ages are as of then."""

    def full(self, now: float, *, peek: bool) -> list[Charged]:
        """All rows. `peek` takes no note of them: the next delta is what it would have been."""
        touched, rows = self._tenants.touched, self._rows
        for account, changed in touched.items():
            if account.seen and (changed or account not in rows):
                rows[account] = tenant_row(now, account)
        if not peek:
            touched.clear()
        return [
            (row, oldest_queued_s(now, account), account.virtual_time, account.charged, account.output_tokens)
            for account, row in rows.items()
        ]

    def delta(self, now: float) -> list[Charged]:
        """Rows of those that changed since the last frame, their ages apart."""
        touched, rows = self._tenants.touched, self._rows
        charged: list[Charged] = []
        for account, changed in touched.items():
            if not account.seen:
                continue
            if changed or account not in rows:
                rows[account] = tenant_row(now, account)
            old = rows[account]
            charged.append(
                (old, old.oldest_queued_s, account.virtual_time, account.charged, account.output_tokens)
            )
        touched.clear()
        return charged


class ClassRows:
    """Rows of all classes: few, so they are made anew for each frame and compared.

    Args:
        roster: who counts.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._rows: dict[str, st.ClassStatus] = {}
        """As the last frame had them."""

    def full(self, now: float, *, peek: bool) -> tuple[st.ClassStatus, ...]:
        """All rows. `peek` takes no note of them: the next delta is what it would have been."""
        rows = {name: class_row(now, group) for name, group in self._roster.classes.items()}
        if not peek:
            self._rows = rows
        return tuple(rows.values())

    def delta(self, now: float) -> tuple[st.ClassStatus, ...]:
        """Rows of those that changed since the last frame, their ages apart."""
        old, new = self._rows, self.full(now, peek=False)
        return tuple(
            each
            for each in new
            if each.class_ not in old
            or replace(each, oldest_queued_s=old[each.class_].oldest_queued_s) != old[each.class_]
        )


def class_row(now: float, group: ClassGroup) -> st.ClassStatus:
    """A class as status shows it."""
    return st.ClassStatus(
        class_=group.name, queued=group.queued, running=group.running, held=group.held,
        oldest_queued_s=group.oldest_queued_s(now), max_running=group.max_running, max_queued=group.max_queued,
    )  # fmt: skip


def row(core: SteeringCore, record: Record, place: int | None) -> st.RequestStatus:
    """A request as status shows it."""
    state = record.state
    slo_s = core.classes[record.class_].slo_s
    return st.RequestStatus(
        request=record.request, child=record.child, tenant=record.account.name, class_=record.class_,
        priority=record.priority,
        state="running" if state is State.RUNNING else "held" if state in HELD else "queued",
        kv=KV.get(state, "none"), arrived_at=record.arrived_at, prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens, output_tokens=len(record.outputs),
        deadline_s=None if slo_s is None else record.arrived_at + slo_s,
        held_by=tuple(record.holds), position=place, protected_until=record.protected_until or None,
    )  # fmt: skip


def oldest_queued_s(now: float, account: Account) -> float:
    """How long its longest waiting request has waited; 0 if none waits."""
    oldest = next(iter(account.waiting), None)
    return 0.0 if oldest is None else max(0.0, now - oldest.queued_since)


def tenant_row(now: float, account: Account) -> st.TenantStatus:
    """A tenant as status shows it; what has its default is left out on the way."""
    zero, weight = st.ZERO, account.weight
    return st.TenantStatus(
        tenant=account.name, class_=account.policy.class_,
        queued=account.queued, running=account.running, held=account.held,
        oldest_queued_s=oldest_queued_s(now, account) or zero, virtual_time=account.virtual_time or zero,
        base=account.base or zero, charged=account.charged or zero, lift=account.lift or zero,
        weight=st.ONE if weight == st.ONE else weight, expected_output=account.expected_output or zero,
        uncached_input_tokens_total=account.uncached_input_tokens,
        cached_input_tokens_total=account.cached_input_tokens,
        output_tokens_total=account.output_tokens, recomputed_tokens_total=account.recomputed_tokens,
        finished_total=account.finished,
        external_input_tokens_total=account.external_input_tokens,
        uncomputed_input_tokens_total=account.uncomputed_input_tokens,
        restored_tokens_total=account.restored_tokens, reloaded_tokens_total=account.reloaded_tokens,
        discarded_tokens_total=account.discarded_tokens,
        max_running=account.max_running, max_queued=account.max_queued, classes=account.policy.classes,
    )  # fmt: skip
