"""Whom vLLM preempts when KV blocks run out: in a `fair` class, of the tenant that has had most. Called by `steered`.

vLLM takes the worst class and priority, and of these who arrived last. Between tenants that would strike whoever asks
least: its requests wait least, so of all that run they came last. And as its tenant has had least, it is let in again
at once, to be struck again. So inside a `fair` class the tenant with the greatest virtual time gives way, and of its
requests the one that vLLM would take. It is also the last that is let in again.

A victim may have had its chunk of the step already: `compat.take_back` takes back what vLLM does not. Where more than
blocks is to be taken back, the victim is the last that runs, as in stock vLLM's `fcfs`: it has had nothing yet.

Nothing of it costs a step: vLLM asks for its `policy` where it is about to choose, and nowhere else in a step
(v1/core/sched/scheduler.py, 0.32.0); whom it is to choose is then given a priority beyond all others, until it has.
"""

from typing import Any, Final

from vllm.v1.core.sched.request_queue import SchedulingPolicy

from coxswain.service.scheduler import compat
from coxswain.service.scheduler.record import Record

WORST: Final = 2**62
"""Beyond every class and priority."""


class Victims:
    """Marks the next victim of vLLM's own preemption.

    Args:
        scheduler: vLLM's.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.any: bool = compat.can_take_back(scheduler)
        """Whether anybody that runs may be chosen, or only the last."""
        self.marked: Any | None = None
        """vLLM's request that bears the mark."""

    def mark(self) -> None:
        """VLLM is about to preempt somebody; nothing to say where only one tenant runs, or order is by priority."""
        if self.marked is not None:
            return  # it asks twice
        records = [request.steering for request in self._scheduler.running]
        ranks = {account: account.rank for account in {record.account for record in records}}
        if len(ranks) < 2:
            return
        worst = max({record.group for record in records}, key=lambda group: group.place)
        if worst.policy.order != "fair":
            return

        def had(record: Record) -> tuple[Any, ...]:
            return ranks[record.account], record.priority, record.payload.arrival_time

        self.marked = max((record for record in records if record.group is worst), key=had).payload
        self.marked.priority += WORST

    def leaves(self, request: Any) -> None:
        """VLLM is about to preempt a request, chosen here or not."""
        self.unmark()
        compat.take_back(self._scheduler, request)

    def unmark(self) -> None:
        """It was preempted, or could not be."""
        if self.marked is not None:
            self.marked.priority -= WORST
            self.marked = None


class ChoosesVictims:
    """In front of vLLM's scheduler: victims go by class and priority whatever the flag says, and as marked."""

    victims: Victims

    @property
    def policy(self) -> SchedulingPolicy:
        """What vLLM asks where it is about to choose."""
        if not hasattr(self, "victims"):  # vLLM asks while it is made, too
            return SchedulingPolicy.PRIORITY
        if not self.victims.any:
            return SchedulingPolicy.FCFS
        self.victims.mark()
        return SchedulingPolicy.PRIORITY

    @policy.setter
    def policy(self, _: SchedulingPolicy) -> None:
        """VLLM's own, from its flag: order is the core's, so it decides nothing."""
