"""What one step does on the simulated device: whose tokens are sampled, at which position, and how much work it is.

Pure: fed with vLLM's SchedulerOutput (only read, so any object with its fields will do). Called by `device`.
It keeps what a model runner must remember of each request, and trusts the scheduler in everything: whoever wants
to know whether the scheduler deserves it feeds the same to `checker`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from coxswain.service.simulated.roofline import Work
from coxswain.service.simulated.tokens import seed_of


@dataclass(slots=True)
class _Request:
    seed: int
    prompt: int
    known: int
    """Tokens known to the device: prompt and sampled ones."""
    computed: int


class Sample(NamedTuple):
    """Tokens to be sampled: the one at `position` of the request with this seed, and one after each right draft."""

    seed: int
    position: int
    drafts: tuple[int, ...] = ()


class Step(NamedTuple):
    """One step: a sample, or None, for every scheduled request in order, and the work."""

    samples: dict[str, Sample | None]
    work: Work


class Runner:
    """The memory of a model runner.

    Args:
        v2: whether vLLM speaks to it as to model runner V2 (a preempted request is forgotten and comes
            back as new) or V1 (it is remembered and comes back as resumed).
    """

    def __init__(self, *, v2: bool) -> None:
        self._v2 = v2
        self._requests: dict[str, _Request] = {}

    def step(self, output: Any, drafts: Mapping[str, Sequence[int]] = MappingProxyType({})) -> Step:
        """Run a step, with `drafts` behind the known tokens; `sampled` must follow before the next.

        Raises:
            KeyError: for a request that was never introduced.
        """
        self._update(output)
        samples: dict[str, Sample | None] = {}
        work = Work()
        for name, scheduled in output.num_scheduled_tokens.items():
            request = self._requests[name]
            tried = tuple(drafts.get(name, ()))
            end = request.computed + scheduled - len(tried)
            work = work.plus(
                scheduled, request.computed, decode=end >= request.known and end == request.computed + 1
            )
            # As both runners: a token is sampled when the last known one has been computed.
            samples[name] = Sample(request.seed, end, tried) if end >= request.known else None
            request.computed = end
        return Step(samples, work)

    def sampled(self, tokens: Mapping[str, Sequence[int]]) -> None:
        """Learn what was sampled in the step: the next begins behind it."""
        for name, new in tokens.items():
            request = self._requests.get(name)
            if request is not None and new:
                request.known += len(new)
                request.computed = request.known - 1

    def knows(self, name: str) -> bool:
        """Whether the runner has a request's state."""
        return name in self._requests

    def _update(self, output: Any) -> None:
        gone = output.finished_req_ids
        if self._v2 and output.preempted_req_ids:
            gone = gone | output.preempted_req_ids
        for name in gone:
            self._requests.pop(name, None)
        for new in output.scheduled_new_reqs:
            prompt = new.prompt_token_ids
            known = new.prefill_token_ids if self._v2 else prompt
            self._requests[new.req_id] = _Request(
                seed_of(prompt), len(prompt), len(known), new.num_computed_tokens
            )
        cached = output.scheduled_cached_reqs
        for name, computed, outputs in zip(
            cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
        ):
            request = self._requests[name]
            # An async scheduler may count drafts that were rejected meanwhile; both runners know better.
            request.computed = min(computed, request.known - 1)
            if not self._v2:  # V1 forgets output that vLLM dropped at a preemption (gpu_model_runner.py:1362)
                request.known = min(request.known, request.prompt + outputs)
