"""The two schedulers that are compared, each with the same meter, and a utility call to change them between units.

Imported inside the engine's process, because vLLM is told to use these classes. The meter adds one line per
step on both sides; nothing else of vLLM's or ours is changed. `EngineCore.bench` is how a host reaches the
scheduler in the other process: vLLM's own utility calls, which run between steps.
"""

import itertools
import time
from collections import deque
from typing import Any

from msgspec.structs import replace
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore

from coxswain.service.scheduler import SteeredScheduler


class Metered:
    """A line per step: when it was done (`perf_counter`), requests, scheduled and delivered tokens, held requests.

    And of each request the moments of `stages`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.meter: deque[tuple[float, int, int, int, int]] = deque(maxlen=200_000)
        self.stages: dict[str, list[float]] = {}
        self._silent: dict[str, list[float]] = {}
        self._prepared: deque[float] = deque()
        """Of each step that is not processed yet: when the model runner had been given it."""
        self._processed = 0.0

    def add_request(self, request: Any) -> None:
        """As the class behind this one, and note when."""
        self._silent[request.request_id] = [time.perf_counter()]
        super().add_request(request)  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As the class behind this one, and note who is new."""
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self._prepared.append(time.perf_counter())
        for new in output.scheduled_new_reqs:
            # Who comes back is new to the V2 runner, and may have spoken before.
            if len(stages := self._silent.get(new.req_id, ())) == 1:
                stages.append(time.perf_counter())
        return output

    def get_grammar_bitmask(self, *args: Any, **kwargs: Any) -> Any:
        """As the class behind this one: vLLM asks when the step that was scheduled last has been launched."""
        self._prepared[-1] = time.perf_counter()
        return super().get_grammar_bitmask(*args, **kwargs)  # type: ignore[misc]

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """As the class behind this one, and note the step."""
        own = self._prepared.popleft()
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        delivered = sum(len(item.new_token_ids) for part in outputs.values() for item in part.outputs)
        self.meter.append((
            time.perf_counter(), len(scheduler_output.num_scheduled_tokens),
            scheduler_output.total_num_scheduled_tokens, delivered, self.held_requests(),
        ))  # fmt: skip
        if self._silent:
            self._note_first_tokens(outputs, own)
        self._processed = time.perf_counter()
        return outputs

    def _note_first_tokens(self, outputs: Any, own: float) -> None:
        now = time.perf_counter()
        ahead = self._prepared[-1] if self._prepared else 0.0
        for item in itertools.chain.from_iterable(part.outputs for part in outputs.values()):
            if item.new_token_ids and (stages := self._silent.pop(item.request_id, None)):
                moments = (*stages, own, self._processed, ahead, now)
                self.stages[item.request_id] = list(itertools.accumulate(moments, max))

    def held_requests(self) -> int:
        """How many requests are held."""
        return 0


class Stock(Metered, AsyncScheduler):
    """vLLM's own."""


class StockSynchronous(Metered, Scheduler):
    """vLLM's own for engines without asynchronous scheduling."""


class Steered(Metered, SteeredScheduler):
    """Ours."""

    def held_requests(self) -> int:
        """How many requests are held."""
        return len(self.core.roster.held)


def bench(engine: Any, what: str, value: Any) -> Any:
    """Ask or change the scheduler of an idle or busy engine; see the functions below."""
    return OPERATIONS[what](engine.scheduler, value)


def meter(scheduler: Any, _: Any) -> list[tuple[float, int, int, int, int]]:
    """The lines since the last call."""
    lines = list(scheduler.meter)
    scheduler.meter.clear()
    return lines


def stages(scheduler: Any, _: Any) -> dict[str, list[float]]:
    """By engine's id of each request that spoke since the last call, the moments of its first token.

    When it came; was first scheduled; when its step was launched; the one before it was processed; the one behind it,
    if there was one, was launched; and it spoke. What happened before the moment on its left counts as that moment.
    """
    found = dict(scheduler.stages)
    scheduler.stages.clear()
    return found


def requests(scheduler: Any, _: Any) -> int:
    """How many requests the scheduler knows."""
    return len(scheduler.requests)


def resize(scheduler: Any, value: dict[str, Any]) -> None:
    """Set active and spare slots, and stock's policy, of an idle engine: what its flags would have set at start.

    The model runner keeps the slots that it was started with; the scheduler uses fewer of them.
    """
    assert not scheduler.requests, "only an idle engine changes its size"
    active = value["active"]
    scheduler.max_num_running_reqs = active + value["spare"]
    scheduler.max_num_active_reqs = active
    if isinstance(scheduler, Steered):
        mechanism = scheduler.mechanism
        assert {"_active", "_total"} <= vars(mechanism).keys(), "renamed: change it here too"
        mechanism._active, mechanism._total = active, scheduler.max_num_running_reqs
        mechanism.fit()
    else:
        scheduler.policy = SchedulingPolicy(value["policy"])
        scheduler.waiting = create_request_queue(scheduler.policy)


def connect(scheduler: Any, bus: str) -> None:
    """Stop the bus, or start another (`process`, `thread`): for what each costs a step."""
    if scheduler.bus is not None:
        scheduler.bus.stop(timeout_s=2.0)
        scheduler.bus = None
    if bus:
        scheduler.settings = replace(scheduler.settings, bus=bus)
        scheduler.start_bus()
        scheduler.port.begin_anew()  # a new bus knows nothing of what the last one was told


def connected(scheduler: Any, _: Any) -> bool:
    """Whether the bus is on NATS."""
    return bool(scheduler.port.connected)


def unix_offset(scheduler: Any, _: Any) -> float:
    """From this machine's `perf_counter` to the clock that replies are stamped by."""
    return float(scheduler.port.unix_offset) + time.monotonic() - time.perf_counter()


def leave(scheduler: Any, _: Any) -> None:
    """Sabotage: what a victim was to compute in its step stays in the prefix cache, as in stock vLLM."""
    scheduler.victims.leaves = lambda _request: scheduler.victims.unmark()


OPERATIONS = {
    "meter": meter,
    "stages": stages,
    "requests": requests,
    "resize": resize,
    "connect": connect,
    "connected": connected,
    "unix_offset": unix_offset,
    "leave": leave,
}
EngineCore.bench = bench
