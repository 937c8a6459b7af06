"""A request preempted in the step of its own chunk, on a real model: it says what it would have said alone."""

from pathlib import Path
from unittest.mock import patch

import pytest

from coxswain.service.tiny import make_model
from tests.support.modes import taken_back
from tests.support.simulated import engine
from tests.support.steered import engine_id, public_id

__all__ = ["taken_back"]

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROMPTS = {"heavy": list(range(300, 500)), "light": list(range(600, 631))}


def test_it_attends_to_nothing_that_was_not_computed(tmp_path: Path, taken_back: list[int]) -> None:
    """Seven blocks of 32 for a long prompt in chunks of 64 and, behind it, a request of another tenant."""
    from vllm import SamplingParams

    # All in this process, whose threads stay where they are.
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    with (
        patch.dict("os.environ", env),
        engine(
            tmp_path, v2=False, asynchronous=False, model=str(make_model(tmp_path / "model")), executor="uni",
            dtype="float32", enforce_eager=True, enable_prefix_caching=True, block_size=32, num_gpu_blocks_override=8,
            max_model_len=224, max_num_batched_tokens=128, long_prefill_token_threshold=64, kv_cache_memory_bytes=2**26,
        ) as steered,
    ):  # fmt: skip

        def say(*tenants: str) -> list[list[int]]:
            names = [engine_id(public_id(tenant)) for tenant in tenants]
            for name, tenant in zip(names, tenants, strict=True):
                steered.add(name, PROMPTS[tenant], 0, params=greedy.clone())
            steered.run()
            assert steered.scheduler.reset_prefix_cache()
            return [steered.outputs[name] for name in names]

        alone = say("heavy") + say("light")
        assert not taken_back
        assert say("heavy", "light") == alone
        assert taken_back == [2]
