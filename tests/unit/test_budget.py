"""The step budget: who is bounded, by how much, and for how long."""

from coxswain.schemas.policy import ClassPolicy
from coxswain.service.scheduler.budget import StepBudget

PLACES = {"urgent": 0, "default": 1, "batch": 2}


def budget(**classes: ClassPolicy) -> StepBudget:
    """A budget with these classes, of the places above."""
    made = StepBudget(PLACES.__getitem__)
    made.set_classes(classes)
    return made


def test_no_class_with_a_budget_costs_nothing() -> None:
    """A step need not ask where no class has a budget."""
    assert not budget(urgent=ClassPolicy(), batch=ClassPolicy())
    assert budget(batch=ClassPolicy(max_prefill_tokens_per_step=0))


def test_a_class_is_bounded_while_a_better_one_is_present() -> None:
    """Neither by itself, nor by a worse one, nor by nothing."""
    made = budget(
        default=ClassPolicy(max_prefill_tokens_per_step=8), batch=ClassPolicy(max_prefill_tokens_per_step=4)
    )
    assert made.begin(0.0, None) == {}
    assert made.begin(0.0, 2) == {}
    assert made.begin(0.0, 1) == {"batch": 4}
    assert made.begin(1.0, 0) == {"default": 8, "batch": 4}


def test_it_lingers() -> None:
    """For `linger_s` after the better class was last present, then no longer."""
    made = budget(batch=ClassPolicy(max_prefill_tokens_per_step=4, linger_s=0.5))
    assert made.begin(10.0, 0) == {"batch": 4}
    assert made.begin(10.5, 2) == {"batch": 4}
    assert made.begin(10.6, None) == {}


def test_every_step_begins_anew() -> None:
    """What one step used up is there again in the next."""
    made = budget(batch=ClassPolicy(max_prefill_tokens_per_step=4))
    made.begin(0.0, 0)["batch"] = 0
    assert made.begin(0.0, 0) == {"batch": 4}


def test_new_tables_keep_what_lingers() -> None:
    """A class that stays stays bounded; one that goes is forgotten."""
    policy = ClassPolicy(max_prefill_tokens_per_step=4, linger_s=1.0)
    made = budget(batch=policy)
    made.begin(0.0, 0)
    made.set_classes({"batch": policy})
    assert made.begin(0.5, None) == {"batch": 4}
    made.set_classes({})
    made.set_classes({"batch": policy})
    assert made.begin(0.5, None) == {}
