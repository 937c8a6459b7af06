"""Status: what a worker says of itself, built from the core. Pure; the shell supplies the engine's gauges.

A draft holds what changed since the last one, in absolute values; the bus makes frames of it (`bus/board.py`).
Called at most every `COX_STATUS_INTERVAL_S`, so that its cost does not grow with the step rate.
"""

import sys
from itertools import islice
from typing import NamedTuple

from coxswain.schemas import status as st
from coxswain.schemas.errors import Code, RefusedError
from coxswain.schemas.policy import Epoch
from coxswain.service.port import Draft
from coxswain.service.scheduler.core import SteeringCore
from coxswain.service.scheduler.rows import ROWS_PER_STEP, RequestRows, TenantRows, class_rows, row


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
        self._number = self._revision = 0
        self._fresh = True
        self._owed = self._owed_tenants = 0
        """Drafts until everything was told, since it began anew; and how many of them are for tenants."""
        self.anew()

    def anew(self) -> None:
        """Whoever listens knows nothing: the next draft is a first one, and what has no room in it follows."""
        self._requests.anew()
        self._tenants.anew()
        self._fresh = self.core.roster.changed = True
        # What ended is not told as gone: whoever reads frames must see that a revision is missing.
        self._revision += 1
        self._owed_tenants = -(-len(self.core.tenants.touched) // ROWS_PER_STEP)
        self._owed = -(-len(self.core.roster.touched) // ROWS_PER_STEP) + self._owed_tenants

    def draft(self, now: float, gauges: Gauges, commands: st.CommandStats, *, answer: bool = False) -> Draft:
        """What changed since the last draft, for the next frame.

        `answer`: for the answer to a query, which must know everything at once. It is of no revision.
        """
        core, roster = self.core, self.core.roster
        core.ledger.settle_counts()
        limit = sys.maxsize if answer else ROWS_PER_STEP
        requests, gone, head, tokens, due = self._requests.told(limit)
        # What a tenant was delivered is what its row and its requests have: without some of them it were less.
        requests_first = not answer and self._owed > self._owed_tenants
        tenants, charges = ([], []) if requests_first else self._tenants.told(limit, due)
        fresh, self._fresh = self._fresh, False
        self._number += 1
        self._owed = max(0, self._owed - 1)
        if answer:
            self._owed = 0
        else:
            self._revision += 1
            roster.changed = bool(roster.touched or core.tenants.touched)
        identity = self.identity
        queued = len(roster.records) - len(roster.running) - len(roster.held)
        frame = st.Frame(
            worker=identity.worker, incarnation=identity.incarnation, seq=0, full=False, part=0, parts=1, sent_at=now,
            step=core.step, model=identity.model, vllm_version=identity.vllm_version, state=gauges.state,
            slots=st.Slots(
                active=gauges.active_slots, total=gauges.total_slots,
                running=len(roster.running), held=len(roster.kept),
            ),
            kv_blocks=st.KvBlocks(total=gauges.total_blocks, used=gauges.used_blocks, held=gauges.held_blocks),
            step_s=gauges.step_s, queued=queued, running=len(roster.running), held=len(roster.held),
            preempted_total=core.ledger.preempted_total, recomputed_tokens_total=core.ledger.recomputed_total,
            commands=commands, leader=self.leader(now), config=core.digest, events_dropped_total=gauges.events_dropped,
            revision=0 if answer else self._revision, classes=class_rows(now, roster.classes.values()),
        )  # fmt: skip
        return Draft(
            number=self._number, fresh=fresh, complete=not self._owed, frame=frame,
            requests=requests, gone=gone, head=head, tokens=tokens, tenants=tenants, charges=charges,
        )  # fmt: skip

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
