"""vLLM's scheduler without a model: configuration and construction, shared with `bench.rig`.

vLLM's own configuration classes and KV manager; the model is a description that is never loaded.
"""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Final

EOS: Final = 2
VOCABULARY: Final = 32_000


@cache
def _model() -> tempfile.TemporaryDirectory[str]:
    """A folder that describes a small Llama: one for a whole process, and it goes when that ends."""
    folder = tempfile.TemporaryDirectory(prefix="cox-model-")
    description = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "max_position_embeddings": 131_072, "eos_token_id": EOS, "torch_dtype": "float32",
    }  # fmt: skip
    (Path(folder.name) / "config.json").write_text(json.dumps(description))
    return folder


def vllm_config(
    *,
    max_num_seqs: int = 8,
    max_num_active_seqs: int | None = None,
    max_num_batched_tokens: int = 512,
    max_model_len: int = 1_024,
    block_size: int = 32,
    num_blocks: int = 256,
    prefix_caching: bool = False,
    async_scheduling: bool = False,
    policy: str = "priority",
) -> Any:
    """A vLLM configuration of a small Llama that is never loaded."""
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig

    model = ModelConfig(
        model=_model().name, skip_tokenizer_init=True, dtype="float32", max_model_len=max_model_len, seed=0,
    )  # fmt: skip
    scheduler = SchedulerConfig(
        max_num_seqs=max_num_seqs, max_num_active_seqs=max_num_active_seqs,
        max_num_batched_tokens=max_num_batched_tokens, max_model_len=max_model_len, is_encoder_decoder=False,
        policy=policy, async_scheduling=async_scheduling, enable_chunked_prefill=True,
    )  # fmt: skip
    cached = CacheConfig(block_size=block_size, enable_prefix_caching=prefix_caching)
    cached.num_gpu_blocks = num_blocks
    config = VllmConfig(
        model_config=model, scheduler_config=scheduler, cache_config=cached, device_config=DeviceConfig("cpu"),
    )  # fmt: skip
    config.scheduler_config.async_scheduling = async_scheduling  # the CPU platform turns it off
    return config


def make_scheduler(scheduler_cls: type, config: Any) -> Any:
    """A scheduler of this class over one layer of full attention, as EngineCore makes it."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    spec = FullAttentionSpec(
        block_size=config.cache_config.block_size, num_kv_heads=2, head_size=16, dtype=torch.float32,
    )  # fmt: skip
    return scheduler_cls(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=config.cache_config.num_gpu_blocks, kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=config.cache_config.block_size,
        log_stats=False,
    )  # fmt: skip
