"""Status: what a worker says of itself, built from the core. Pure; the shell supplies the engine's gauges.

A delta holds what changed since the last frame, in absolute values; a full frame holds everything.
Called at most every `COX_STATUS_INTERVAL_S`, so that its cost does not grow with the step rate.
"""

from collections.abc import Set
from itertools import islice
from typing import NamedTuple

from coxswain.schemas import status as st
from coxswain.schemas.errors import Code, RefusedError
from coxswain.schemas.policy import Epoch
from coxswain.service.request_id import normalise
from coxswain.service.scheduler.core import SteeringCore
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.states import HELD, KV, State
from coxswain.service.scheduler.tenants import Account

MAX_PAGE = 1_000


class Identity(NamedTuple):
    """Who this worker is; the same for its whole life."""

    worker: str
    incarnation: str
    model: str
    vllm_version: str


class Gauges(NamedTuple):
    """What only the engine knows, read at the moment of a frame."""

    state: st.State
    active_slots: int
    total_slots: int
    total_blocks: int
    used_blocks: int
    held_blocks: int
    step_s: float
    queue_depth: int
    events_dropped: int


class Reporter:
    """Builds frames and answers queries about one core.

    Args:
        core: what is reported.
        identity: who reports.
        head: how many waiting requests a frame lists.
    """

    def __init__(self, core: SteeringCore, identity: Identity, head: int) -> None:
        self.core = core
        self.identity = identity
        self.head = head
        self._listed: dict[Record, tuple[int, int | None]] = {}
        """Requests in the last frame, with the output tokens and the place that it gave them."""

    def frame(
        self,
        now: float,
        gauges: Gauges,
        *,
        full: bool,
        applied: int,
        rejected: dict[str, int],
        peek: bool = False,
    ) -> st.Frame:
        """The next frame; the bus fills `seq`, `part`, `parts` and `sent_at`.

        `peek` builds a full frame without taking note of it, for a query.
        """
        core = self.core
        core.settle_all()
        places = {record: place for place, record in enumerate(islice(core.queue.walk(), self.head))}
        listed = {
            record: (len(record.outputs), places.get(record))
            for group in (core.running, core.held, places)
            for record in group
        }
        if full:
            rows = [row(core, record, places.get(record)) for record in listed]
            gone: tuple[st.Gone, ...] = ()
            accounts = [account for account in core.tenants.accounts.values() if account.seen]
        else:
            last, touched = self._listed, core.touched
            rows = [
                row(core, record, said[1])
                for record, said in listed.items()
                if last.get(record) != said or record in touched
            ]
            gone = self._gone(listed.keys())
            accounts = [
                account for account in core.tenants.accounts.values() if account.dirty and account.seen
            ]
        if not peek:
            self._listed = listed
            core.touched.clear()
            core.changed = False
            for account in accounts:
                account.dirty = False
        identity = self.identity
        queued = len(core.records) - len(core.running) - len(core.held)
        return st.Frame(
            worker=identity.worker, incarnation=identity.incarnation, seq=0, full=full, part=0, parts=1, sent_at=now,
            step=core.step, model=identity.model, vllm_version=identity.vllm_version, state=gauges.state,
            slots=st.Slots(
                active=gauges.active_slots, total=gauges.total_slots,
                running=len(core.running), held=len(core.kept),
            ),
            kv_blocks=st.KvBlocks(total=gauges.total_blocks, used=gauges.used_blocks, held=gauges.held_blocks),
            step_s=gauges.step_s, queued=queued, running=len(core.running), held=len(core.held),
            preempted_total=core.preempted_total, recomputed_tokens_total=core.recomputed_total,
            commands=st.CommandStats(applied_total=applied, rejected_total=dict(rejected), queue_depth=gauges.queue_depth),
            leader=self.leader(now), config=core.digest, events_dropped_total=gauges.events_dropped,
            tenants=tuple(tenant_row(now, account) for account in accounts),
            requests=tuple(rows), gone=gone,
        )  # fmt: skip

    def _gone(self, listed: Set[Record]) -> tuple[st.Gone, ...]:
        """What the last frame listed and this one does not; never a name that another request has by now."""
        gone = {(record.request, record.child) for record in self._listed.keys() - listed}
        if gone:
            gone -= {(record.request, record.child) for record in listed}
        return tuple(st.Gone(request=request, child=child) for request, child in gone)

    def leader(self, now: float) -> st.Leader:
        """The leader this worker last heard."""
        core = self.core
        epoch: Epoch | None = core.epoch
        heard = core.leader_heard_at
        return st.Leader(
            epoch=epoch,
            age_s=None if heard is None else max(0.0, now - heard),
            policy=core.leader.policy if core.leader is not None else None,
        )

    def page(self, query: st.QueueQuery) -> st.QueuePage:
        """One page of the queue in order. Pages are cut at the moment each is asked for.

        Raises:
            RefusedError: 400 if `after` is not what a page gave as `next`.
        """
        try:
            skip = int(query.after) if query.after else 0
        except ValueError:
            skip = -1
        if skip < 0:
            raise RefusedError(Code.MALFORMED, f"after: {query.after!r} is not the `next` of a page")
        limit = min(query.limit, MAX_PAGE)
        total = len(self.core.queue)
        records = list(islice(self.core.queue.walk(skip), limit))
        rows = tuple(row(self.core, record, place) for place, record in enumerate(records, skip))
        end = skip + len(rows)
        return st.QueuePage(requests=rows, next=str(end) if end < total and rows else None, total=total)

    def request(self, name: str) -> st.RequestReport:
        """All children of a request that have not ended, and their stories so far.

        Raises:
            RefusedError: 404 if there is none.
        """
        core = self.core
        family = core.families.get(name) or core.families.get(normalise(name))
        if not family:
            raise RefusedError(Code.NOT_FOUND, f"no request {name!r} here: finished, aborted, or never here")
        return st.RequestReport(
            request=next(iter(family)).request,
            children=tuple(
                st.Child(status=row(core, record, core.queue.position(record)), story=record.told())
                for record in family
            ),
        )


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
        held_by=tuple(record.holds), position=place,
    )  # fmt: skip


def tenant_row(now: float, account: Account) -> st.TenantStatus:
    """A tenant as status shows it."""
    oldest = next(iter(account.waiting), None)
    return st.TenantStatus(
        tenant=account.name, class_=account.policy.class_,
        queued=account.queued, running=account.running, held=account.held,
        oldest_queued_s=0.0 if oldest is None else max(0.0, now - oldest.queued_since),
        virtual_time=account.virtual_time, base=account.base, charged=account.charged, lift=account.lift,
        weight=account.weight,
        uncached_input_tokens_total=account.uncached_input_tokens,
        cached_input_tokens_total=account.cached_input_tokens,
        output_tokens_total=account.output_tokens, recomputed_tokens_total=account.recomputed_tokens,
        finished_total=account.finished,
    )  # fmt: skip
