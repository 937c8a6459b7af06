"""A victim whose chunk was scheduled in the very step in which it is preempted: nothing of that chunk was computed.

vLLM's choice of victims by priority allows it, and its prefix cache then offered blocks that nobody had written. On the
real EngineCore and KV manager; the simulated device's checker reads every position that a step attends to.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, MLAAttentionSpec, SlidingWindowSpec

from coxswain.service.scheduler import compat
from tests.support.modes import DRAFTS, LORAS, MODES, V1_ASYNC, V1_SYNC, V2_ASYNC, taken_back, words
from tests.support.simulated import Engine, engine
from tests.support.steered import engine_id, public_id

__all__ = ["taken_back"]

pytestmark = pytest.mark.vllm

LONG, SHORT = list(range(100, 200)), list(range(500, 515))
ROOM: dict[str, Any] = {
    "num_gpu_blocks_override": 8, "max_model_len": 112, "max_num_batched_tokens": 64,
    "long_prefill_token_threshold": 32, "enable_prefix_caching": True,
}  # fmt: skip
"""Seven blocks of 16: the long prompt needs all of them, and gets two a step."""


def struggle(engine: Engine, prompt: list[int] = SHORT, **fields: Any) -> dict[str, tuple[list[int], int]]:
    """A tenant's long prompt and, behind it, another tenant's request that runs out of blocks: prompts and outputs."""
    heavy, light = engine_id(public_id("heavy")), engine_id(public_id("light"))
    engine.add(heavy, LONG, 4, priority=5, arrival_time=1.0, **fields)
    engine.add(light, prompt, 6, arrival_time=2.0)
    while engine.step():
        engine.check_prefix_cache()
    return {heavy: (LONG, 4), light: (prompt, 6)}


@MODES
def test_what_it_was_to_compute_is_not_in_the_prefix_cache(
    tmp_path: Path, mode: dict[str, bool], taken_back: list[int]
) -> None:
    """It comes back and finds what was computed, in this step's blocks nothing; both say what they would alone."""
    with engine(tmp_path, **mode, **ROOM) as steered:
        asked = struggle(steered)
        assert taken_back == [2]
        assert steered.outputs == {name: words(*each) for name, each in asked.items()}
        # Its first two chunks are found again; of the third, in whose step it had to go, nothing was computed.
        assert [steered.computed[name] for name in asked] == [100 + 3, 15 + 5]
        steered.check_empty()


@pytest.mark.parametrize("mode", [V1_SYNC, V1_ASYNC, V2_ASYNC])
def test_with_drafts(tmp_path: Path, mode: dict[str, bool], taken_back: list[int]) -> None:
    """Room for drafts is asked for with the chunk, and taken back with it."""
    with engine(tmp_path, **mode, **ROOM, speculative_config=DRAFTS[mode["asynchronous"]]) as steered:
        asked = struggle(steered, SHORT[:12])
        assert any(taken_back)
        assert steered.outputs == {name: words(*each) for name, each in asked.items()}
        steered.check_empty()


def test_with_an_adapter(tmp_path: Path, taken_back: list[int]) -> None:
    """The prefix of an adapter's request is its own, and is taken back as any other."""
    with engine(tmp_path, v2=True, asynchronous=True, **ROOM, **LORAS) as steered:
        (heavy, _), (light, said) = struggle(
            steered, lora_request=LoRARequest("one", 1, "/nowhere/1")
        ).items()
        assert any(taken_back)
        assert (steered.said(heavy), steered.outputs[light]) == (4, words(*said))
        steered.check_empty()


def test_where_more_than_blocks_is_to_be_taken_back_the_last_gives_way(
    tmp_path: Path, taken_back: list[int]
) -> None:
    """As in stock vLLM by `fcfs`: it has had nothing of the step yet, whoever has had most."""
    with (
        patch.object(compat, "can_take_back", lambda _scheduler: False),
        engine(tmp_path, v2=True, asynchronous=True, **ROOM) as steered,
    ):
        asked = struggle(steered)
        assert taken_back
        assert not any(taken_back)
        assert steered.outputs == {name: words(*each) for name, each in asked.items()}
        steered.check_empty()


@pytest.mark.parametrize(
    ("groups", "images", "any_victim"),
    [
        ([FullAttentionSpec], False, True),
        ([FullAttentionSpec, SlidingWindowSpec, MLAAttentionSpec], False, True),
        ([FullAttentionSpec, MambaSpec], False, False),
        ([FullAttentionSpec], True, False),
    ],
)
def test_where_more_than_attention_would_have_to_be_taken_back_the_last_gives_way(
    groups: list[type], images: bool, any_victim: bool
) -> None:
    """States of Mamba and inputs of an encoder, which vLLM does not take back."""
    scheduler = SimpleNamespace(
        kv_cache_config=SimpleNamespace(
            kv_cache_groups=[SimpleNamespace(kv_cache_spec=object.__new__(kind)) for kind in groups]
        ),
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(supports_multimodal_inputs=images)),
    )
    assert compat.can_take_back(scheduler) is any_victim
