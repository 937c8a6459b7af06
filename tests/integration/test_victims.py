"""Whom vLLM preempts when KV blocks run out: on its real scheduler and KV manager, step by step, without a model."""

from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import pytest

from bench.rig import Rig
from coxswain.schemas.policy import ClassPolicy, Prices, TenantPolicy
from coxswain.service.scheduler.victims import WORST, Victims
from tests.integration.test_cut_in import DEPTHS, add, ended_well, rig

pytestmark = pytest.mark.vllm

ROOM: dict[str, Any] = {"num_blocks": 8, "max_num_seqs": 4, "max_num_active_seqs": 3}
"""Seven blocks of 32: two requests of 90 tokens and one of 64 need eight."""


def crowd(made: Rig, *, late: str = "light") -> tuple[list[str], str]:
    """Two requests of tenant `heavy` that have run for a while, and a late one of another."""
    heavy = [add(made, "heavy", prompt=40, tokens=50, arrival_time=float(place)) for place in range(2)]
    for _ in range(10):
        made.step()
    return heavy, add(made, late, prompt=24, tokens=40, arrival_time=9.0)


def lost(made: Rig, prompts: Mapping[str, tuple[int, int]]) -> list[str]:
    """Run to the end; those that computed more than they had to, and that all said what they would have said alone."""
    while made.scheduler.has_requests():
        made.step()
        assert all(abs(request.priority) < WORST // 2 for request in made.scheduler.requests.values())
    ended_well(made, **{name: tokens for name, (_, tokens) in prompts.items()})
    return [name for name, (prompt, tokens) in prompts.items() if made.computed[name] > prompt + tokens - 1]


def plan(heavy: list[str], late: str) -> dict[str, tuple[int, int]]:
    """Prompt and output of each."""
    return {**dict.fromkeys(heavy, (40, 50)), late: (24, 40)}


@DEPTHS
def test_who_has_had_most_gives_way_and_of_its_requests_the_last(depth: int) -> None:
    """The other tenant's came last of all, which is whom vLLM would take, and is left alone; so is the first."""
    with rig({}, depth=depth, **ROOM) as made:
        heavy, late = crowd(made)
        assert lost(made, plan(heavy, late)) == [heavy[1]]


def test_a_weight_counts() -> None:
    """Of two tenants that had the same for the engine, the one of a tenth of the weight has had most."""
    with rig({}, **ROOM) as made:
        tenants = {"heavy": TenantPolicy(weight=10.0)}
        made.scheduler.core.configure({}, tenants)
        heavy, late = crowd(made)
        assert lost(made, plan(heavy, late)) == [late]


def test_a_worse_class_gives_way_before_who_has_had_most() -> None:
    """Classes come first, as in the queue."""
    with rig({"urgent": ClassPolicy(position=1)}, **ROOM) as made:
        heavy, late = crowd(made, late="chat")
        assert lost(made, plan(heavy, late)) == [late]


@pytest.mark.parametrize("late", ["light", "heavy"])
def test_where_order_is_by_priority_or_only_one_tenant_runs_the_choice_is_vllms(late: str) -> None:
    """That is who arrived last; virtual times differ, and decide nothing."""
    order = "priority" if late == "light" else "fair"
    with rig({"default": ClassPolicy(order=order)}, **ROOM) as made:
        heavy, last = crowd(made, late=late)
        assert lost(made, plan(heavy, last)) == [last]


def test_what_is_expected_counts_as_had() -> None:
    """Who is charged ahead is let in later for it, and gives way sooner."""
    with rig({}, **ROOM) as made:
        core = made.scheduler.core
        core.tenants.prices = Prices(input=0.0)
        heavy, late = crowd(made)
        core.ledger.learn(core.tenants.account("light"), 1_000.0)
        assert lost(made, plan(heavy, late)) == [late]


@DEPTHS
def test_a_victim_whose_blocks_cannot_be_freed_yet_keeps_its_own_priority(depth: int) -> None:
    """VLLM then preempts nobody in that step: who was to be is chosen anew in the next, and is no worse for it."""
    with rig({}, depth=depth, **ROOM) as made:
        heavy, late = crowd(made)
        asked: list[str] = []
        can_be_freed = made.scheduler._request_blocks_can_be_freed

        def later(request: Any) -> bool:
            if request.priority >= WORST:  # it is to be preempted, else it has ended
                asked.append(request.request_id)
                if len(asked) <= 3:
                    return False
            return bool(can_be_freed(request))

        with patch.object(made.scheduler, "_request_blocks_can_be_freed", later):
            assert lost(made, plan(heavy, late)) == [heavy[1]]
        assert asked[:4] == [heavy[1]] * 4


def test_while_there_are_blocks_nobody_chooses() -> None:
    """It costs nothing in a step in which nobody is preempted."""
    with rig({}, max_num_seqs=4, max_num_active_seqs=3) as made, patch.object(Victims, "mark") as mark:
        heavy, late = crowd(made)
        assert not lost(made, plan(heavy, late))
        assert mark.call_count == 0
