"""Admission as VTC's implementation does it: a request enters only if its whole output is sure to fit.

vLLM admits a request when its prompt fits, and preempts somebody when output later does not. S-LoRA, on which VTC
was built, reserves instead, so it never preempts (VTC-artifact, slora/server/router/{req_queue,manager}.py):

- of all requests with KV and the candidate, with `has` tokens each and `left` to come, sorted by `left` falling,
  the pool must hold  max over k of  left[k] × k + has[1] + … + has[k]:  the peak, if each ends when it must;
- it is tried when nothing runs, or `EVERY` decode steps after the last that was admitted, and then every step;
- at most `MAX_PREFILL` prompt tokens enter at once, and a prompt is never split.

`reserving` puts that under any scheduler, ours included: order stays theirs, and so does who gives way. It touches
two things of vLLM: its pause of new requests, for the steps between two tries, and `KVCacheManager.allocate_slots`,
whose None means "does not fit now".
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Final

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

EVERY: Final = 10
"""`max_wait_tokens` of manager.py."""
MAX_PREFILL: Final = 3_072
"""`batch_max_tokens`: the larger of a sixth of the pool and `max_req_total_len`, api_server.py."""


def peak(requests: Sequence[tuple[int, int]]) -> int:
    """The most tokens that these `(left, has)` will ever need together, if nobody else is admitted."""
    worst = held = 0
    for place, (left, has) in enumerate(sorted(requests, key=lambda pair: -pair[0]), 1):
        held += has
        worst = max(worst, left * place + held)
    return worst


class Reserving(AsyncScheduler):
    """vLLM's scheduler with this admission. Its pool needs a block more per request: rounding must never decide."""

    pool_tokens: ClassVar[int]
    _pause_state: PauseState  # set by its setter it would be logged at every step

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._steps_since = EVERY
        self._entered = 0
        manager, may_enter = self.kv_cache_manager, self._may_enter

        class Reserved(type(manager)):  # type: ignore[misc]
            def allocate_slots(self, request: Any, *args: Any, **kwargs: Any) -> Any:
                if request.status != RequestStatus.RUNNING and not may_enter(request):
                    return None
                return super().allocate_slots(request, *args, **kwargs)

        # Not an attribute of the object: the steered scheduler puts one there, for reclaim, and takes it away again.
        manager.__class__ = Reserved

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM, but nobody new enters in the steps between two tries."""
        paused = self._pause_state
        if self.running and self._steps_since < EVERY and paused == PauseState.UNPAUSED:
            self._pause_state = PauseState.PAUSED_NEW
        self._entered = 0
        output = super().schedule(*args, **kwargs)
        self._pause_state = paused
        self._steps_since = 1 if self._entered else self._steps_since + 1
        return output

    def _may_enter(self, request: Any) -> bool:
        if self._entered + request.num_tokens > MAX_PREFILL and self._entered:
            return False
        core = getattr(self, "core", None)
        held = (
            [record.payload for record in (*core.roster.kept, *core.roster.parked)]
            if core is not None
            else []
        )
        present = [_needs(other) for other in (*self.running, *held)]
        # One more: its prefill gives its first token (req_queue.py, _can_add_new_req).
        left, has = _needs(request)
        if peak([*present, (left, has + 1)]) >= self.pool_tokens:
            return False
        self._entered += request.num_tokens
        return True


def reserving(scheduler_cls: type[Any], pool_tokens: int) -> type[Any]:
    """`scheduler_cls` with this admission, for a pool of so many tokens of KV.

    `Reserving` comes after it and before vLLM's in the order of resolution, so that what ours does before and after a
    step of vLLM's is before and after this.
    """
    bases = (Reserving,) if issubclass(Reserving, scheduler_cls) else (scheduler_cls, Reserving)
    return type("Reserving", bases, {"pool_tokens": pool_tokens})


def _needs(request: Any) -> tuple[int, int]:
    return request.max_tokens - request.num_output_tokens - 1, request.num_tokens
