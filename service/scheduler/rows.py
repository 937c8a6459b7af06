"""Rows of status: a request's, a tenant's, a class's, and what of them is to be told with the next frame. Pure.

A frame costs what changed, not what is there, and of what changed as little as can be: a row that something touched is
told once; of what only goes on, one number is said in every frame, in an order that both sides know (`port.Draft`). The
bus has the rows and makes frames of them (`bus/board.py`). Called by `report.py` only.
"""

from collections.abc import Iterable
from itertools import chain, count, islice
from typing import Any, Final, TypeVar

from coxswain.schemas import status as st
from coxswain.service.port import Charge, RequestTold, TenantTold
from coxswain.service.scheduler.core import SteeringCore
from coxswain.service.scheduler.groups import ClassGroup
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.states import FINISHED, HELD, KV, QUEUED, RUNNING, SLOTTED
from coxswain.service.scheduler.tenants import Account, Tenants

ROWS_PER_STEP: Final = 256
"""Rows told with one frame: at most a millisecond or two of a step. The rest follows with the next ones."""

T = TypeVar("T")


class RequestRows:
    """Rows of what a frame lists: all running and held requests and the first that wait.

    Args:
        core: whose requests.
        head: how many waiting requests are listed.
    """

    def __init__(self, core: SteeringCore, head: int) -> None:
        self._core = core
        self._size = head
        self._head: dict[Record, None] = {}
        """The waiting requests that were listed last."""
        self._served: dict[Record, list[Any]] = {}
        """vLLM's lists of outputs of what may be delivered tokens, in the order in which it was told."""
        self._numbers = count(1)

    def anew(self) -> None:
        """Nobody knows anything: everything listed is to be told."""
        roster = self._core.roster
        for record in chain(roster.touched, self._head, self._served, roster.held):
            record.number = 0
        for record in [record for record in roster.touched if record.state is FINISHED]:
            del roster.touched[record]
        self._head, self._served = {}, {}
        roster.touched |= roster.running | roster.held

    def told(
        self, limit: int
    ) -> tuple[list[RequestTold], list[tuple[int, int]], list[int], list[int], Iterable[Record]]:
        """Rows that nobody knows as they are, what is no longer listed, who waits first, and output tokens so far.

        Last, whom rows and what is gone are about.
        """
        core, served = self._core, self._served
        touched = core.roster.touched
        head = dict.fromkeys(islice(core.queue.walk(), self._size))
        due = _take(touched, limit)
        if touched:
            # Their outputs may be in their tenant's row already: shown here too, they would count twice.
            left = [record for record in served if record in touched and record.state not in SLOTTED]
            due |= {record: touched.pop(record) for record in left}
        due |= {record: None for record in head if not record.number}
        due |= {record: None for record in self._head if record not in head and record not in touched}
        rows: list[RequestTold] = []
        gone: list[tuple[int, int]] = []
        for record in due:
            served.pop(record, None)
            if record in head or record.state not in (QUEUED, FINISHED):
                record.number = record.number or next(self._numbers)
                grows = record.state in HELD and record.admitted_at is not None
                if grows or record.state is RUNNING:
                    served[record] = record.outputs
                rows.append((record.number, row(core, record, None), record in served))
            elif record.number:
                gone.append((record.number, len(record.outputs)))
                record.number = 0
        self._head = head
        tokens = [*map(len, served.values()), *[len(record.outputs) for record in head]]
        return rows, gone, [record.number for record in head], tokens, due


class TenantRows:
    """Rows of all tenants that ever had a request here."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants

    def anew(self) -> None:
        """Nobody knows anything: every row is to be told; tenants that were only ranked have none."""
        seen = [account for account in self._tenants.accounts.values() if account.seen]
        self._tenants.touched |= dict.fromkeys(seen, True)

    def told(self, limit: int, due: Iterable[Record]) -> tuple[list[TenantTold], list[Charge]]:
        """Rows that nobody knows as they are, and those of which only base, charge and output are other than was told.

        `due`: requests of which something is told in the same draft.
        """
        rows: list[TenantTold] = []
        charges: list[Charge] = []
        price = self._tenants.prices.output
        touched = self._tenants.touched
        taken = _take(touched, limit)
        if touched:
            # Output is what its tenant's row has and what requests with a slot show: were the one told without the
            # other, whose request just ended would have had less for a frame, and totals do not fall.
            accounts = {record.account for record in due if record.outputs or record.earlier_outputs}
            taken |= {account: touched.pop(account) for account in accounts & touched.keys()}
        for account, changed in taken.items():
            if changed and account.seen:
                rows.append((tenant_row(account), account.oldest_since, account.meter.past, price))
            elif account.seen:
                charges.append(
                    (
                        account.name, account.base, account.charged, account.output_tokens, account.meter.past,
                        price,
                    )
                )  # fmt: skip
        return rows, charges


def _take(some: dict[T, Any], limit: int) -> dict[T, Any]:
    """The first of them, which are taken out."""
    if len(some) <= limit:
        taken = dict(some)
        some.clear()
        return taken
    return {each: some.pop(each) for each in list(islice(some, limit))}


def class_rows(now: float, groups: Iterable[ClassGroup]) -> tuple[st.ClassStatus, ...]:
    """All classes: few, so they are made for each frame."""
    return tuple(class_row(now, group) for group in groups)


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
        state="running" if state is RUNNING else "held" if state in HELD else "queued",
        kv=KV.get(state, "none"), arrived_at=record.arrived_at, prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens, output_tokens=len(record.outputs),
        deadline_s=None if slo_s is None else record.arrived_at + slo_s,
        held_by=tuple(record.holds), position=place, protected_until=record.protected_until or None,
    )  # fmt: skip


def tenant_row(account: Account) -> st.TenantStatus:
    """A tenant as status shows it, its age apart; what has its default is left out on the way."""
    zero, weight = st.ZERO, account.weight
    return st.TenantStatus(
        tenant=account.name, class_=account.policy.class_,
        queued=account.queued, running=account.running, held=account.held,
        virtual_time=account.virtual_time or zero,
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
