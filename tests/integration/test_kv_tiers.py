"""KV tiers: what a dropped request had computed comes back from host memory, and is counted as what it is."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coxswain.schemas.commands import Targets
from coxswain.service.simulated.checker import ProtocolViolationError, Rule
from tests.support.modes import (
    MODES,
    OFFLOAD,
    PROMPT,
    V1_SYNC,
    V2_ASYNC,
    Start,
    disturb,
    few_steps,
    start,
    stories,
    words,
)
from tests.support.simulated import Engine, engine

__all__ = ["start"]

pytestmark = pytest.mark.vllm

LONG = list(range(1_000, 1_200))


@MODES
def test_dropped_kv_is_reloaded(start: Start, mode: dict[str, bool]) -> None:
    """With KV offloading, what a dropped request had computed is loaded, but for the block that was not full."""
    steered = start(mode, enable_prefix_caching=False, kv_transfer_config=OFFLOAD)
    steered.add("r", PROMPT, 100)
    steered.until_said("r", 60)
    disturb(steered, "r", "drop")
    steered.until_said("r", 90)
    counts = stories(steered, "r")
    steered.run()
    assert steered.outputs["r"] == words(PROMPT, 100)
    assert counts["reloaded"] >= 96
    assert counts["recomputed"] < 2 * 16 + 2
    assert counts["restored"] == 0
    steered.check_empty()


@pytest.fixture
def offloading(tmp_path: Path) -> Iterator[Engine]:
    """An engine that offloads at 20,000 blocks a second: some 2 ms for what is loaded here."""
    modes: dict[str, Any] = {"v2": True, "asynchronous": True, "enable_prefix_caching": False}
    with engine(tmp_path, **modes, kv_transfer_config=OFFLOAD, preset="h200-8b") as steered:
        yield steered


def loads(steered: Engine) -> Any:
    """Request `r`, dropped in the middle and continued, at the moment when its KV is being loaded."""
    steered.add("r", LONG, 60)
    steered.until_said("r", 20)
    steered.told("preempt", "r", kv="drop")
    few_steps(steered)
    steered.command("continue", "r")
    loading = steered.scheduler.requests["r"]
    steered.until(lambda: loading.status.name == "WAITING_FOR_REMOTE_KVS")
    return loading


def test_what_loads_cannot_be_held(offloading: Engine) -> None:
    """While its KV is being loaded a request refuses to be held, in words; then it can be."""
    loads(offloading)
    reply = offloading.told("preempt", "r")
    assert (reply.code, "being loaded" in reply.error) == (422, True)
    offloading.until_said("r", 30)
    assert offloading.told("preempt", "r").outcome == "applied"
    offloading.command("continue", "r")
    offloading.run()
    assert offloading.outputs["r"] == words(LONG, 60)
    offloading.check_empty()


def test_what_has_loaded_and_may_not_run_costs_no_steps(offloading: Engine) -> None:
    """Capped to none while its KV came, a request waits with it: the engine sleeps until the cap is lifted."""
    loading = loads(offloading)
    said = offloading.said("r")
    everybody = Targets(classes=("default",))
    offloading.command("limit", targets=everybody, max_running=0)
    offloading.run(most=200)
    assert loading.status.name == "PREEMPTED", "it has loaded"
    assert offloading.said("r") == said
    offloading.command("limit", targets=everybody, max_running=None)
    offloading.run()
    assert offloading.outputs["r"] == words(LONG, 60)
    offloading.check_empty()


def test_a_held_request_goes_back_to_what_could_be_loaded(offloading: Engine) -> None:
    """Held with a step under way whose load then fails, it goes back as a running one would; nothing else changes."""
    offloading.scheduler.recompute_kv_load_failures = True
    offloading.add("r", LONG, 60)
    offloading.add("other", PROMPT, 60)
    offloading.until_said("r", 20)
    offloading.told("preempt", "r")
    few_steps(offloading)
    scheduler, held = offloading.scheduler, offloading.scheduler.requests["r"]
    (blocks,) = scheduler.kv_cache_manager.get_block_ids("r")
    running, computed = list(scheduler.running), held.num_computed_tokens
    assert held not in running
    assert scheduler._handle_invalid_blocks({blocks[2]}, {"r": 1}) == {"r"}
    assert (held.num_computed_tokens, scheduler.running) == (2 * 16, running)
    account = scheduler.core.roster.records["r"]
    assert (account.discarded_tokens, account.lost_mark) == (1, computed - 1)
    for name in ("r", "other"):
        offloading.command("abort", name)
    offloading.run()
    offloading.check_empty()


@pytest.mark.parametrize("part", ["all", "some"])
@pytest.mark.parametrize("mode", [V1_SYNC, V2_ASYNC])
def test_a_load_that_fails_is_computed_and_counted_so(
    tmp_path: Path, mode: dict[str, bool], part: str
) -> None:
    """Where vLLM goes on without what could not be loaded, only what came counts as reloaded."""
    recompute = OFFLOAD | {"kv_load_failure_policy": "recompute"}
    prompt = list(range(1_000, 1_100))
    with engine(tmp_path, **mode, enable_prefix_caching=False, kv_transfer_config=recompute) as steered:
        fail_loads(steered, lambda blocks: None if part == "all" else blocks[3])
        steered.add("r", prompt, 60)
        steered.until_said("r", 20)
        disturb(steered, "r", "drop")
        steered.until_said("r", 40)
        counts = stories(steered, "r")
        steered.run()
        assert steered.outputs["r"] == words(prompt, 60)
        assert counts["reloaded"] == (48 if part == "some" else 112)
        assert steered.computed["r"] == 100 + 59 + counts["recomputed"]
        steered.check_empty()


def fail_loads(engine: Engine, bad: Callable[[list[int]], int | None]) -> None:
    """The next load fails: from the block on that `bad` chooses from the table, or altogether (and is tried again)."""
    connector = engine.core.model_executor.driver_worker._connector
    after = connector.after

    def failing(output: Any) -> Any:
        said = after(output)
        for name in said.finished_recving or ():
            (blocks,) = engine.scheduler.kv_cache_manager.get_block_ids(name)
            block = bad(blocks)
            if block is None:
                said.failed_recving = {name}
            else:
                said.invalid_block_ids = {block}
            connector.after = after
        return said

    connector.after = failing


def test_why_nothing_is_parked_with_a_connector(tmp_path: Path) -> None:
    """The negative control: parked on V2, blocks are stored under the wrong keys, and the checker sees it."""
    with engine(
        tmp_path, v2=True, asynchronous=True, enable_prefix_caching=False, kv_transfer_config=OFFLOAD
    ) as steered:
        assert not steered.scheduler.mechanism.parks
        steered.scheduler.mechanism.parks = True
        steered.add("r", list(range(1_000, 1_100)), 150)
        steered.until_said("r", 20)
        disturb(steered, "r", "park")
        steered.until_said("r", 90)
        disturb(steered, "r", "drop")
        with pytest.raises(ProtocolViolationError) as caught:
            steered.run()
        assert caught.value.rule is Rule.KV
