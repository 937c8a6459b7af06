"""A real EngineCore on the simulated device, in this process, one step at a time."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from coxswain.schemas.commands import COMMANDS, Targets
from coxswain.schemas.subjects import OPERATOR
from coxswain.service.port import CommandIn, ReplyOut
from coxswain.service.simulated.settings import EXECUTOR

STEERED = "coxswain.service.scheduler.SteeredScheduler"


class Engine:
    """EngineCore, stepped by hand, and what its requests have said."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.steps = 0
        self.outputs: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self.replies: list[Any] = []

    @property
    def checker(self) -> Any:
        """The checker of the simulated device."""
        return self.core.model_executor.driver_worker.checker

    def add(self, name: str, prompt: list[int], tokens: int) -> None:
        """Add a request that says exactly so many tokens."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        request = Request(
            request_id=name,
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(max_tokens=tokens, ignore_eos=True),
            pooling_params=None,
            block_hasher=self.core.request_block_hasher,
        )
        self.core.add_request(request)

    def command(self, verb: str, *requests: str, **fields: Any) -> None:
        """Put an operator's command where the bus would put it: it is in force before the next step."""
        command = COMMANDS[verb](
            id=f"c{len(self.replies)}-{self.steps}-{verb}", targets=Targets(requests=requests), **fields
        )
        assert self.core.scheduler.port.offer(CommandIn(OPERATOR, verb, command, (), None))

    def step(self) -> bool:
        """One turn of EngineCore's loop; False if it had nothing to do."""
        if not self.core.scheduler.has_requests() and not self.core.batch_queue:
            return False
        outputs, _ = self.core.step_fn()
        self.steps += 1
        for part in (outputs or {}).values():
            for item in part.outputs:
                self.outputs.setdefault(item.request_id, []).extend(item.new_token_ids)
                if item.finish_reason is not None:
                    self.finished.add(item.request_id)
        port = getattr(self.core.scheduler, "port", None)
        if port is not None:
            self.replies += [item.reply for item in port.collect() if isinstance(item, ReplyOut)]
        return True

    def run(self, most: int = 20_000) -> None:
        """Step until there is nothing to do."""
        for _ in range(most):
            if not self.step():
                return
        raise AssertionError(f"still busy after {most} steps")


@contextmanager
def engine(
    folder: Path,
    *,
    v2: bool,
    asynchronous: bool,
    scheduler: str | None = STEERED,
    preset: str = "instant",
    **options: Any,
) -> Iterator[Engine]:
    """An engine on the simulated device with the checker on; `options` are vLLM's engine arguments."""
    from vllm import envs
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.abstract import Executor

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4_000,
        "max_position_embeddings": 4_096, "eos_token_id": 2, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    env = {"COX_SIM_PRESET": preset, "COX_SIM_CHECK": "1", "VLLM_USE_V2_MODEL_RUNNER": str(int(v2))}
    defaults: dict[str, Any] = {
        "max_model_len": 288, "max_num_seqs": 8, "max_num_active_seqs": 5, "max_num_batched_tokens": 96,
        "block_size": 16, "num_gpu_blocks_override": 48,
    }  # fmt: skip
    with patch.dict(os.environ, env):
        os.environ.pop("COX_NATS_URL", None)
        arguments = EngineArgs(
            model=str(folder), skip_tokenizer_init=True, async_scheduling=asynchronous, scheduler_cls=scheduler,
            distributed_executor_backend=EXECUTOR, **{**defaults, **options},
        )  # fmt: skip
        vllm_config = arguments.create_engine_config()
        assert vllm_config.use_v2_model_runner is v2
        assert vllm_config.scheduler_config.async_scheduling is asynchronous
        core = EngineCore(vllm_config, Executor.get_class(vllm_config), log_stats=False)
        try:
            yield Engine(core)
        finally:
            core.shutdown()
            envs.disable_envs_cache()  # EngineCore fixes them; the next engine has others
