"""The step budget: how many prompt tokens a class may compute per step while a better class is present. Pure.

An arriving request waits for the step in flight, and a step that computes a long prefill is long: so a class whose
prefills may wait gets fewer tokens per step (`max_prefill_tokens_per_step`) while a better class has anything that
waits or runs, and for `linger_s` after it had (a stream of urgent requests has gaps). Decodes are never bounded.
"""

from collections.abc import Callable

from coxswain.schemas.policy import ClassPolicy


class StepBudget:
    """The budgets of all classes.

    Args:
        place_of: place of a class among all, 0 first.
    """

    def __init__(self, place_of: Callable[[str], int]) -> None:
        self._place_of = place_of
        self._policies: dict[str, ClassPolicy] = {}
        self._seen_at: dict[str, float] = {}
        """When a class with a budget last had a better one beside it."""

    def __bool__(self) -> bool:
        """Whether any class has a budget; if not, `begin` need not be called."""
        return bool(self._policies)

    def set_classes(self, classes: dict[str, ClassPolicy]) -> None:
        """Put class policies in force; what lingers of a class that stays goes on."""
        self._policies = {
            name: policy for name, policy in classes.items() if policy.max_prefill_tokens_per_step is not None
        }
        self._seen_at = {name: at for name, at in self._seen_at.items() if name in self._policies}

    def begin(self, now: float, best: int | None) -> dict[str, int]:
        """Prompt tokens per class for the step that begins; classes without a bound are not in it.

        `best`: place of the best class of which anything waits or runs, None if nothing does.
        """
        left: dict[str, int] = {}
        for name, policy in self._policies.items():
            if best is not None and best < self._place_of(name):
                self._seen_at[name] = now
            seen_at = self._seen_at.get(name)
            if seen_at is not None and now - seen_at <= policy.linger_s:
                left[name] = policy.max_prefill_tokens_per_step or 0
        return left
