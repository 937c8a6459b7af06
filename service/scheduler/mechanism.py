"""What steering does to vLLM's scheduler: hold, park, drop, resume, and what it asks of it. The port `Engine`.

No decisions here: the core says what, this file knows how (docs/decisions/0002 and 0011). Everything touches only
the scheduler's own state, on the engine's thread, between two of its steps or, for reclaim, inside one.

* hold: the request leaves `running`; status, blocks and slot stay. What was in flight is processed as usual.
* park: vLLM's own state of a preempted request, except that KV blocks and computed positions stay; the model
  runner forgets it, so its slot is free. It resumes by vLLM's path for waiting requests that hold KV.
* drop, evict: vLLM's own preemption; a held request goes to no queue, an evicted one to the waiting queue.
"""

import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from operator import attrgetter
from typing import Any, Final

from vllm.v1.request import RequestStatus

from coxswain.service.scheduler import compat
from coxswain.service.scheduler.core import SteeringCore
from coxswain.service.scheduler.groups import Group
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.states import HELD_KEPT, QUEUED, RUNNING
from coxswain.service.scheduler.tenants import Account

CLASS_STRIDE: Final = 2**33
"""vLLM picks a victim by `Request.priority`; we write class and priority into it, class first."""

FEW: Final = 32
"""Requests that are put into the running list one by one; where more came, it is sorted."""

_urgency = attrgetter("priority")


class Mechanism:
    """Acts on one vLLM scheduler.

    Args:
        scheduler: vLLM's, fully constructed.
        engine: the engine process that runs it, or None (it then cannot tell clients of aborts).
    """

    def __init__(self, scheduler: Any, engine: Any | None) -> None:
        self._scheduler = scheduler
        self._engine = engine
        self._active: int = scheduler.max_num_active_reqs
        self._total: int = scheduler.max_num_running_reqs
        # A connector that was told of a request's blocks is told of them again when it resumes with its KV on V2, and
        # appends them: it then stores wrong blocks under right keys (tests/integration/test_modes.py shows it).
        self.parks: bool = scheduler.connector is None
        self.core: SteeringCore
        self._unsorted = self._reclaiming = False
        self.bounds_prefill = False
        """Whether the last step's bounds are still in force."""
        self._appended = 0
        """How many vLLM has put at the end of its running list since that was in order, or more."""
        self._chunks: bool = scheduler.scheduler_config.enable_chunked_prefill
        self._left: dict[Group, int] = {}
        self._whole: dict[Group, int] = {}
        self._aside: Collection[Group] = ()
        self._busy: list[Group] = []
        self._reserve_lookahead: Callable[..., Any] = scheduler._reserve_prefill_lookahead  # noqa: SLF001
        manager = scheduler.kv_cache_manager
        self._allocate = manager.allocate_slots = compat.allocation(manager)

    def attach(self, core: SteeringCore) -> None:
        """The core that this engine reports to."""
        self.core = core

    # Acts

    def hold(self, record: Record) -> None:
        """Take a running request out of the running loop; it keeps status, blocks, slot and drafts.

        Drafts stay right while it says nothing more. Where the runner has none of its own any more (V1, async), it
        takes the placeholders for drafts that are rejected, as for any request that a step passed over.

        One that was released from a park, and not admitted since, leaves vLLM's queue; it has no slot to keep.
        """
        request, scheduler = record.payload, self._scheduler
        if request.status == RequestStatus.RUNNING:
            _take_out(scheduler.running, request)
            scheduler._inflight_prefills.discard(request)  # noqa: SLF001
        else:
            self._leave_kv_holding(request)
        self.fit()

    def park(self, record: Record) -> None:
        """Give back the slot of a kept request that has nothing in flight; blocks and positions stay."""
        request, scheduler = record.payload, self._scheduler
        assert self.parkable(record), f"{record} has tokens in flight or cannot be parked here"
        request.status = RequestStatus.PREEMPTED
        scheduler.reset_preempted_req_ids.add(request.request_id)
        # A resume in the same step must send all token ids again (V1 model runner).
        scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        self.fit()

    def drop(self, record: Record) -> None:
        """Free the KV of a running, kept or parked request by vLLM's own preemption; it goes to no queue."""
        self._preempt(record.payload)

    def evict(self, record: Record) -> None:
        """Preempt a running request, or one that waits with its KV, as vLLM does: it is queued."""
        self._preempt(record.payload)

    def _preempt(self, request: Any) -> None:
        scheduler = self._scheduler
        if request.status == RequestStatus.RUNNING:
            _take_out(scheduler.running, request)
        else:  # parked, or released from it: vLLM preempts only what has the status of running
            self._leave_kv_holding(request)
            request.status = RequestStatus.RUNNING
        scheduler._preempt_request(request, time.monotonic())  # noqa: SLF001
        scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        self.fit()

    def _leave_kv_holding(self, request: Any) -> None:
        self._scheduler.kv_holding_waiting.remove_requests([request])
        self._scheduler.deferred_waiting.discard(request)  # vLLM may have skipped it

    def resume(self, record: Record) -> None:
        """Put a kept request back into the running loop, a parked one where vLLM admits what waits with KV."""
        request, scheduler = record.payload, self._scheduler
        if request.status == RequestStatus.RUNNING:
            scheduler.running.append(request)
            self._unsorted = True
            if request.is_prefill_chunk:
                scheduler._inflight_prefills.add(request)  # noqa: SLF001
        else:
            scheduler.kv_holding_waiting.add_request(request)
        self.fit()

    def enqueue(self, record: Record) -> None:
        """Queue a released request."""
        self._scheduler._enqueue_waiting_request(record.payload)  # noqa: SLF001
        self.fit()

    def dequeue(self, record: Record) -> None:
        """A waiting request is about to leave the queue."""
        self._scheduler.deferred_waiting.discard(record.payload)

    def reprioritized(self, record: Record) -> None:
        """Write class and priority where vLLM's own choice of victims reads them."""
        record.payload.priority = record.group.place * CLASS_STRIDE + record.priority
        self._unsorted |= record.state is RUNNING

    def abort(self, records: list[Record]) -> None:
        """End requests and tell their clients."""
        requests = self._scheduler.finish_requests(
            [record.id for record in records], RequestStatus.FINISHED_ABORTED
        )
        compat.send_aborts(self._engine, requests)

    # Questions about one request

    def obstacle(self, record: Record, kv: str) -> str | None:
        """Why this request cannot be held so now."""
        request = record.payload
        if request.resumable:
            return "a streaming session cannot be held in this version"
        if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            return "its KV is being loaded from a remote store: try again"
        if record.state is QUEUED and record not in self.core.queue:
            return "vLLM itself has it waiting for something: try again"
        if kv == "keep" and record.state is RUNNING and request.lora_request is not None and not self.parks:
            return "with LoRA and a KV connector only `kv: drop` is safe: continuing could exceed max_loras"
        return None

    def in_flight(self, record: Record) -> int:
        """Output tokens of steps that were scheduled and whose output has not come back."""
        return int(record.payload.num_output_placeholders) if record.state is RUNNING else 0

    def ready(self, record: Record) -> bool:
        """Whether vLLM would not skip this waiting request: nothing it waits for, nothing stale."""
        return compat.ready(self._scheduler, record.payload)

    def parkable(self, record: Record) -> bool:
        """Whether a kept request has nothing in flight, and this engine parks."""
        return self.parks and not record.payload.num_in_flight_tokens

    def resumable(self, record: Record) -> bool:
        """vLLM counts LoRAs only at admission: a kept request with one must pass through it again."""
        return record.payload.lora_request is None

    def waits_with_kv(self, record: Record) -> bool:
        """Whether it was released from a park and has not been scheduled since.

        With a connector nothing parks: what waits with KV there was loaded for, and counts as running in a step only.
        """
        request = record.payload
        return bool(
            self.parks
            and record.state is RUNNING
            and request.status == RequestStatus.PREEMPTED
            and request.num_computed_tokens
        )

    def frees(self, record: Record) -> int:
        """Blocks that only this request uses, if vLLM may free them now."""
        scheduler = self._scheduler
        if not scheduler._request_blocks_can_be_freed(record.payload):  # noqa: SLF001
            return 0
        groups = scheduler.kv_cache_manager.get_blocks(record.id).blocks
        return sum(block.ref_cnt == 1 and not block.is_null for group in groups for block in group)

    def blocks(self, record: Record) -> int:
        """KV blocks of a request, shared ones too."""
        return sum(len(group) for group in self._scheduler.kv_cache_manager.get_blocks(record.id).blocks)

    def in_transit(self, record: Record) -> bool:
        """Whether anything of it is in flight."""
        return bool(record.payload.num_in_flight_tokens)

    def needs(self, record: Record, enough: int) -> int:
        """Blocks that vLLM would ask for to admit it or, kept, for its next token."""
        return (
            1 if record.state is HELD_KEPT else compat.blocks_needed(self._scheduler, record.payload, enough)
        )

    # Questions about room

    def free_blocks(self) -> int:
        """Free blocks of the pool; with prefix caching, cached ones that nobody uses are free."""
        return int(self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def step_tokens(self) -> int:
        """vLLM's token budget of a step."""
        return int(self._scheduler.max_num_scheduled_tokens)

    def free_slots(self) -> int:
        """Active slots that nobody has or is about to take."""
        scheduler = self._scheduler
        return int(scheduler.max_num_active_reqs - len(scheduler.running) - len(scheduler.kv_holding_waiting))

    def spare_slots(self) -> int:
        """Slots of the model runner beyond the active ones that no kept request has."""
        return self._total - self._active - len(self.core.roster.kept)

    def released(self) -> list[Record]:
        """Of vLLM's queue for what waits with KV, those that run as far as steering is concerned."""
        waiting = (request.steering for request in self._scheduler.kv_holding_waiting)
        return [record for record in waiting if record.state is RUNNING]

    def worst_running(self) -> Iterator[Record]:
        """From the end of vLLM's running list, where `sort` keeps it in order; else of a copy that is."""
        running = self._scheduler.running
        if self.core.room.orders_running:
            self.sort()
        else:
            running = sorted(running, key=_urgency)
        return (request.steering for request in reversed(running))

    # For the shell

    def sort(self) -> None:
        """Running requests in the order of class and priority, so that the token budget is given in that order.

        vLLM's running loop gives tokens in list order; without this a request keeps its place of admission whatever
        its priority becomes. Stable, and only when something moved.
        """
        if self._unsorted or self._appended > FEW:
            self._scheduler.running.sort(key=_urgency)
        elif self._appended:  # the rest is in order, and a thousand keys are not looked at for one
            running = self._scheduler.running
            news = running[-self._appended :]
            del running[-self._appended :]
            for request in news:
                insort(running, request, key=_urgency)
        self._unsorted, self._appended = False, 0

    def best_running(self) -> int | None:
        """Place of the best class that runs; call `sort` before."""
        running = self._scheduler.running
        return (running[0].priority + CLASS_STRIDE // 2) // CLASS_STRIDE if running else None

    def bound_prefill(self, left: dict[Group, int], aside: Collection[Group] = ()) -> None:
        """Bound the prompt tokens of tenants and classes in the step that begins; of `aside` nothing runs.

        vLLM asks `_reserve_prefill_lookahead` once per request and step how many tokens it may have, after its own
        budget and before it allocates; 0 skips a running request, and ends the admission of waiting ones. So that
        nobody behind them waits for it, groups whose running prompts will take all of it offer none that wait.
        """
        if self._scheduler.need_mamba_block_aligned_split:
            return  # chunks of such models must end where vLLM put the end
        self._left, self._whole, self._aside = left, dict(left), aside
        self._note_busy(left)
        self.bounds_prefill = _put(
            self._scheduler, "_reserve_prefill_lookahead", self._grant, bool(left), self.bounds_prefill
        )

    def _grant(self, request: Any, computed: int, tokens: int) -> int:
        """What vLLM would give a request, within what is left to its class."""
        granted = int(self._reserve_lookahead(request, computed, tokens))
        record = request.steering
        # With an adapter it goes on: vLLM counts those of what runs in the step, and would take its room for free.
        if self._aside and not request.lora_request and record.group in self._aside:
            return 0
        if request.num_tokens - computed <= 1:  # a decode
            return granted
        groups = [group for group in (record.account, record.group) if group in self._left]
        for group in groups:
            left = self._left[group]
            if self._chunks:
                granted = min(granted, left)
            elif granted > left and left < self._whole[group]:
                return 0  # a prompt that cannot be cut goes whole when it is the step's first
        if not granted and tokens and request.lora_request and request.status == RequestStatus.RUNNING:
            granted = 1  # else vLLM takes its adapter for free, admits another, and ends when both are to run
        for group in groups:
            self._left[group] = max(0, self._left[group] - granted)
        return granted

    def _note_busy(self, left: dict[Group, int]) -> None:
        """Which groups' running prompts will take all that is left to them in this step."""
        wanted: Counter[Group] = Counter()
        for request in self._scheduler._inflight_prefills if left else ():  # noqa: SLF001
            tokens = request.num_tokens - request.num_computed_tokens
            wanted[request.steering.account] += tokens
            wanted[request.steering.group] += tokens
        self._busy = [group for group, tokens in left.items() if wanted[group] >= tokens]
        self._mark_busy(self._busy, busy=True)

    def popped(self, record: Record) -> None:
        """A waiting request is admitted: of groups that it left nothing, none that waits is offered in this step.

        Else the next of them would be granted nothing, and end the admission of everybody.
        """
        if not self._left:
            return
        spent = [
            group for group in (record.account, record.group) if not group.busy and self._is_spent(group)
        ]
        if spent:
            self._busy += spent
            self._mark_busy(spent, busy=True)

    def _is_spent(self, group: Group) -> bool:
        left = self._left.get(group)
        return left is not None and (not left or (not self._chunks and left < self._whole[group]))

    def scheduled(self) -> None:
        """The step was scheduled: what was busy in it may offer what waits again."""
        if self._busy:
            self._mark_busy(self._busy, busy=False)
            self._busy = []

    def _mark_busy(self, groups: Iterable[Group], *, busy: bool) -> None:
        for group in groups:
            group.busy = busy
            if isinstance(group, Account):
                self.core.limits.counted(group)

    def admitted(self, count: int) -> None:
        """vLLM put requests at the end of its running list."""
        if self.core.room.orders_running:
            self._appended += count

    def fit(self) -> None:
        """Keep vLLM's bounds in step with what is held.

        A kept request has its slot: fewer others may be active when spare slots run out. While anything is held with
        KV, an allocation that fails asks `Room.give_way` first.
        """
        scheduler, roster = self._scheduler, self.core.roster
        scheduler.max_num_active_reqs = max(0, min(self._active, self._total - len(roster.kept)))
        manager = scheduler.kv_cache_manager
        wanted = bool(roster.kept or roster.parked)
        if wanted is not self._reclaiming:
            self._reclaiming = wanted
            manager.allocate_slots = self._allocate_or_reclaim if wanted else self._allocate

    def _allocate_or_reclaim(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's `allocate_slots`; when blocks are short, held requests give theirs before anybody fails."""
        while True:
            blocks = self._allocate(request, *args, **kwargs)
            if blocks is not None or not self.core.room.give_way(request.steering):
                return blocks


def _take_out(running: list[Any], request: Any) -> None:
    """Remove a request, if it is there, from vLLM's running list: from the end, where victims are."""
    for place in range(len(running) - 1, -1, -1):
        if running[place] is request:
            del running[place]
            return


def _put(thing: Any, name: str, ours: Callable[..., Any], wanted: bool, there: bool) -> bool:
    """Put our method in the place of vLLM's, or take it away: nothing costs a step while it is not needed.

    Not by way of `__dict__`: an instance whose dictionary was asked for has slower attributes from then on (CPython).
    """
    if wanted and not there:
        setattr(thing, name, ours)
    elif there and not wanted:
        delattr(thing, name)
    return wanted
