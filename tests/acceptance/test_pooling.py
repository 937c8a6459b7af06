"""Pooling under a real model: an embedding held in the middle of its prompt is the one that it would have been."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest

from coxswain.service.tiny import make_model
from tests.support.modes import KV, disturb
from tests.support.simulated import Engine, engine

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROMPT = list(range(300, 520))
CHUNK = 96


@pytest.fixture(scope="module")
def pooling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """vLLM on the CPU, stepped by hand, with a model that embeds what it reads: three steps a prompt."""
    model = make_model(tmp_path_factory.mktemp("pooling") / "model")
    # All in this process, whose threads stay where they are.
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (
        patch.dict("os.environ", env),
        engine(
            model.parent, v2=False, asynchronous=False, model=str(model), executor="uni", runner="pooling",
            dtype="float32", enforce_eager=True, enable_prefix_caching=False, enable_chunked_prefill=True,
            max_num_batched_tokens=CHUNK, block_size=32, num_gpu_blocks_override=24, kv_cache_memory_bytes=2**26,
        ) as engine_,
    ):  # fmt: skip
        yield engine_


def add(engine_: Engine, name: str, prompt: list[int]) -> None:
    """Ask for the embedding of a prompt."""
    from vllm import PoolingParams
    from vllm.v1.request import Request

    params = PoolingParams(task="embed")
    params.verify(engine_.core.vllm_config.model_config)
    engine_.core.add_request(Request(name, prompt, None, params))


@KV
def test_an_embedding_is_the_same_after_a_hold(pooling: Engine, kv: str) -> None:
    """Held, parked or dropped after its first chunk, while others are embedded, and computed again only if dropped."""
    import torch

    pooling.forget()
    other = [7, *PROMPT[1:]]
    add(pooling, "undisturbed", PROMPT)
    pooling.run()
    add(pooling, "other", other)
    pooling.run()
    expected = pooling.pooled["undisturbed"]
    assert not torch.allclose(pooling.pooled["other"], expected, atol=1e-2), "its first token tells in it"
    add(pooling, "held", PROMPT)
    pooling.step()
    assert pooling.scheduled == {"held": CHUNK}
    add(pooling, "meanwhile", other)
    disturb(pooling, "held", kv)
    pooling.run()
    assert pooling.computed["held"] == len(PROMPT) + (CHUNK if kv == "drop" else 0)
    assert torch.allclose(pooling.pooled["held"], expected, atol=1e-5)
    assert torch.allclose(pooling.pooled["meanwhile"], pooling.pooled["other"], atol=1e-5)
    pooling.check_empty()
