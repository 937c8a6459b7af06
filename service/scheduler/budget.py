"""The step budget: what a class may compute per step while a better class is present. Pure.

An arriving request waits for the step in flight, and a step that computes a long prefill is long: so a class whose
prefills may wait gets fewer tokens per step (`max_prefill_tokens_per_step`) while a better class has anything that
waits or runs, and for `linger_s` after it had (a stream of urgent requests has gaps). A step in which something better
waits, and so begins, is left to it: no prompt of such a class beside its own. Never two steps in a row, for what waits
may wait for long. What a role set with `limit` is in force always.

Decodes are never bounded, but a class with `stand_aside` leaves that step altogether to what begins in it, and the one
after as well if that is scheduled before the first token is out, as in asynchronous scheduling: the engine's thread
prepares it before it looks at the first token, which takes longest for a step with many requests or any prompt in it.
Once for each that begins, only if it can, and never three steps in a row.
"""

from coxswain.service.scheduler.engine import Engine
from coxswain.service.scheduler.groups import ClassGroup, Group
from coxswain.service.scheduler.limits import Limits
from coxswain.service.scheduler.queue import SteeredQueue
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.states import RUNNING


class StepBudget:
    """The budgets of all classes.

    Args:
        engine: who has the room for what waits.
        queue: who waits.
        limits: what roles set.
    """

    def __init__(self, engine: Engine, queue: SteeredQueue, limits: Limits) -> None:
        self._engine = engine
        self._queue = queue
        self._limits = limits
        self._groups: dict[str, ClassGroup] = {}
        self._seen_at: dict[str, float] = {}
        """When a class with a budget last had a better one beside it."""
        self._yielded: set[str] = set()
        """Classes that left the last step to something better."""
        self._last_aside = 0
        """Place of the last class that may stand aside: for what comes before it."""
        self._stood_for: Record | None = None
        """For whom classes stood aside last."""
        self._awaited: tuple[Record, int] | None = None
        """For whom they did in the last step, and how many tokens it had said."""
        self.aside: list[ClassGroup] = []
        """Classes of which the step that begins computes nothing."""

    def __bool__(self) -> bool:
        """Whether any step may have to be bounded; if not, `begin` need not be called."""
        return bool(self._groups) or self._limits.bounds_prefill

    def set_classes(self, groups: dict[str, ClassGroup]) -> None:
        """Put class policies in force; what lingers of a class that stays goes on."""
        self._groups = {
            name: group
            for name, group in groups.items()
            if group.policy.max_prefill_tokens_per_step is not None or group.policy.stand_aside
        }
        asides = (group.place for group in self._groups.values() if group.policy.stand_aside)
        self._last_aside = max(asides, default=0)
        self._seen_at = {name: at for name, at in self._seen_at.items() if name in self._groups}

    def stands_aside_for(self, record: Record) -> bool:
        """Whether any class stands aside for what begins in the class of this request."""
        return record.group.place < self._last_aside

    def begin(self, now: float, running: int | None) -> dict[Group, int]:
        """Prompt tokens that the step which begins may compute, of each tenant and class with a bound.

        `running`: place of the best class of which anything runs, or None.
        """
        waiting = self._queue.first_class()
        waits = None if waiting is None else waiting.place
        best = min((place for place in (running, waits) if place is not None), default=None)
        beginner = None if waits is None else self._beginner_of(waits)
        awaited = self._silent()
        bounds = self._limits.prefill()
        before, self._yielded, self.aside = self._yielded, set(), []
        for name, group in self._groups.items():
            place = group.place
            if best is not None and best < place:
                self._seen_at[name] = now
            seen_at = self._seen_at.get(name)
            if seen_at is None or now - seen_at > group.policy.linger_s:
                continue
            tokens = group.policy.max_prefill_tokens_per_step
            if awaited is not None and awaited.group.place < place and group.policy.stand_aside:
                self.aside.append(group)
                self._yielded.add(name)
                tokens = 0
            elif waits is not None and waits < place and name not in before:
                if beginner is not None and group.policy.stand_aside:
                    self.aside.append(group)
                    self._stood_for = beginner
                    self._awaited = beginner, len(beginner.outputs)
                if tokens is not None or group in self.aside:
                    self._yielded.add(name)
                    tokens = 0
            if tokens is not None:
                bounds[group] = min(tokens, bounds.get(group, tokens))
        return bounds

    def _silent(self) -> Record | None:
        """Who began in the last step, if it has not said anything since."""
        awaited, self._awaited = self._awaited, None
        if awaited is None:
            return None
        record, said = awaited
        return record if record.state == RUNNING and len(record.outputs) == said else None

    def _beginner_of(self, waits: int) -> Record | None:
        """Who of the class at this place begins in this step, if classes may stand aside for it."""
        if waits >= self._last_aside:
            return None
        engine, head = self._engine, self._queue.peek()
        if head is self._stood_for or head.group.place != waits:  # it waited for too long, and is next
            return None
        free = engine.free_blocks()
        begins = engine.ready(head) and engine.free_slots() > 0 and engine.needs(head, free) <= free
        return head if begins else None
