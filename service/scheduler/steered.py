"""The vLLM shell: `SteeredScheduler` is vLLM's own scheduler with the steering core in front of it.

It reports to the core what happens and passes commands, status and events between the core and the port; what
the core decides is done by `mechanism.py`. No policy and no NATS here. All of it runs on the engine's thread.
"""

import os
import time
from collections import deque
from functools import partial
from statistics import median
from typing import Any, Final

from ulid import ULID
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState

from coxswain import __version__
from coxswain.common.logs import get_logger
from coxswain.schemas.subjects import ENGINE
from coxswain.service.bus import BUSES, BusProcess, BusThread
from coxswain.service.config import Settings
from coxswain.service.port import Draft, FrameOut, Port
from coxswain.service.request_id import read_key
from coxswain.service.scheduler import compat
from coxswain.service.scheduler.adapter import KvHoldingQueue, SteeredRequestQueue
from coxswain.service.scheduler.answers import Answers
from coxswain.service.scheduler.arrival import received
from coxswain.service.scheduler.cadence import Cadence
from coxswain.service.scheduler.core import SteeringCore
from coxswain.service.scheduler.inbox import Inbox
from coxswain.service.scheduler.journal import Journal
from coxswain.service.scheduler.mechanism import Mechanism
from coxswain.service.scheduler.report import Gauges, Identity, Reporter
from coxswain.service.scheduler.states import HELD, QUEUED, RUNNING
from coxswain.service.scheduler.verbs import Commands
from coxswain.service.scheduler.victims import ChoosesVictims, Victims

log = get_logger()

HANDOVER_S: Final = 50e-6
"""How long the engine's thread lets vLLM's output thread go first with a first token for which classes stood aside."""
STOP_S: Final = 2.0
"""So long before vLLM kills an engine that shuts down, its requests have ended: for last words and last events."""


class SteeredScheduler(ChoosesVictims, AsyncScheduler):
    """vLLM's scheduler, steered from outside.

    Configured by the environment alone (`COX_NATS_URL`, `COX_FLEET`, `COX_WORKER`, …): see docs/protocol.md.
    Without `COX_NATS_URL` it schedules with fair queues and takes no commands.

    Raises:
        UnknownVllmError: for a vLLM that was not tested (`COX_ALLOW_VLLM` overrides).
        SettingRefusedError: for a setting with a bad value, or a mode of vLLM that cannot be steered.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        compat.check_version(os.environ)
        super().__init__(*args, **kwargs)
        compat.check_mode(self.vllm_config)
        parallel = self.parallel_config
        self.settings = Settings.from_env(
            os.environ, dp_rank=parallel.data_parallel_index, dp_size=compat.data_parallel_size(parallel)
        )
        self.incarnation = str(ULID())
        self.port = Port()
        self.journal = Journal(self.port)
        self._engine = engine = compat.find_engine()
        self.mechanism = Mechanism(self, engine)
        emit = self.journal.write if self.settings.enabled else None
        self.core = SteeringCore(self.mechanism, emit, leader_lease_s=self.settings.leader_lease_s)
        self.mechanism.attach(self.core)
        self.commands = Commands(self.core, self.settings.worker, self.incarnation)
        identity = Identity(
            self.settings.worker,
            self.incarnation,
            str(self.vllm_config.model_config.served_model_name or self.vllm_config.model_config.model),
            compat.version(),
        )
        self.reporter = Reporter(self.core, identity, self.settings.head)
        self._identity_key = read_key(os.environ)
        ours = {"signed_ids": self._identity_key is not None, "coxswain": __version__}
        settings = compat.settings(self.vllm_config) | ours
        answers = Answers(self.reporter, partial(self._draft, answer=True), settings)
        self.inbox = Inbox(self.port, self.core, self.commands, answers)
        self.victims = Victims(self)
        self.waiting = SteeredRequestQueue(self.core, self.mechanism)
        self.kv_holding_waiting = KvHoldingQueue(self.core)
        self._loads = compat.watch_connector(self)
        # One clock for leases, charges and events: see `Port.unix`.
        self._clock_offset = self.port.unix_offset
        self._tick_at = float("inf")
        self.cadence = Cadence(self.settings.status_interval_s, self.settings.full_interval_s)
        self._said_idle = False
        self._begun = self.port.beginnings
        """Of how many beginnings of the bus the reporter knows."""
        self._stop_at = 0.0
        self._step_began = 0.0
        self._hands_over = False
        """Whether a first token that is waited for lies with vLLM's output thread, which waits for the interpreter."""
        self._again: list[Any] = []
        """Sessions whose turn ended when they had lost their KV: to be queued again."""
        self._step_times: deque[float] = deque(maxlen=64)
        if engine is not None:
            self.port.attach_engine(lambda: compat.wake(engine))
        compat.meet(engine, self.receive)
        self.hello = {"model": identity.model, "vllm": identity.vllm_version}
        self.bus: BusProcess | BusThread | None = None
        self.start_bus()
        log.info(
            "scheduler.steered", worker=self.settings.worker, incarnation=self.incarnation,
            nats="on" if self.bus else "off: set COX_NATS_URL to steer this worker",
            identity="signed ids" if self._identity_key else "none: everything is tenant default",
        )  # fmt: skip

    def start_bus(self) -> None:
        """Join the fleet, if a NATS address was given."""
        if not self.settings.enabled:
            return
        kind = BUSES[self.settings.bus]
        self.bus = kind(self.settings, self.port, incarnation=self.incarnation, hello=self.hello)
        self.bus.start()

    def now(self) -> float:
        """Unix seconds that never jump."""
        return time.monotonic() + self._clock_offset

    def receive(self, request: Any) -> None:
        """Make a request's record; on any thread: beside the step, if the engine tells of requests (`compat.meet`)."""
        jumped = time.time() - time.monotonic() - self.port.unix_offset
        request.steering = received(request, self._identity_key, self.now(), jumped)

    # vLLM calls these

    def add_request(self, request: Any) -> None:
        """Let a request's record arrive, then vLLM queue it."""
        if request.request_id not in self.requests:
            if not hasattr(request, "steering"):
                self.receive(request)
            self.core.arrive(self.now(), request.steering, request)
            self.mechanism.reprioritized(request.steering)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Apply commands, let vLLM schedule a step in the core's order, report."""
        if self._hands_over:
            time.sleep(HANDOVER_S)
            self._hands_over = False
        self.port.look()
        now = self.now()
        if self.port.pending():
            self._drain(now)
        if now >= self._tick_at:
            self._tick(now)
        core, mechanism = self.core, self.mechanism
        if core.queue.ageing:
            core.queue.age(now)
        if self.pause_state == PauseState.UNPAUSED:
            core.room.plan(now)
        mechanism.sort()
        if core.budget or mechanism.bounds_prefill:  # once more after the last bound went: to lift it
            left = core.budget.begin(now, mechanism.best_running())
            mechanism.bound_prefill(left, core.budget.aside)
        if core.tenants.ahead and len(self.running) < self.max_num_active_reqs:
            core.ledger.settle_ahead()
        output = super().schedule(*args, **kwargs)
        if self.victims.marked is not None:
            self.victims.unmark()
        if mechanism.bounds_prefill:
            mechanism.scheduled()
        core.step = self.port.step = self.current_step
        if output.scheduled_new_reqs or output.scheduled_cached_reqs.resumed_req_ids:
            self._note_admitted(now, output)
        if output.total_num_scheduled_tokens:
            if self._step_began:
                self._step_times.append(now - self._step_began)
            self._step_began = now
        if now >= self.cadence.at and self.port.connected:
            self._publish(now, idle=False)
        if self.port.outbound:
            self.port.flush()
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """Let vLLM process a step's output; note first tokens."""
        core = self.core
        if self.num_spec_tokens:  # before: it takes them off, and cuts what was sampled behind a stop
            for request, drafts in compat.rejected_drafts(self.requests, *args, **kwargs):
                core.ledger.reject_drafts(request.steering, drafts)
        outputs = super().update_from_output(*args, **kwargs)
        core.tenants.deliveries += 1
        while self._again:  # vLLM takes them for finished, and has just taken them out
            self._enqueue_waiting_request(self._again.pop())
        if core.roster.awaiting_first:
            now = self.now()
            for record in [record for record in core.roster.awaiting_first if record.outputs]:
                core.first_token(now, record)
                self._hands_over |= core.budget.stands_aside_for(record)
        if self.port.outbound:
            self.port.flush()
        return outputs

    def has_requests(self) -> bool:
        """Whether a step is needed. Here an idle engine applies commands, without a step, and goes to rest."""
        stops = compat.stops(self._engine)
        if stops:
            self._shut_down(self.now())
        if super().has_requests():
            return True
        now = self.now()
        if self.port.pending():
            self._drain(now, idle=True)
        if now >= self._tick_at:
            self._tick(now)
        if self.core.holds.returning and self.pause_state == PauseState.UNPAUSED:
            self.core.room.plan(now)
        if stops and self.core.roster.records:  # paused, or kept back by caps: it will not run any more
            self.mechanism.abort(list(self.core.roster.records.values()))
        if super().has_requests():
            return True
        self._rest(now)
        return False

    def _shut_down(self, now: float) -> None:
        """vLLM waits for what runs, leaves what is held without an answer, and kills us when its patience ends.

        So what is held goes on, and what lasts too long is aborted in time for clients and the log to be told.
        """
        if not self.core.drain:
            self.core.drain.begin(now, ENGINE)
        patience_s = self.vllm_config.shutdown_timeout
        if not self._stop_at:
            self._stop_at = now + patience_s - min(STOP_S, patience_s / 2)
        if patience_s and now >= self._stop_at and self.core.roster.records:
            self.mechanism.abort(list(self.core.roster.records.values()))

    def get_num_unfinished_requests(self) -> int:
        """As vLLM, but what caps keep back while nothing runs is no reason for a step: a step could not admit it."""
        unfinished = int(super().get_num_unfinished_requests())
        if unfinished and not self.running and self.pause_state == PauseState.UNPAUSED:
            unfinished -= self.core.queue.blocked
            unfinished -= sum(map(self._kept_back, self.kv_holding_waiting))
        return unfinished

    def has_finished_requests(self) -> bool:
        """As vLLM, but a held request is not one that waits for a connector's clean-up."""
        if self.finished_req_ids or self.connector is None:
            return bool(self.finished_req_ids)
        running, waiting = self.get_request_counts()
        return bool(len(self.requests) > running + waiting + len(self.core.roster.held))

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """As vLLM, but held requests give up their KV first when running ones must, and all are told why."""
        if reset_running_requests:
            self.core.lose_all_kv(self.now(), "prefix cache reset")
            for request in self.running:
                self.core.evicted(self.now(), request.steering, "prefix cache reset")
        return bool(super().reset_prefix_cache(reset_running_requests, reset_connector))

    def shutdown(self) -> None:
        """Stop the bus, then vLLM's scheduler."""
        self.port.closing = True
        if self.bus is not None:
            self.bus.stop(timeout_s=2.0)
        super().shutdown()

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        self.victims.leaves(request)
        record = request.steering
        if record.state is RUNNING:  # vLLM's own decision; ours has moved the record already
            self.core.evicted(self.now(), record)
        super()._preempt_request(request, *args, **kwargs)

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        return bool(super()._handle_blocked_waiting_request(request)) and not self._kept_back(request)

    def _kept_back(self, request: Any) -> bool:
        """Whether only its caps keep it back, and it waits with KV of its own: outside our queue, which knows them.

        A session between two turns has a slot as well, which vLLM counts no more when its next turn has come.
        """
        record = request.steering
        outside = record.state is QUEUED and record not in self.core.queue and not request.resumable
        return outside and compat.may_run(request) and not self.core.limits.room(record)

    def _handle_invalid_blocks(self, invalid: Any, scheduled: Any) -> Any:
        """Let vLLM go back to what is valid; it looks at what runs, and what was held since may have loaded too."""
        held = [record.payload for record in self.core.roster.kept]
        self.running += held
        stood = [(request, request.num_computed_tokens) for request in self.running]
        try:
            failed = super()._handle_invalid_blocks(invalid, scheduled)
        finally:
            del self.running[len(self.running) - len(held) :]
        for request, computed in stood:
            if request.num_computed_tokens < computed:
                in_vain = scheduled.get(request.request_id, 0)
                self.core.ledger.load_failed(request.steering, computed - in_vain, in_vain)
        return failed

    def _handle_stopped_request(self, request: Any) -> bool:
        record = request.steering
        if not request.resumable:
            return bool(super()._handle_stopped_request(request))
        self.core.turn_ended(record, request.num_output_placeholders)
        lost = not record.has_kv
        if lost:  # with this very step under way: it is queued, and vLLM queues it once more
            self.core.queue.remove(record)
        finished = bool(super()._handle_stopped_request(request))
        if lost and not finished:
            self._again.append(request)
        if record.state is RUNNING and not finished:  # it waits for its next input
            self.core.waits_again(self.now(), record)
        return finished

    def _update_request_as_session(self, session: Any, update: Any) -> None:
        lost = not session.steering.has_kv
        if lost:  # vLLM keeps of a session's words what has KV: all but the last
            session.num_computed_tokens = session.num_tokens - 1
        self.core.next_turn_begins(session.steering)
        super()._update_request_as_session(session, update)
        self.core.next_turn(session.steering, session.num_prompt_tokens)
        if lost:
            session.num_computed_tokens = 0

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = super()._free_request(request, *args, **kwargs)
        self._loads.pop(request.request_id, None)
        was_held = request.steering.state in HELD
        self.core.finished(self.now(), request.steering, compat.finish_reason(request))
        if was_held:
            self.mechanism.fit()
        return result

    # Our own

    def _note_admitted(self, now: float, output: Any) -> None:
        scheduled = output.num_scheduled_tokens
        ids = [data.req_id for data in output.scheduled_new_reqs]
        ids += output.scheduled_cached_reqs.resumed_req_ids
        self.mechanism.admitted(len(ids))
        for request_id in ids:
            record = self.core.roster.records[request_id]
            computed = record.payload.num_computed_tokens - scheduled[request_id]
            external = max(0, computed - self._loads.pop(request_id, computed))
            self.core.admitted(now, record, computed, external)

    def _drain(self, now: float, *, idle: bool = False) -> None:
        self.inbox.work(now, idle=idle)
        self._tick_at = self.core.deadline() or float("inf")

    def _tick(self, now: float) -> None:
        self.core.tick(now)
        self._tick_at = self.core.deadline() or float("inf")

    def _rest(self, now: float) -> None:
        """The engine goes to sleep: say everything that is unsaid, and when to wake."""
        self._step_began = 0.0
        due = self._tick_at
        if self.port.connected and self._unsaid:
            if now >= self.cadence.at:
                self._publish(now, idle=True)
            if self._unsaid:
                due = min(due, self.cadence.at)
        if self.port.pending():
            due = now
        self.port.wake_later(None if due == float("inf") else due - now)
        self.port.flush(events=True)

    @property
    def _unsaid(self) -> bool:
        """Whether an engine that goes to sleep has something to say, if only that it does."""
        return self.core.roster.changed or not self._said_idle or self._begun != self.port.beginnings

    def _publish(self, now: float, *, idle: bool) -> None:
        """Tell what changed, and take note of what that took of this thread, the bus's end of it included."""
        began = time.thread_time()
        self.port.put(FrameOut(self._draft(now), idle))
        self.port.flush()
        self._said_idle = idle
        self.cadence.sent(now, time.thread_time() - began)

    def _draft(self, now: float, *, answer: bool = False) -> Draft:
        if self._begun != (beginnings := self.port.beginnings):
            self._begun = beginnings
            self.reporter.anew()
        commands = self.commands.stats(self.port.pending())
        return self.reporter.draft(now, self._gauges(), commands, answer=answer)

    def _gauges(self) -> Gauges:
        pool = self.kv_cache_manager.block_pool
        roster = self.core.roster
        held_blocks = sum(map(self.mechanism.blocks, (*roster.kept, *roster.parked)))
        return Gauges(
            state="draining" if self.core.drain
            else "serving" if self.pause_state == PauseState.UNPAUSED else "paused",
            active_slots=self.max_num_active_reqs, total_slots=self.max_num_running_reqs,
            # Block 0 is vLLM's null block: never free, never used.
            total_blocks=pool.num_gpu_blocks - 1, used_blocks=pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            held_blocks=held_blocks, step_s=median(self._step_times) if self._step_times else 0.0,
            events_dropped=self.journal.dropped + self.port.events_dropped,
        )  # fmt: skip
