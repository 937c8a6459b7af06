"""Speculative decoding: what is held in the middle of its drafts goes on with them, and says the same."""

import pytest

from tests.support.modes import KV, PROMPT, V1_ASYNC, V1_SYNC, V2_ASYNC, Start, disturb, start, words

__all__ = ["start"]

pytestmark = pytest.mark.vllm


@KV
@pytest.mark.parametrize("mode", [V1_SYNC, V1_ASYNC, V2_ASYNC])
def test_speculative_decoding(start: Start, mode: dict[str, bool], kv: str) -> None:
    """Held with drafts in flight: none is lost, none said twice."""
    method = "ngram_gpu" if mode["asynchronous"] else "ngram"
    drafts = {"method": method, "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    steered = start(mode, enable_prefix_caching=False, speculative_config=drafts)
    steered.add("r", PROMPT, 120)
    steered.add("other", PROMPT[:30], 120)
    for tokens in (15, 40, 80):
        steered.until_said("r", tokens)
        disturb(steered, "r", kv)
    steered.run()
    assert steered.outputs == {"r": words(PROMPT, 120), "other": words(PROMPT[:30], 120)}
    steered.check_empty()


@pytest.mark.parametrize("mode", [V1_SYNC, V1_ASYNC, V2_ASYNC])
def test_drafts_outlive_a_hold(start: Start, mode: dict[str, bool]) -> None:
    """What goes on tries the drafts that it was held with; only V1 with async scheduling has forgotten them."""
    method = "ngram_gpu" if mode["asynchronous"] else "ngram"
    drafts = {"method": method, "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    steered = start(mode, enable_prefix_caching=False, speculative_config=drafts)
    steered.add("r", PROMPT, 100)
    steered.add("other", PROMPT[:30], 200)
    steered.until_said("r", 20)
    gained = []
    for _ in range(4):
        disturb(steered, "r", "keep")
        said = steered.said("r")
        steered.step()
        assert steered.scheduled["r"] == 4
        steered.until_said("r", said + 1)
        gained.append(steered.said("r") - said)
    assert (max(gained) > 1) == (mode["v2"] or not mode["asynchronous"])
    steered.run()
    assert steered.outputs == {"r": words(PROMPT, 100), "other": words(PROMPT[:30], 200)}
    steered.check_empty()
