"""Status: what a worker says of itself, built from the core. Pure; the shell supplies the engine's gauges.

A delta holds what changed since the last frame, in absolute values; a full frame holds everything.
Called at most every `COX_STATUS_INTERVAL_S`, so that its cost does not grow with the step rate.
"""

from itertools import islice
from typing import NamedTuple

from coxswain.schemas import status as st
from coxswain.schemas.errors import Code, RefusedError
from coxswain.schemas.policy import Epoch
from coxswain.service.port import Draft
from coxswain.service.scheduler.core import SteeringCore
from coxswain.service.scheduler.rows import ClassRows, RequestRows, TenantRows, row


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
        self._requests = RequestRows(core, head)
        self._tenants = TenantRows(core.tenants)
        self._classes = ClassRows(core.roster)
        self._revision = 0

    def frame(
        self,
        now: float,
        gauges: Gauges,
        commands: st.CommandStats,
        *,
        full: bool,
        repeat: bool = False,
        peek: bool = False,
    ) -> Draft:
        """The next frame; the bus completes it.

        `repeat` says that a full frame follows a delta with nothing in between: it has the delta's revision.
        `peek` builds a full frame without taking note of it, for a query: it is of no revision.
        """
        core, roster = self.core, self.core.roster
        self._revision += not (repeat or peek)
        core.ledger.settle_all()
        gone: tuple[st.Gone, ...] = ()
        if full:
            requests = self._requests.full(peek=peek)
            tenants = self._tenants.full(now, peek=peek)
            classes = self._classes.full(now, peek=peek)
        else:
            requests, gone = self._requests.delta()
            tenants = self._tenants.delta(now)
            classes = self._classes.delta(now)
        if not peek:
            roster.changed = False
        identity = self.identity
        queued = len(roster.records) - len(roster.running) - len(roster.held)
        frame = st.Frame(
            worker=identity.worker, incarnation=identity.incarnation, seq=0, full=full, part=0, parts=1, sent_at=now,
            step=core.step, model=identity.model, vllm_version=identity.vllm_version, state=gauges.state,
            slots=st.Slots(
                active=gauges.active_slots, total=gauges.total_slots,
                running=len(roster.running), held=len(roster.kept),
            ),
            kv_blocks=st.KvBlocks(total=gauges.total_blocks, used=gauges.used_blocks, held=gauges.held_blocks),
            step_s=gauges.step_s, queued=queued, running=len(roster.running), held=len(roster.held),
            preempted_total=core.ledger.preempted_total, recomputed_tokens_total=core.ledger.recomputed_total,
            commands=commands, leader=self.leader(now), config=core.digest, events_dropped_total=gauges.events_dropped,
            revision=0 if peek else self._revision, classes=classes, gone=gone,
        )  # fmt: skip
        return Draft(frame, requests, tenants)

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
        limit = min(query.limit, st.MAX_PAGE)
        total = len(self.core.queue)
        skip = min(skip, total)  # what is beyond the end is an empty page
        records = list(islice(self.core.queue.walk(skip), limit))
        rows = tuple(row(self.core, record, place) for place, record in enumerate(records, skip))
        end = skip + len(rows)
        return st.QueuePage(requests=rows, next=str(end) if end < total and rows else None, total=total)

    def request(self, name: str) -> st.RequestReport:
        """All children of a request that have not ended, and their stories so far.

        Raises:
            RefusedError: 404 if there is none.
        """
        core, families = self.core, self.core.roster.families
        family = families.find(name)
        if not family:
            raise RefusedError(Code.NOT_FOUND, f"no request {name!r} here: finished, aborted, or never here")
        return st.RequestReport(
            request=next(iter(family)).request,
            children=tuple(
                st.Child(status=row(core, record, core.queue.position(record)), story=record.told())
                for record in family
            ),
        )
