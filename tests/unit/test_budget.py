"""The step budget: who is bounded, by how much, and for how long."""

from typing import Any

from coxswain.schemas.policy import ClassPolicy, TenantPolicy
from coxswain.service.scheduler.core import SteeringCore
from coxswain.service.scheduler.groups import Caps
from coxswain.service.scheduler.limits import Target
from tests.support.fake_engine import FakeEngine

URGENT, DEFAULT, BATCH = 0, 1, 2


def core_with(**budgets: dict[str, Any]) -> SteeringCore:
    """A core with the classes `urgent`, `default` and `batch`, in that order, and a tenant in each."""
    core = FakeEngine().core
    names = ("urgent", "default", "batch")
    classes = {name: ClassPolicy(position=i, **budgets.get(name, {})) for i, name in enumerate(names)}
    core.configure(classes, {name: TenantPolicy(class_=name) for name in names})
    return core


def begin(core: SteeringCore, now: float, running: int | None) -> dict[str, int]:
    """The bounds of a step, by name."""
    return {group.name: tokens for group, tokens in core.budget.begin(now, running).items()}


FOUR = {"max_prefill_tokens_per_step": 4}


def test_no_class_with_a_budget_costs_nothing() -> None:
    """A step need not ask where no class has a budget."""
    assert not core_with().budget
    assert core_with(batch={"max_prefill_tokens_per_step": 0}).budget


def test_a_class_is_bounded_while_a_better_one_runs() -> None:
    """Neither by itself, nor by a worse one, nor by nothing."""
    core = core_with(default={"max_prefill_tokens_per_step": 8}, batch=FOUR)
    assert begin(core, 0.0, None) == {}
    assert begin(core, 0.0, BATCH) == {}
    assert begin(core, 0.0, DEFAULT) == {"batch": 4}
    assert begin(core, 1.0, URGENT) == {"default": 8, "batch": 4}


def test_a_class_is_bounded_while_a_better_one_waits() -> None:
    """The step that will compute an urgent prompt computes no other beside it; while it waits on, every second one."""
    core = core_with(batch=FOUR)
    engine: Any = core.engine
    engine.submit()
    assert [begin(core, 0.0, BATCH) for _ in range(4)] == [{"batch": 0}, {"batch": 4}] * 2


def test_a_step_is_not_left_to_what_is_no_better() -> None:
    """A class's own requests, and those of a worse one, take nothing from it by waiting."""
    core = core_with(urgent={"max_prefill_tokens_per_step": 8}, default=FOUR)
    engine: Any = core.engine
    engine.submit()
    assert begin(core, 0.0, URGENT) == {"default": 4}


ASIDE = {"stand_aside": True}


def aside(core: SteeringCore, running: int | None = BATCH) -> list[str]:
    """The classes that stand aside in the step that begins."""
    core.budget.begin(0.0, running)
    return [group.name for group in core.budget.aside]


def test_classes_stand_aside_once_for_what_begins() -> None:
    """With and without a budget, all that are worse; prompts wait as well. Not again for the same one."""
    core = core_with(default=ASIDE, batch={**ASIDE, **FOUR})
    engine: Any = core.engine
    engine.submit("urgent")
    assert begin(core, 0.0, BATCH) == {"default": 0, "batch": 0}
    assert [group.name for group in core.budget.aside] == ["default", "batch"]
    assert [aside(core) for _ in range(4)] == [[]] * 4


def test_classes_stand_aside_until_the_first_token_is_out() -> None:
    """Of what begins, or of what comes back; one step more at most, and not once it has spoken."""
    core = core_with(default=ASIDE, batch={**ASIDE, **FOUR})
    engine: Any = core.engine
    for outputs in ([], [7, 7]):
        engine.submit("urgent").outputs.extend(outputs)
        assert aside(core) == ["default", "batch"]
        engine.admit()
        assert begin(core, 0.0, URGENT) == {"default": 0, "batch": 0}
        assert [group.name for group in core.budget.aside] == ["default", "batch"]
        assert [aside(core, URGENT) for _ in range(3)] == [[]] * 3
        assert begin(core, 0.0, URGENT) == {"batch": 4}
    record = engine.submit("urgent")
    assert aside(core) == ["default", "batch"]
    engine.admit()
    record.outputs.append(7)
    assert aside(core, URGENT) == []


def test_it_is_known_for_which_classes_others_stand_aside() -> None:
    """For all that are better than the last that may; for none if none may."""
    core = core_with(default=ASIDE)
    engine: Any = core.engine
    asked = [engine.submit(tenant) for tenant in ("urgent", "default", "batch")]
    assert [core.budget.stands_aside_for(record) for record in asked] == [True, False, False]
    core.configure({}, {})
    assert not any(core.budget.stands_aside_for(record) for record in asked)


def test_nobody_stands_aside_for_what_ended_or_was_not_admitted() -> None:
    """There is no first token to wait for."""
    core = core_with(default=ASIDE)
    engine: Any = core.engine
    record = engine.submit("urgent")
    assert [aside(core), aside(core)] == [["default"], []]
    engine.finish(record)
    record = engine.submit("urgent")
    assert aside(core) == ["default"]
    engine.admit()
    engine.finish(record)
    assert aside(core) == []


def test_a_class_has_one_step_in_three_whatever_arrives() -> None:
    """Something urgent begins in every step: two are left to it, the third is not."""
    core = core_with(default=ASIDE)
    engine: Any = core.engine
    stood = []
    for _ in range(6):
        engine.submit("urgent")
        stood.append(bool(aside(core)))
        engine.admit()
    assert stood == [True, True, False] * 2


def test_nobody_stands_aside_for_an_equal_or_for_nobody() -> None:
    """Neither for its own, nor for worse, nor where nothing waits, nor without being told to."""
    core = core_with(default=ASIDE, batch=FOUR)
    engine: Any = core.engine
    assert aside(core) == []
    engine.submit("batch")
    assert aside(core) == []
    engine.submit("default")
    assert aside(core) == []


def test_nobody_stands_aside_for_what_cannot_begin() -> None:
    """Without a free slot, with too few blocks, or not ready: the step would compute nothing."""
    core = core_with(default=ASIDE)
    engine: Any = core.engine
    engine.submit("urgent")
    slots, engine.free_slots = engine.free_slots, lambda: 0
    assert aside(core) == []
    engine.free_slots, blocks, engine.free_blocks = slots, engine.free_blocks, lambda: 0
    assert aside(core) == []
    engine.free_blocks = blocks
    ready, engine.ready = engine.ready, lambda _: False  # its grammar is being compiled, say
    assert aside(core) == []
    engine.ready = ready
    assert aside(core) == ["default"]


def test_nobody_stands_aside_for_a_class_when_another_s_turn_has_come() -> None:
    """The one that begins has waited too long: it is of no better class."""
    core = core_with(default={**ASIDE, "ageing_s": 1.0})
    engine: Any = core.engine
    engine.submit("default")
    engine.submit("urgent")
    core.queue.age(0.0)
    core.queue.age(5.0)
    assert core.queue.peek().class_ == "default"
    assert aside(core) == []


def test_it_lingers() -> None:
    """For `linger_s` after the better class was last present, then no longer."""
    core = core_with(batch={**FOUR, "linger_s": 0.5})
    assert begin(core, 10.0, URGENT) == {"batch": 4}
    assert begin(core, 10.5, BATCH) == {"batch": 4}
    assert begin(core, 10.6, None) == {}


def test_new_tables_keep_what_lingers() -> None:
    """A class that stays stays bounded; one that goes is forgotten."""
    core = core_with(batch={**FOUR, "linger_s": 1.0})
    classes = dict(core.classes)
    begin(core, 0.0, URGENT)
    core.configure({**classes, "more": ClassPolicy()}, {})
    assert begin(core, 0.5, None) == {"batch": 4}
    core.configure({}, {})
    core.configure(classes, {})
    assert begin(core, 0.5, None) == {}


def test_what_a_role_limits_is_bounded_always_and_the_stricter_counts() -> None:
    """A tenant's and a class's limit need no better class beside them."""
    core = core_with(batch=FOUR)
    core.limits.limit(0.0, "operator", Target("tenant", "acme"), Caps(max_prefill_tokens_per_step=2))
    core.limits.limit(0.0, "operator", Target("class", "batch"), Caps(max_prefill_tokens_per_step=9))
    assert begin(core, 0.0, None) == {"acme": 2, "batch": 9}
    assert begin(core, 0.0, URGENT) == {"acme": 2, "batch": 4}
    core.limits.limit(0.0, "operator", Target("class", "batch"), Caps())
    core.limits.limit(0.0, "operator", Target("tenant", "acme"), Caps())
    assert begin(core, 1.0, None) == {}
