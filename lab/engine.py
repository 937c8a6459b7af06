"""One worker in virtual time: a real scheduler, and a device that takes as long as its preset says.

What EngineCore's busy loop does: take what arrived, schedule a step, and when the device has finished process
its output and begin again; when nothing is left, sleep until somebody or the scheduler's own alarm wakes it.
Steps do not overlap, as with asynchronous scheduling off.
"""

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any, Final, NamedTuple

from vllm import SamplingParams
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.request import Request

from coxswain.lab.admission import reserving
from coxswain.lab.agenda import START, Agenda
from coxswain.lab.devices import Device
from coxswain.lab.life import ENDED, HELD, QUEUED, RUNNING, Life
from coxswain.lab.modelless import make_scheduler, vllm_config
from coxswain.lab.schedulers import KEY, environment, steered, stock
from coxswain.lab.setup import Admission, Kind
from coxswain.lab.trace import Arrival
from coxswain.service.port import Outbound
from coxswain.service.request_id import make
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.states import HELD as HELD_STATES
from coxswain.service.scheduler.states import State
from coxswain.service.simulated.roofline import Work

BLOCK: Final = 16
"""Tokens per KV block: vLLM's default on a GPU."""
EMPTY_STEP_S: Final = 1e-3
"""How long EngineCore waits before it tries again when there are requests but none may run (core.py, 0.32.0)."""
TOKEN: Final = 10
"""What the device says, always: requests ignore what ends a sequence."""


class Build(NamedTuple):
    """How a worker is made."""

    device: Device
    admission: Admission
    kind: Kind
    max_model_len: int
    status_interval_s: float
    lengths: Mapping[str, float] | None = None
    """Output tokens by public id, if the scheduler is told them (an oracle)."""


def public_id(arrival: Arrival, number: int) -> str:
    """The signed id of a run's request with this number."""
    return make(KEY, arrival.tenant, arrival.class_, f"{number:026d}")


class Engine:
    """A worker.

    Args:
        name: the worker's.
        build: how it is made.
        agenda: whose time it lives in.
        landed: called when a request of it has ended.
    """

    def __init__(self, name: str, build: Build, agenda: Agenda, landed: Callable[[Life], None]) -> None:
        self.name = name
        self.lives: dict[str, Life] = {}
        """Requests that have not ended, by the engine's id."""
        self.steps = 0
        self.busy_s = 0.0
        """How long the device worked."""
        self._agenda = agenda
        self._landed = landed
        self._device = build.device
        self._apart = build.admission == "reserve"
        self._steered = build.kind == "steered"
        self._inbox: list[Any] = []
        self._awake = False
        self._alarm_at = float("inf")
        with environment(name, build.status_interval_s):
            self.scheduler = make_scheduler(self._class(build), _config(build))
        if (lengths := build.lengths) is not None:
            self.scheduler.core.ledger.expect = lambda record: lengths[record.request]
        self._wake()

    def _class(self, build: Build) -> type[Any]:
        scheduler_cls = steered(self._agenda, self._note) if self._steered else stock
        if build.admission == "reserve":
            return reserving(scheduler_cls, build.device.preset.kv_tokens)
        return scheduler_cls

    # From outside

    def attach(self, collect: Callable[[list[Outbound]], None]) -> None:
        """Say who takes replies, frames and events, at once when they are there."""
        port = self.scheduler.port
        port.attach_bus(lambda: collect(port.collect()))
        port.attach_engine(self._wake)

    def submit(self, life: Life, number: int) -> None:
        """A request arrives now; `number` makes its id its own."""
        arrival = life.arrival
        public = public_id(arrival, number)
        request = Request(
            request_id=f"cmpl-{public}-0-{number:08x}",
            prompt_token_ids=[TOKEN] * arrival.prompt_tokens,
            sampling_params=SamplingParams(
                max_tokens=arrival.output_tokens, temperature=0.0, ignore_eos=True
            ),
            pooling_params=None,
            arrival_time=self._agenda.now,
        )
        life.worker = self.name
        life.enter(self._agenda.now - START, QUEUED)
        self.lives[request.request_id] = life
        self._inbox.append(request)
        self._wake()

    @property
    def load(self) -> int:
        """Requests that have not ended."""
        return len(self.lives)

    def shutdown(self) -> None:
        """Let go of what the scheduler holds."""
        self.scheduler.shutdown()

    # The busy loop

    def _wake(self) -> None:
        if not self._awake:
            self._awake = True
            self._agenda.at(self._agenda.now, self._turn)

    def _turn(self) -> None:
        scheduler = self.scheduler
        for request in self._inbox:
            scheduler.add_request(request)
        self._inbox.clear()
        if not scheduler.has_requests():
            self._sleep()
            return
        output = scheduler.schedule()
        if not self._steered:
            self._note_stock(output)
        if not output.total_num_scheduled_tokens:
            scheduler.update_from_output(output, EMPTY_MODEL_RUNNER_OUTPUT)
            self._agenda.after(EMPTY_STEP_S, self._turn)
            return
        result, step_s = self._run(output)
        self.steps += 1
        self.busy_s += step_s
        self._agenda.after(step_s, lambda: self._land(output, result))

    def _sleep(self) -> None:
        self._awake = False
        wake_at = self.scheduler.port.wake_at if self._steered else float("inf")
        if isfinite(wake_at) and wake_at != self._alarm_at:
            self._alarm_at = wake_at
            self._agenda.at(wake_at, self._wake)

    def _run(self, output: Any) -> tuple[ModelRunnerOutput, float]:
        """What the device returns for a step, and how long it takes.

        A request says a token when the last position that is known was computed.
        """
        requests = self.scheduler.requests
        prefill = decode = prefill_context = decode_context = prefill_pairs = decode_pairs = 0
        tokens: list[list[int]] = []
        for name, count in output.num_scheduled_tokens.items():
            request = requests[name]
            end = request.num_computed_tokens  # counts this step already
            if count == 1 and end > request.num_prompt_tokens:
                decode += 1
                decode_context += end
                decode_pairs += end
            else:
                prefill += count
                prefill_context += end
                prefill_pairs += count * (end - count) + count * (count + 1) // 2
            tokens.append([] if request.is_prefill_chunk else [TOKEN])
        first = Work(prefill, 0, prefill_context, prefill_pairs)
        second = Work(0, decode, decode_context, decode_pairs)
        step_s = self._device.step_s(first, second, apart=self._apart)
        names = list(output.num_scheduled_tokens)
        places = {name: place for place, name in enumerate(names)}
        return ModelRunnerOutput(req_ids=names, req_id_to_index=places, sampled_token_ids=tokens), step_s

    def _land(self, output: Any, result: ModelRunnerOutput) -> None:
        now = self._agenda.now - START
        for part in self.scheduler.update_from_output(output, result).values():
            for item in part.outputs:
                life = self.lives[item.request_id]
                if item.new_token_ids:
                    if life.first_token_s is None:
                        life.first_token_s = now
                    life.tokens += len(item.new_token_ids)
                if item.finish_reason is not None:
                    self._end(item.request_id, refused=False)
        self._turn()

    # What happens to requests

    def _end(self, name: str, *, refused: bool) -> None:
        life = self.lives.pop(name)
        life.finished_s = self._agenda.now - START
        life.refused = refused
        life.enter(life.finished_s, ENDED)
        self._landed(life)

    def _note(self, now: float, record: Record) -> None:
        life = self.lives.get(record.id)
        if life is None:
            return
        if record.state is not State.FINISHED:
            life.enter(now - START, _STATES[record.state])
        elif record.payload.status.name == "FINISHED_ABORTED":
            self._end(record.id, refused=True)

    def _note_stock(self, output: Any) -> None:
        now = self._agenda.now - START
        for name in output.preempted_req_ids or ():
            self.lives[name].enter(now, QUEUED)
        for name in (
            *(new.req_id for new in output.scheduled_new_reqs),
            *output.scheduled_cached_reqs.resumed_req_ids,
        ):
            self.lives[name].enter(now, RUNNING)


_STATES: Final = {
    State.QUEUED: QUEUED,
    State.RUNNING: RUNNING,
    **dict.fromkeys(HELD_STATES, HELD),
}


def _config(build: Build) -> Any:
    preset = build.device.preset
    seqs, apart = preset.max_num_seqs, build.admission == "reserve"
    blocks = preset.kv_tokens // BLOCK + 1  # block 0 is vLLM's null block
    return vllm_config(
        max_num_seqs=seqs,
        # Reserving, prompts are not split, and tokens are counted, not blocks: neither may bind.
        max_num_batched_tokens=preset.kv_tokens + seqs if apart else preset.max_num_batched_tokens,
        max_model_len=build.max_model_len,
        block_size=BLOCK,
        num_blocks=blocks + seqs if apart else blocks,
        policy="priority" if build.kind == "priority" else "fcfs",
    )
