"""The checker accepts what vLLM's schedulers say, and names the rule that anything else breaks."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from coxswain.service.simulated.checker import Checker, Limits, ProtocolViolationError, Rule
from tests.support.steps import cached, new, step

PROMPT = [5, 6, 7, 8, 9, 10]
"""Six tokens: a block of four and half of another."""
OTHER = [5, 6, 7, 8, 90, 100]
"""The same first block."""


def checker(*, v2: bool = True, asynchronous: bool = True, slots: int = 2) -> Checker:
    """A runner with blocks of 4 tokens, 10 blocks, and room for two requests and 16 tokens a step."""
    return Checker(Limits(slots, 16, 4, 10), v2=v2, asynchronous=asynchronous)


def begin(check: Checker, name: str = "a", blocks: tuple[int, ...] = (1, 2)) -> Checker:
    """Prefill a request whole; the device samples 11."""
    check.observe(step({name: 6}, new(name, PROMPT, list(blocks))))
    check.sampled({name: [11]})
    return check


@pytest.fixture(params=[True, False], ids=["v2", "v1"])
def v2(request: pytest.FixtureRequest) -> bool:
    """Both protocols."""
    return bool(request.param)


def test_accepts_a_request_from_first_to_last_token(v2: bool) -> None:
    """Chunked prefill, decoding into a new block and finishing break no rule and leave no slot."""
    check = checker(v2=v2)
    check.observe(step({"a": 4}, new("a", PROMPT, [1])))
    check.sampled({"a": []})
    check.observe(step({"a": 2}, cached("a", 4, 0, [2])))
    check.sampled({"a": [11]})
    check.observe(step({"a": 1}, cached("a", 6, 1)))
    check.sampled({"a": [12]})
    check.observe(step({"a": 1}, cached("a", 7, 2)))
    check.sampled({"a": [13]})
    check.observe(step({"a": 1}, cached("a", 8, 3, [3])))
    check.sampled({"a": [14]})
    check.observe(step({}, finished=("a",)))
    assert check.slots == 0


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
def test_accepts_rejected_drafts(v2: bool, asynchronous: bool) -> None:
    """Two drafts of three rejected: the next step begins behind them, or counts them still if it could not know."""
    check = begin(checker(v2=v2, asynchronous=asynchronous))
    check.observe(step({"a": 4}, cached("a", 6, 1, [3])), {"a": [12, 90, 91]})
    check.sampled({"a": [12, 13]})
    computed, outputs = (10, 5) if asynchronous else (8, 3)
    check.observe(step({"a": 1}, cached("a", computed, outputs)))
    check.sampled({"a": [14]})
    check.observe(step({"a": 1}, cached("a", 9, 4)))


def test_only_an_async_scheduler_may_count_rejected_drafts(v2: bool) -> None:
    """A synchronous one knows them: it must not skip what they were to be."""
    check = begin(checker(v2=v2, asynchronous=False))
    check.observe(step({"a": 4}, cached("a", 6, 1, [3])), {"a": [12, 90, 91]})
    check.sampled({"a": [12, 13]})
    broken(Rule.COMPUTED, observe({"a": 1}, cached("a", 10, 3)), check)


def test_v1_corrects_rejected_drafts_itself() -> None:
    """To V1 an async scheduler must count the last step's drafts: it takes the rejected ones off once."""
    check = begin(checker(v2=False))
    check.observe(step({"a": 4}, cached("a", 6, 1, [3])), {"a": [12, 90, 91]})
    check.sampled({"a": [12, 13]})
    broken(Rule.COMPUTED, observe({"a": 1}, cached("a", 8, 5)), check)


def test_v1_says_which_outputs_are_left_out() -> None:
    """As many outputs as were sampled are too few where rejected drafts are counted: the text names them."""
    check = begin(checker(v2=False))
    check.observe(step({"a": 4}, cached("a", 6, 1, [3])), {"a": [12, 90, 91]})
    check.sampled({"a": [12, 13]})
    assert "sampled 3; 2 drafts" in broken(Rule.TOKENS, observe({"a": 1}, cached("a", 10, 3)), check)


def test_accepts_a_held_request_that_continues(v2: bool) -> None:
    """Steps without a known request change nothing of it; V1 gets its tokens again when it returns."""
    check = begin(checker(v2=v2))
    check.observe(step({"b": 6}, new("b", PROMPT, [3, 4])))
    check.sampled({"b": [11]})
    check.observe(step({"a": 1, "b": 1}, cached("a", 6, 1, tokens=[*PROMPT, 11]), cached("b", 6, 1)))


def test_accepts_a_preempted_request_that_is_recomputed(v2: bool) -> None:
    """Preemption gives the blocks away; the request comes back with others and computes everything again."""
    check = begin(checker(v2=v2))
    check.observe(step({"b": 6}, new("b", OTHER, [1, 2]), preempted=("a",)))
    check.sampled({"b": [12]})
    tokens = [*PROMPT, 11]
    back = (
        new("a", PROMPT, [3, 4], prefill=tokens)
        if v2
        else cached("a", 0, 1, [3, 4], resumed=True, tokens=tokens)
    )
    check.observe(step({"a": 7}, back))


def test_accepts_that_others_write_what_a_preempted_request_had_written(v2: bool) -> None:
    """After a reset of the prefix cache two share a block that one of them wrote before and the other writes now."""
    check = begin(checker(v2=v2))
    tokens = [*PROMPT, 11]
    back = (
        new("a", PROMPT, [1, 4], prefill=tokens, computed=4)
        if v2
        else cached("a", 4, 1, [1, 4], resumed=True, tokens=tokens)
    )
    check.observe(step({"b": 6, "a": 3}, new("b", OTHER, [1, 3]), back, preempted=("a",)))


def test_accepts_output_in_flight_that_was_dropped_at_preemption(v2: bool) -> None:
    """A token that vLLM threw away is sampled again: the request comes back one token shorter."""
    check = begin(checker(v2=v2))
    back = new("a", PROMPT, [3, 4]) if v2 else cached("a", 0, 0, [3, 4], resumed=True)
    check.observe(step({"a": 6}, back, preempted=("a",)))
    check.sampled({"a": [11]})
    check.observe(step({"a": 1}, cached("a", 6, 1)))


def test_accepts_a_prefix_that_another_request_computed(v2: bool) -> None:
    """A block with the KV of the same prefix may be read by any request, also in the step that writes it."""
    check = checker(v2=v2)
    check.observe(
        step({"a": 6, "b": 2}, new("a", PROMPT, [1, 2]), new("b", OTHER, [1, 3], computed=4)),
    )
    check.sampled({"a": [11], "b": [12]})
    check.observe(step({"a": 1, "b": 1}, cached("a", 6, 1), cached("b", 6, 1)))


def test_accepts_a_copied_block(v2: bool) -> None:
    """What is copied before the step may be read from the copy."""
    check = begin(checker(v2=v2))
    check.observe(step({"b": 1}, new("b", PROMPT, [1, 5], computed=5), copies=[(2, 5)]))


def test_accepts_a_sessions_next_turn(v2: bool) -> None:
    """A known request may come as new when its prompt has grown; what was computed stays its own."""
    check = begin(checker(v2=v2))
    check.observe(step({"a": 3}, new("a", [*PROMPT, 20, 21, 22], [1, 2, 3], computed=6)))
    check.sampled({"a": [23]})
    check.observe(step({"a": 1}, cached("a", 9, 1)))


Act = Callable[[Checker], None]


def broken(rule: Rule, act: Act, check: Checker) -> str:
    """Run `act`, which must break `rule`; the error's text."""
    with pytest.raises(ProtocolViolationError) as caught:
        act(check)
    assert caught.value.rule is rule, caught.value
    assert f"`{rule}`" in str(caught.value)
    return str(caught.value)


def observe(*args: Any, **options: Any) -> Act:
    """One step."""
    return lambda check: check.observe(step(*args, **options))


EITHER: dict[str, tuple[Rule, Act]] = {
    "scheduled without being introduced": (Rule.COUNTS, observe({"a": 1, "x": 1}, cached("a", 6, 1))),
    "introduced without being scheduled": (Rule.COUNTS, observe({}, cached("a", 6, 1))),
    "introduced twice": (Rule.COUNTS, observe({"a": 1}, cached("a", 6, 1), cached("a", 6, 1))),
    "no tokens": (Rule.COUNTS, observe({"a": 0}, cached("a", 6, 1))),
    "a wrong total": (Rule.COUNTS, observe({"a": 1}, cached("a", 6, 1), total=2)),
    "over the budget": (Rule.COUNTS, observe({"b": 17}, new("b", list(range(17)), [3, 4, 5, 6, 7]))),
    "cached but never introduced": (Rule.KNOWN, observe({"x": 1}, cached("x", 6, 1))),
    "scheduled after it finished": (Rule.KNOWN, observe({"a": 1}, cached("a", 6, 1), finished=("a",))),
    "new while it is known": (Rule.KNOWN, observe({"a": 6}, new("a", PROMPT, [3, 4]))),
    "a position computed twice": (Rule.COMPUTED, observe({"a": 1}, cached("a", 5, 1))),
    "a position left out": (Rule.COMPUTED, observe({"a": 1}, cached("a", 7, 1))),
    "everything computed, nothing to run": (
        Rule.COMPUTED,
        observe({"b": 1}, new("b", PROMPT, [1, 2], computed=6)),
    ),
    "a token that is not known yet": (Rule.FUTURE, observe({"a": 2}, cached("a", 6, 1))),
    "a table too short": (Rule.BLOCKS, observe({"b": 6}, new("b", PROMPT, [3]))),
    "the null block": (Rule.BLOCKS, observe({"b": 6}, new("b", PROMPT, [0, 3]))),
    "a block that does not exist": (Rule.BLOCKS, observe({"b": 6}, new("b", PROMPT, [3, 10]))),
    "a block twice in one table": (Rule.BLOCKS, observe({"a": 1}, cached("a", 6, 1, [2]))),
    "another's block written": (Rule.WRITER, observe({"b": 6}, new("b", PROMPT, [3, 2]))),
    "one block written twice in one step": (
        Rule.WRITER,
        observe({"b": 4, "c": 4}, new("b", PROMPT, [3]), new("c", PROMPT, [3]), finished=("a",)),
    ),
    "a hit on another prefix": (Rule.KV, observe({"b": 2}, new("b", [4, *PROMPT[1:]], [1, 3], computed=4))),
    "a hit on an empty block": (Rule.KV, observe({"b": 2}, new("b", PROMPT, [5, 3], computed=4))),
}


@pytest.mark.parametrize("case", EITHER)
def test_names_the_rule_that_is_broken(case: str, v2: bool) -> None:
    """Each wrong step is refused on both protocols, under its rule."""
    rule, act = EITHER[case]
    broken(rule, act, begin(checker(v2=v2, slots=3)))


def test_finds_a_shared_block_that_was_overwritten(v2: bool) -> None:
    """A block that was given away while a reader of it is held shows when the reader continues."""
    check = begin(checker(v2=v2, slots=3))
    check.observe(step({"b": 2}, new("b", OTHER, [1, 3], computed=4)))
    check.sampled({"b": [12]})
    check.observe(step({"c": 6}, new("c", [90, *PROMPT[1:]], [1, 4]), finished=("a",)))
    check.sampled({"c": [13]})
    text = broken(Rule.KV, observe({"b": 1}, cached("b", 6, 1, tokens=[*OTHER, 12])), check)
    assert "position 0 in block 1" in text
    assert "last written by c" in text


def test_finds_a_parked_request_with_anothers_table(v2: bool) -> None:
    """A request that comes back with its KV, but with blocks that hold another's, is caught at its first step."""
    check = begin(checker(v2=v2))
    check.observe(step({"b": 6}, new("b", OTHER, [3, 4]), preempted=("a",)))
    check.sampled({"b": [12]})
    tokens = [*PROMPT, 11]

    def back(blocks: list[int]) -> Any:
        if v2:
            return new("a", PROMPT, blocks, computed=6, prefill=tokens)
        return cached("a", 6, 1, blocks, resumed=True, tokens=tokens)

    text = broken(Rule.KV, observe({"a": 1}, back([3, 4]), finished=("b",)), check)
    assert "position 4 in block 4" in text  # block 3 holds the prefix that both have


def test_finds_another_adapters_kv(v2: bool) -> None:
    """The same prompt under another adapter has other KV: a prefix hit across adapters is caught."""
    check = begin(checker(v2=v2))
    row = new("b", PROMPT, [1, 3], computed=4)
    row.lora_request = SimpleNamespace(lora_int_id=7)
    broken(Rule.KV, observe({"b": 2}, row), check)


def test_finds_a_device_that_slept(v2: bool) -> None:
    """KV from before a sleep is gone."""
    check = begin(checker(v2=v2))
    check.forget_kv()
    assert "holds nothing" in broken(Rule.KV, observe({"a": 1}, cached("a", 6, 1)), check)


def test_v2_counts_slots_of_requests_that_are_not_scheduled() -> None:
    """On V2 a held request keeps its slot: the one too many is refused, although two are enough for the batch."""
    check = begin(begin(checker(v2=True)), "b", (3, 4))
    text = broken(Rule.SLOTS, observe({"c": 6}, new("c", PROMPT, [5, 6])), check)
    assert "3 requests have a slot" in text


@pytest.mark.parametrize("how", ["finished", "preempted"])
def test_v2_frees_slots_by_finishing_and_preemption(how: str) -> None:
    """Both, and nothing else, make room for another."""
    check = begin(begin(checker(v2=True)), "b", (3, 4))
    options: dict[str, Any] = {how: ("a",)}
    check.observe(step({"c": 6}, new("c", PROMPT, [5, 6]), **options))
    assert check.slots == 2


def test_v1_counts_only_the_batch() -> None:
    """On V1 a request that is not scheduled costs no place; three in one step are too many for two."""
    check = begin(begin(checker(v2=False)), "b", (3, 4))
    check.observe(step({"c": 6}, new("c", PROMPT, [5, 6])))
    check.sampled({"c": [11]})
    tokens = [*PROMPT, 11]
    rows = [cached(name, 6, 1, tokens=tokens) for name in "abc"]
    broken(Rule.SLOTS, observe({"a": 1, "b": 1, "c": 1}, *rows), check)


def test_v2_needs_all_tokens_of_a_new_request() -> None:
    """V2 reads prefill_token_ids; without them, or with others, it would compute something else."""
    row = new("b", PROMPT, [3, 4])
    row.prefill_token_ids = None
    broken(Rule.TOKENS, observe({"b": 6}, row), begin(checker()))
    broken(
        Rule.TOKENS, observe({"b": 6}, new("b", PROMPT, [3, 4], prefill=[1, *PROMPT[1:]])), begin(checker())
    )


def test_v2_compares_tokens_across_a_preemption() -> None:
    """A preempted request that comes back with a token that the device never sampled is refused."""
    check = begin(checker())
    back = new("a", PROMPT, [3, 4], prefill=[*PROMPT, 99])
    broken(Rule.TOKENS, observe({"a": 7}, back, preempted=("a",)), check)


def test_v2_refuses_resumed_rows() -> None:
    """V2 does not read resumed_req_ids: it would append the blocks to the old table."""
    broken(Rule.RESUMED, observe({"a": 1}, cached("a", 6, 1, [3], resumed=True)), begin(checker()))


def test_v1_needs_a_preempted_request_to_be_resumed() -> None:
    """Scheduled as if nothing had been, it would read blocks that are no longer its own."""
    check = begin(checker(v2=False))
    row = cached("a", 6, 1, tokens=[*PROMPT, 11])
    broken(Rule.RESUMED, observe({"a": 1}, row, preempted=("a",)), check)


def test_v1_needs_a_table_to_resume() -> None:
    """vLLM itself asserts this."""
    row = cached("a", 0, 1, resumed=True, tokens=[*PROMPT, 11])
    broken(Rule.RESUMED, observe({"a": 7}, row, preempted=("a",)), begin(checker(v2=False)))


@pytest.mark.parametrize("tokens", [None, PROMPT, [*PROMPT, 99]], ids=["none", "too few", "others"])
def test_v1_async_needs_the_tokens_of_one_that_was_away(tokens: list[int] | None) -> None:
    """With async scheduling V1 takes the last tokens from all_token_ids: none, too few or others are refused."""
    check = begin(checker(v2=False))
    check.observe(step({}))
    broken(Rule.TOKENS, observe({"a": 1}, cached("a", 6, 1, tokens=tokens)), check)


def test_v1_sync_remembers_the_tokens_of_one_that_was_away() -> None:
    """Without async scheduling V1 has them itself."""
    check = begin(checker(v2=False, asynchronous=False))
    check.observe(step({}))
    check.observe(step({"a": 1}, cached("a", 6, 1)))


@pytest.mark.parametrize("outputs", [0, 2])
def test_v1_agrees_on_the_number_of_outputs(outputs: int) -> None:
    """V1 cuts its outputs to num_output_tokens: any other number than it has sampled is refused."""
    broken(Rule.TOKENS, observe({"a": 1}, cached("a", 6, outputs)), begin(checker(v2=False)))


def test_a_name_may_come_again(v2: bool) -> None:
    """What a finished request wrote is nobody's: another of its name may share a block that a third one writes."""
    check = begin(checker(v2=v2), "a", (1, 2))
    check.observe(step({}, finished=("a",)))
    both = {"b": 6, "a": 2}
    check.observe(step(both, new("b", PROMPT, [1, 3]), new("a", PROMPT, [1, 4], computed=4)))
