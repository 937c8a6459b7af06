"""Hold, drop, park and continue in every mode of vLLM: the same tokens, or a refusal that says why.

What was run where is the table in docs/modes.md, which names these tests.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine.core import EngineShutdownState

from coxswain.schemas import events as ev
from coxswain.schemas.commands import Targets
from coxswain.service.scheduler.steered import STOP_S
from coxswain.service.tiny import make_model
from tests.support.modes import (
    KV,
    MODES,
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
from tests.support.simulated import Engine

__all__ = ["start"]

pytestmark = pytest.mark.vllm


# Runner, scheduling, prefix caching


@KV
@MODES
@pytest.mark.parametrize("caching", [False, True], ids=["plain", "prefix-caching"])
def test_while_decoding(start: Start, mode: dict[str, bool], kv: str, caching: bool) -> None:
    """Held among others and continued: with its KV nothing is computed twice, without it what no cache has is."""
    steered = start(mode, enable_prefix_caching=caching)
    steered.add("r", PROMPT, 60)
    steered.add("other", PROMPT[:30], 90)
    steered.until_said("r", 20)
    disturb(steered, "r", kv)
    steered.until_said("r", 45)
    counts = stories(steered, "r")
    steered.run()
    assert steered.outputs == {"r": words(PROMPT, 60), "other": words(PROMPT[:30], 90)}
    steered.check_empty()
    lost = sum(counts.values())
    assert (lost > 0) == (kv == "drop")
    assert (counts["restored"] > 0) == (kv == "drop" and caching)
    assert counts["reloaded"] == 0


@KV
@MODES
def test_in_the_middle_of_a_prompt(start: Start, mode: dict[str, bool], kv: str) -> None:
    """Held between two chunks of its prompt, a request goes on with the next chunk, or from its beginning."""
    prompt = list(range(1_000, 1_220))
    steered = start(mode, enable_prefix_caching=False)
    steered.add("r", prompt, 20)
    steered.add("other", PROMPT, 40)
    steered.step()
    disturb(steered, "r", kv)
    steered.run()
    assert steered.outputs == {"r": words(prompt, 20), "other": words(PROMPT, 40)}
    assert steered.computed["r"] == (220 + 19 if kv != "drop" else pytest.approx(220 + 19 + 144, abs=48))
    steered.check_empty()


# What a request can be


@KV
@MODES
def test_children_of_one_request(start: Start, mode: dict[str, bool], kv: str) -> None:
    """A command covers all children (n > 1): all are held, and each goes on as it was."""
    names = [f"{child}_cmpl-x-0-1a2b3c4d" for child in range(3)]
    steered = start(mode)
    for child, name in enumerate(names):
        steered.add(name, PROMPT, 30 + 10 * child)
    steered.until_said(names[0], 10)
    assert steered.told("preempt", "x", kv="drop" if kv == "drop" else "keep").counts == {"applied": 3}
    while steered.step():
        pass
    assert not steered.finished
    if kv == "park":
        for name in names:
            record = steered.scheduler.core.roster.records[name]
            steered.scheduler.core.holds.park(steered.scheduler.now(), record, "test")
    steered.command("continue", "x")
    steered.run()
    assert steered.outputs == {name: words(PROMPT, 30 + 10 * child) for child, name in enumerate(names)}
    steered.check_empty()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a tokenizer, which grammars need."""
    return str(make_model(tmp_path_factory.mktemp("tiny") / "model"))


def within_grammar() -> Any:
    """Sampling parameters: twelve digits, then an end."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    grammar = StructuredOutputsParams(regex="[0-9]{12}")
    grammar._backend = "xgrammar"  # what the front end chooses
    return SamplingParams(max_tokens=40, structured_outputs=grammar)


@KV
@MODES
def test_structured_output(start: Start, model: str, mode: dict[str, bool], kv: str) -> None:
    """Held while its grammar is made and again in the middle, a request ends within the grammar, as undisturbed."""
    steered = start(mode, model=model)
    steered.add("plain", PROMPT, 40, params=within_grammar())
    steered.until(lambda: "plain" in steered.finished)
    steered.add("r", PROMPT, 40, params=within_grammar())
    assert steered.told("preempt", "r").outcome == "applied"
    assert steered.told("continue", "r").outcome == "applied"
    steered.until_said("r", 4)
    disturb(steered, "r", kv)
    steered.run()
    assert len(steered.outputs["plain"]) > 12
    assert steered.outputs["r"] == steered.outputs["plain"]
    steered.check_empty()


@KV
@MODES
def test_lora(start: Start, mode: dict[str, bool], kv: str) -> None:
    """With room for one adapter, one that was held goes on only when the other's turn is over: no engine dies."""
    from vllm.lora.request import LoRARequest

    options = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "lora_dtype": "bfloat16"}
    steered = start(mode, enable_prefix_caching=False, **options)
    adapters = [LoRARequest(f"adapter-{number}", number, f"/nowhere/{number}") for number in (1, 2)]
    steered.add("one", PROMPT, 40, lora_request=adapters[0])
    steered.until_said("one", 10)
    steered.told("preempt", "one", kv="drop" if kv == "drop" else "keep")
    steered.add("two", PROMPT[:20], 60, lora_request=adapters[1])
    steered.until_said("two", 10)
    if kv == "park":
        record = steered.scheduler.core.roster.records["one"]
        steered.scheduler.core.holds.park(steered.scheduler.now(), record, "test")
    steered.command("continue", "one")
    steered.run()
    assert steered.outputs == {"one": words(PROMPT, 40), "two": words(PROMPT[:20], 60)}
    steered.check_empty()


@MODES
def test_streaming_session(start: Start, mode: dict[str, bool]) -> None:
    """A session refuses to be held, between turns and within, and all its turns are charged."""
    steered = start(mode)
    events = steered.events()
    steered.add("s", PROMPT, 12, resumable=True)
    steered.until_said("s", 5)
    for kv in ("keep", "drop"):
        reply = steered.told("preempt", "s", kv=kv)
        assert reply.code == 422
        assert "streaming session" in reply.error
    steered.run()
    assert steered.said("s") == 12
    assert steered.scheduler.num_waiting_for_streaming_input == 1
    steered.command("preempt", "s")
    assert not steered.step()
    assert steered.replies[-1].code == 422
    steered.add("s", [7] * 20, 8, resumable=True)
    steered.run()
    assert steered.said("s") == 20
    turn = PROMPT + words(PROMPT, 11) + [7] * 20
    assert steered.outputs["s"] == words(PROMPT, 12) + words(turn, 8)
    steered.add("s", [1], 1)  # a request that is not resumable ends the session
    steered.run()
    steered.check_empty()
    (ended,) = [fields for _, kind, fields in events if kind.__name__ == "Finished"]
    assert (ended["output_tokens"], ended["generations"]) == (20, 2)
    assert ended["uncached_input_tokens"] + ended["cached_input_tokens"] == 40 + 20
    assert ended["uncached_input_tokens"] + 11 + 7 + ended["discarded_tokens"] == steered.computed["s"]


# What can be done to the whole engine


@KV
@MODES
@pytest.mark.parametrize("clear", [False, True], ids=["cache-stays", "cache-cleared"])
def test_paused_engine(start: Start, mode: dict[str, bool], kv: str, clear: bool) -> None:
    """Paused, an engine still takes commands: what is held or continued then is so when it goes on."""
    steered = start(mode)
    for name in ("held before", "held meanwhile", "free"):
        steered.add(name, PROMPT, 60)
    steered.until_said("held before", 10)
    disturb(steered, "held before", kv)
    steered.told("preempt", "held before", kv="drop" if kv == "drop" else "keep")
    steered.core.pause_scheduler(mode="keep", clear_cache=clear)
    drain(steered)
    said = {name: steered.said(name) for name in steered.outputs}
    steered.command("preempt", "held meanwhile", kv="drop" if kv == "drop" else "keep")
    drain(steered)
    assert steered.replies[-1].outcome == "applied", steered.replies[-1]
    assert {name: steered.said(name) for name in steered.outputs} == said
    steered.core.resume_scheduler()
    steered.until(lambda: "free" in steered.finished)
    assert set(steered.finished) == {"free"}
    steered.command("continue", "held before", "held meanwhile")
    steered.run()
    assert set(map(tuple, steered.outputs.values())) == {tuple(words(PROMPT, 60))}
    steered.check_empty()


@pytest.mark.parametrize("kv", ["keep", "drop"])
@MODES
def test_moved_between_two_steps(start: Start, mode: dict[str, bool], kv: str) -> None:
    """Parked, or dropped, and back before the next step: the runner has it in its last batch, and is told all again.

    Only a pause empties the pipeline without a step; one with a LoRA is parked to pass admission.
    """
    from vllm.lora.request import LoRARequest

    options = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "lora_dtype": "bfloat16"}
    steered = start(mode, enable_prefix_caching=False, **options)
    steered.add("r", PROMPT, 40, lora_request=LoRARequest("adapter", 1, "/nowhere/1"))
    steered.until_said("r", 10)
    steered.core.pause_scheduler(mode="keep", clear_cache=False)
    drain(steered)
    steered.command("preempt", "r", kv=kv)
    steered.command("continue", "r")
    drain(steered)
    steered.core.resume_scheduler()
    events = steered.events()
    steered.step()
    assert steered.scheduled.keys() == {"r"}
    assert [kind for _, kind, _ in events] == (
        [ev.Parked, ev.Continued, ev.Admitted] if kv == "keep" else [ev.Admitted]
    )
    steered.run()
    assert steered.outputs == {"r": words(PROMPT, 40)}
    steered.check_empty()


def drain(engine: Engine) -> None:
    """Step until nothing is in flight and nothing to do: a paused engine comes to rest."""
    for _ in range(20):
        if not engine.step():
            return
    raise AssertionError("a paused engine must come to rest")


@pytest.mark.parametrize("level", [0, 1, 2])
@MODES
def test_sleeping_engine(start: Start, mode: dict[str, bool], level: int) -> None:
    """Asleep, the device forgets its KV: held requests have lost theirs, and go on all the same."""
    steered = start(mode)
    for name in ("held", "free"):
        steered.add(name, PROMPT, 60)
    steered.until_said("held", 10)
    steered.told("preempt", "held")
    few_steps(steered)
    steered.core.sleep(level=level, mode="keep")
    assert steered.core.is_sleeping()
    steered.core.wake_up(["scheduling"] if level == 0 else None)
    steered.until(lambda: "free" in steered.finished)
    assert "held" not in steered.finished
    steered.command("continue", "held")
    steered.run()
    assert steered.outputs == dict.fromkeys(("held", "free"), words(PROMPT, 60))
    steered.check_empty()


@pytest.mark.parametrize("level", [0, 1])
@MODES
def test_engine_that_aborts_to_pause(start: Start, mode: dict[str, bool], level: int) -> None:
    """Paused by aborting, an engine ends held requests too."""
    steered = start(mode)
    for name in ("kept", "dropped", "free"):
        steered.add(name, PROMPT, 60)
    steered.until_said("kept", 10)
    steered.told("preempt", "kept")
    steered.told("preempt", "dropped", kv="drop")
    steered.core.sleep(level=level, mode="abort")
    drain(steered)
    assert not steered.scheduler.requests
    steered.core.wake_up(["scheduling"] if level == 0 else None)
    steered.run()
    steered.check_empty()


@KV
@MODES
def test_prefix_cache_reset(start: Start, mode: dict[str, bool], kv: str) -> None:
    """A reset that spares running requests fails while anything holds KV; one that does not takes held KV too."""
    steered = start(mode, enable_prefix_caching=True)
    for name in ("held", "free"):
        steered.add(name, PROMPT, 60)
    steered.until_said("held", 10)
    disturb(steered, "held", kv)
    steered.told("preempt", "held", kv="drop" if kv == "drop" else "keep")
    few_steps(steered)
    assert steered.core.reset_prefix_cache() is False
    events = steered.events()
    assert steered.core.reset_prefix_cache(reset_running_requests=True) is True
    assert [fields["reason"] for _, kind, fields in events if kind is ev.Preempted] == ["prefix cache reset"]
    assert steered.scheduler.kv_cache_manager.usage == 0
    few_steps(steered)
    steered.command("continue", "held")
    steered.run()
    assert steered.outputs == dict.fromkeys(("held", "free"), words(PROMPT, 60))
    steered.check_empty()


@KV
@pytest.mark.parametrize("mode", [V1_SYNC, V2_ASYNC])
def test_engine_that_shuts_down_drained(start: Start, mode: dict[str, bool], kv: str) -> None:
    """Asked to shut down after what runs, an engine lets held requests go on, and holds nobody any more."""
    steered = start(mode)
    for name in ("held", "free"):
        steered.add(name, PROMPT, 60)
    steered.until_said("held", 10)
    disturb(steered, "held", kv)
    steered.told("preempt", "held", kv="drop" if kv == "drop" else "keep")
    with shutting_down(steered) as aborted:
        steered.step()
        assert steered.told("preempt", "held").code == 503
        steered.run()
        assert steered.outputs == dict.fromkeys(("held", "free"), words(PROMPT, 60))
        assert not aborted
    steered.check_empty()


@pytest.mark.parametrize("mode", [V1_SYNC, V2_ASYNC])
def test_engine_that_shuts_down_with_what_lasts_too_long(start: Start, mode: dict[str, bool]) -> None:
    """Shortly before vLLM would kill the engine, what still runs or waits is aborted and its client told."""
    steered = start(mode, shutdown_timeout=60)
    for name in ("held", "long"):
        steered.add(name, PROMPT, 60)
    steered.until_said("held", 10)
    steered.told("preempt", "held", kv="keep")
    with shutting_down(steered) as aborted:
        few_steps(steered)
        assert not aborted, "there is time"
        began = steered.scheduler.now
        steered.scheduler.now = lambda: began() + 60 - STOP_S
        drain(steered)
        assert sorted(aborted) == ["held", "long"]
    steered.check_empty()


@pytest.mark.parametrize("mode", [V1_SYNC, V2_ASYNC])
def test_engine_that_shuts_down_with_what_cannot_run(start: Start, mode: dict[str, bool]) -> None:
    """What is kept back by caps or by a pause when an engine shuts down is aborted, and its client told."""
    steered = start(mode)
    steered.told("limit", targets=Targets(classes=("default",)), max_running=0)
    steered.add("capped", PROMPT, 60)
    assert not steered.step()
    with shutting_down(steered) as aborted:
        steered.run()
        assert aborted == ["capped"]
    steered.told("limit", targets=Targets(classes=("default",)), max_running=None)
    steered.add("paused", PROMPT, 60)
    steered.until_said("paused", 5)
    steered.core.pause_scheduler(mode="keep", clear_cache=False)
    drain(steered)
    with shutting_down(steered) as aborted:
        drain(steered)
        assert aborted == ["paused"]
    steered.core.resume_scheduler()
    steered.run()
    steered.check_empty()


@contextmanager
def shutting_down(engine: Engine) -> Iterator[list[str]]:
    """As after SIGTERM with `--shutdown-timeout`; the names of those whose clients are told of an abort."""
    told: list[str] = []
    asked = SimpleNamespace(
        shutdown_state=EngineShutdownState.SHUTTING_DOWN,
        _send_abort_outputs=lambda requests: told.extend(request.request_id for request in requests),
    )
    scheduler = engine.scheduler
    scheduler._engine = scheduler.mechanism._engine = asked
    yield told
    scheduler._engine = scheduler.mechanism._engine = None
    scheduler.core.drain.roles.clear()
