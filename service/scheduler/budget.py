"""The step budget: how many prompt tokens a class may compute per step while a better class is present. Pure.

An arriving request waits for the step in flight, and a step that computes a long prefill is long: so a class whose
prefills may wait gets fewer tokens per step (`max_prefill_tokens_per_step`) while a better class has anything that
waits or runs, and for `linger_s` after it had (a stream of urgent requests has gaps). A step in which something better
waits, and so begins, is left to it: no prompt of such a class beside its own. Never two steps in a row, for what waits
may wait for long. What a role set with `limit` is in force always. Decodes are never bounded.
"""

from collections.abc import Callable

from coxswain.service.scheduler.groups import ClassGroup, Group
from coxswain.service.scheduler.limits import Limits
from coxswain.service.scheduler.queue import SteeredQueue


class StepBudget:
    """The budgets of all classes.

    Args:
        place_of: place of a class among all, 0 first.
        queue: who waits.
        limits: what roles set.
    """

    def __init__(self, place_of: Callable[[str], int], queue: SteeredQueue, limits: Limits) -> None:
        self._place_of = place_of
        self._queue = queue
        self._limits = limits
        self._groups: dict[str, ClassGroup] = {}
        self._seen_at: dict[str, float] = {}
        """When a class with a budget last had a better one beside it."""
        self._yielded: set[str] = set()
        """Classes that left the last step to something better."""

    def __bool__(self) -> bool:
        """Whether any step may have to be bounded; if not, `begin` need not be called."""
        return bool(self._groups) or self._limits.bounds_prefill

    def set_classes(self, groups: dict[str, ClassGroup]) -> None:
        """Put class policies in force; what lingers of a class that stays goes on."""
        self._groups = {
            name: group
            for name, group in groups.items()
            if group.policy.max_prefill_tokens_per_step is not None
        }
        self._seen_at = {name: at for name, at in self._seen_at.items() if name in self._groups}

    def begin(self, now: float, running: int | None) -> dict[Group, int]:
        """Prompt tokens that the step which begins may compute, of each tenant and class with a bound.

        `running`: place of the best class of which anything runs, or None.
        """
        waiting = self._queue.first_class()
        places = [running, None if waiting is None else self._place_of(waiting)]
        best = min((place for place in places if place is not None), default=None)
        bounds = self._limits.prefill()
        before, self._yielded = self._yielded, set()
        for name, group in self._groups.items():
            place = self._place_of(name)
            if best is not None and best < place:
                self._seen_at[name] = now
            seen_at = self._seen_at.get(name)
            if seen_at is not None and now - seen_at <= group.policy.linger_s:
                tokens = group.policy.max_prefill_tokens_per_step or 0
                if waiting is not None and self._place_of(waiting) < place and name not in before:
                    self._yielded.add(name)
                    tokens = 0
                bounds[group] = min(tokens, bounds.get(group, tokens))
        return bounds
