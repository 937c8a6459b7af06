"""Which allocations are answered early; that the answer is vLLM's own is compared in every run of `tests.support`."""

from typing import Any

import pytest
import torch
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

from bench.rig import Rig, vllm_config
from coxswain.service.scheduler import SteeredScheduler, compat

pytestmark = pytest.mark.vllm

SHAPE: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32}
FULL, SLIDING = FullAttentionSpec(**SHAPE), SlidingWindowSpec(**SHAPE, sliding_window=32)


def manager(*specs: Any, caching: bool) -> KVCacheManager:
    """Of a model with these groups of layers."""
    groups = [KVCacheGroupSpec([f"layer{index}"], spec) for index, spec in enumerate(specs)]
    return KVCacheManager(
        KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=groups), max_model_len=256,
        scheduler_block_size=16, hash_block_size=16, max_in_flight_tokens=96, enable_caching=caching,
    )  # fmt: skip


@pytest.mark.parametrize("caching", [False, True])
def test_only_full_attention_is_answered_early(caching: bool) -> None:
    """Where a step may also free blocks, every answer is vLLM's."""
    for specs in ([SLIDING], [FULL, SLIDING]):
        hybrid = manager(*specs, caching=caching)
        assert compat.allocation(hybrid) == hybrid.allocate_slots
    plain = manager(FULL, caching=caching)
    assert compat.allocation(plain) != plain.allocate_slots


def test_a_version_that_was_not_tested_allocates_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """`COX_ALLOW_VLLM` lets it in, but nobody knows what its `allocate_slots` does besides."""
    monkeypatch.setattr(compat, "TESTED", ("0.31.0",))
    plain = manager(FULL, caching=True)
    assert compat.allocation(plain) == plain.allocate_slots


def test_vllm_is_asked_once_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 decode steps with blocks of 16, four take a block; without a prefix cache vLLM hears of no others."""
    asked: list[int] = []
    its = KVCacheManager.allocate_slots

    def allocate_slots(self: Any, request: Any, num_new_tokens: int, **others: Any) -> Any:
        asked.append(request.num_computed_tokens)
        return its(self, request, num_new_tokens, **others)

    monkeypatch.setattr(KVCacheManager, "allocate_slots", allocate_slots)
    rig = Rig(SteeredScheduler, vllm_config(block_size=16))
    rig.add("a", prompt=16, tokens=65)
    rig.run()
    assert rig.outputs["a"] == rig.expected("a", 65)
    assert asked == [0, 16, 32, 48, 64]
    rig.scheduler.shutdown()
