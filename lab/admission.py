"""Admission as VTC's implementation does it: a request enters only if its whole output is sure to fit.

vLLM admits a request when its prompt fits, and preempts somebody when output later does not. S-LoRA, on which VTC
was built, reserves instead, so it never preempts (VTC-artifact, slora/server/router/{req_queue,manager}.py):

- of all requests with KV and the candidate, with `has` tokens each and `left` to come, sorted by `left` falling,
  the pool must hold  max over k of  left[k] × k + has[1] + … + has[k]:  the peak, if each ends when it must;
- it is tried when nothing runs, or `EVERY` decode steps after the last that was admitted, and then every step;
- at most `MAX_PREFILL` prompt tokens enter at once, and a prompt is never split.

`reserving` puts that in front of any of vLLM's schedulers, ours included; order stays theirs. Touches one thing
of vLLM: `kv_cache_manager.allocate_slots`, whose None means "does not fit now".
"""

from collections.abc import Sequence
from typing import Any, Final

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


def reserving(scheduler_cls: type[Any], pool_tokens: int) -> type[Any]:
    """`scheduler_cls` with this admission, for a pool of so many tokens of KV.

    Its block pool must have a block more per request, so that rounding up to blocks never decides.
    """

    class Reserving(scheduler_cls):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._steps_since = EVERY
            self._prefill = 0
            self._open = True
            manager = self.kv_cache_manager
            allocate = manager.allocate_slots

            def allocate_slots(request: Any, *args: Any, **kwargs: Any) -> Any:
                if request.status.name != "RUNNING" and not self._may_enter(request):
                    return None
                return allocate(request, *args, **kwargs)

            manager.allocate_slots = allocate_slots

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            self._open = not self.running or self._steps_since >= EVERY
            self._prefill = 0
            output = super().schedule(*args, **kwargs)
            self._steps_since = 1 if self._prefill else self._steps_since + 1
            return output

        def _may_enter(self, request: Any) -> bool:
            if not self._open or self._prefill + request.num_tokens > MAX_PREFILL:
                return False
            present = [_needs(other) for other in self._with_kv()]
            # 1 and −1: the prefill gives the first token (req_queue.py, _can_add_new_req).
            left, has = _needs(request)
            if peak([*present, (left, has + 1)]) >= pool_tokens:
                return False
            self._prefill += request.num_tokens
            return True

        def _with_kv(self) -> list[Any]:
            core = getattr(self, "core", None)
            held = [record.payload for record in core.roster.kept] if core is not None else []
            return [*self.running, *held]

    return Reserving


def _needs(request: Any) -> tuple[int, int]:
    return request.max_tokens - request.num_output_tokens - 1, request.num_tokens
