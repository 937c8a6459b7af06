"""The worker that vLLM talks to: no model, no memory, a clock.

The shell of this package: turns vLLM's calls into calls of `runner`, `roofline`, `tokens` and `checker`. Called by
`executor`, on the engine's thread. It has the methods of vLLM's WorkerBase that EngineCore uses; anything else is an
AttributeError that names the method.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    AsyncModelRunnerOutput,
    DraftTokenIds,
    KVConnectorOutput,
    ModelRunnerOutput,
)
from vllm.v1.worker.worker_base import CompilationTimes

from coxswain.common.logs import get_logger
from coxswain.service.simulated.checker import Checker, Limits
from coxswain.service.simulated.offload import Connector
from coxswain.service.simulated.runner import Runner, Sample, Step
from coxswain.service.simulated.settings import SimSettings
from coxswain.service.simulated.tokens import Vocabulary, draw

log = get_logger()


class Pending(AsyncModelRunnerOutput):
    """The output of a step that ends at `due` (monotonic s): getting it earlier waits until then."""

    def __init__(self, output: ModelRunnerOutput, due: float) -> None:
        self._output = output
        self._due = due

    def get_output(self) -> ModelRunnerOutput:
        """Wait until the device has finished, then return."""
        remaining = self._due - time.monotonic()
        if remaining > 0:
            time.sleep(remaining)
        return self._output


class SimulatedDevice:
    """A device that runs one step after the other, each as long as the preset says.

    Args:
        config: vLLM's configuration.
        settings: preset and whether to check.
    """

    def __init__(self, config: Any, settings: SimSettings) -> None:
        self.config = config
        self.settings = settings
        self.checker: Checker | None = None
        # Asked once: vLLM reads it from the environment each time.
        self._v2 = v2 = config.use_v2_model_runner
        self._runner = Runner(v2=v2)
        self._vocabulary = Vocabulary(config.model_config.get_vocab_size(), _ends(config.model_config))
        self._free_at = 0.0
        """When the device has finished everything that it was given (monotonic s)."""
        self._connector: Connector | None = None
        self._transfers: KVConnectorOutput | None = None
        """What became of KV transfers by the step executed last."""
        self._step: Step | None = None
        """Executed, not yet sampled."""
        self._drafts: dict[str, list[int]] = {}
        """Guesses for the tokens after those sampled last, per request: V1 has those of the last step, V2 a slot's."""
        log.info(
            "simulated.device", check=settings.check, model_runner="v2" if v2 else "v1",
            async_scheduling=config.scheduler_config.async_scheduling,
        )  # fmt: skip

    # At start

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """One layer of full attention: the scheduler sees blocks, their bytes do not matter."""
        model, cache = self.config.model_config, self.config.cache_config
        spec = FullAttentionSpec(
            block_size=cache.block_size,
            num_kv_heads=model.get_num_kv_heads(self.config.parallel_config),
            head_size=model.get_head_size(),
            dtype=torch.bfloat16,
        )
        self._page_bytes = spec.page_size_bytes
        return {"simulated": spec}

    def determine_available_memory(self) -> int:
        """Bytes for as many blocks as the preset has tokens for."""
        blocks = self.settings.preset.kv_tokens // self.config.cache_config.block_size
        return int(self._page_bytes * blocks)

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """Any will do."""
        return [KVCacheLayout.LBNHC.name]

    def set_kv_cache_layout(self, name: str) -> None:
        """Take note of nothing: there is no cache."""

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        """Learn how many blocks there are."""
        (layout,) = kv_cache_configs
        scheduler = self.config.scheduler_config
        block_size = layout.kv_cache_groups[0].kv_cache_spec.block_size
        if self.settings.check:
            limits = Limits(
                scheduler.max_num_seqs, scheduler.max_num_batched_tokens, block_size, layout.num_blocks
            )
            self.checker = Checker(limits, v2=self._v2, asynchronous=scheduler.async_scheduling)
        if self.config.kv_transfer_config is not None:
            kv = self.checker.kv if self.checker is not None else None
            preset = self.settings.preset
            block_s = block_size * preset.kv_bytes / preset.link_bandwidth
            self._connector = Connector(self.config, layout, kv, block_s)

    def get_kv_connector_handshake_metadata(self) -> None:
        """No other engine to shake hands with."""

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Nothing to compile."""
        return CompilationTimes(0.0, 0.0)

    def update_max_model_len(self, max_model_len: int) -> None:
        """Take note of nothing: positions are not bounded here."""

    def get_supported_tasks(self) -> tuple[str, ...]:
        """Text goes in and out."""
        return ("generate",)

    # Every step

    def execute_model(self, scheduler_output: Any) -> ModelRunnerOutput | None:
        """Begin a step: None, its tokens come from `sample_tokens`; the empty output if nothing is scheduled.

        Raises:
            ProtocolViolationError: with the checker on, if the scheduler broke a rule.
        """
        drafts = self._tried(scheduler_output.scheduled_spec_decode_tokens)
        if self._connector is not None:
            self._connector.before(scheduler_output)
        if self.checker is not None:
            self.checker.observe(scheduler_output, drafts)
        step = self._runner.step(scheduler_output, drafts)
        if self._connector is not None:
            self._transfers = self._connector.after(scheduler_output)
        if not step.samples:
            if self._transfers is not None:
                return ModelRunnerOutput.with_kv_conn_output_only(self._transfers)
            return EMPTY_MODEL_RUNNER_OUTPUT
        begins = max(time.monotonic(), self._free_at)
        self._free_at = begins + self.settings.preset.step_s(step.work)
        self._step = step
        return None

    def sample_tokens(self, grammar_output: Any | None) -> Pending:
        """The tokens of the step begun last, to be had when the device has finished it."""
        step, self._step = self._step, None
        assert step is not None, "sample_tokens without execute_model"
        allowed = _allowed(grammar_output, step.samples)
        tokens = {
            name: [] if sample is None else self._say(sample, allowed.get(name))
            for name, sample in step.samples.items()
        }
        self._runner.sampled(tokens)
        if self.checker is not None:
            self.checker.sampled(tokens)
        if self.config.num_speculative_tokens:
            self._note_drafts(step, tokens)
        output = ModelRunnerOutput(
            req_ids=list(tokens),
            req_id_to_index={name: index for index, name in enumerate(tokens)},
            sampled_token_ids=list(tokens.values()),
            kv_connector_output=self._transfers,
        )
        return Pending(output, self._free_at)

    def _say(self, sample: Sample, allowed: "np.ndarray[Any, Any] | None") -> list[int]:
        """The next token, and one more after each draft that was right."""
        if allowed is not None:  # within a grammar no draft is believed: rejecting is always in order
            return [int(allowed[draw(sample.seed, sample.position) % len(allowed)])]
        said = [self._vocabulary.token(sample.seed, sample.position)]
        for draft in sample.drafts:
            if draft != said[-1]:
                break
            said.append(self._vocabulary.token(sample.seed, sample.position + len(said)))
        return said

    def _note_drafts(self, step: Step, tokens: Mapping[str, list[int]]) -> None:
        kept = self._drafts if self._v2 else {}
        self._drafts = {name: drafts for name, drafts in kept.items() if self._runner.knows(name)}
        for name, sample in step.samples.items():
            self._drafts[name] = self._guess(sample, len(tokens[name])) if sample is not None else []

    def _guess(self, sample: Sample, said: int) -> list[int]:
        return [
            self._vocabulary.draft(sample.seed, sample.position + said + place)
            for place in range(self.config.num_speculative_tokens)
        ]

    def _tried(self, scheduled: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """The drafts of a step: an async scheduler names only how many, and the device has them; -1 is none."""
        if not self.config.scheduler_config.async_scheduling:
            return dict(scheduled)
        guessed = {name: [*self._drafts.get(name, []), *places] for name, places in scheduled.items()}
        return {name: guessed[name][: len(places)] for name, places in scheduled.items()}

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """The drafts behind the step sampled last."""
        if not self.config.num_speculative_tokens:
            return None
        return DraftTokenIds(list(self._drafts), [list(drafts) for drafts in self._drafts.values()])

    def execute_dummy_batch(self) -> None:
        """Run an empty step, as data-parallel ranks do for one another."""
        time.sleep(self.settings.preset.overhead_s)

    # Rarely

    def add_lora(self, lora_request: Any) -> bool:
        """Adapters change nothing that is said; the checker keeps their KV apart."""
        del lora_request
        return True

    def remove_lora(self, lora_id: int) -> bool:
        """As `add_lora`."""
        del lora_id
        return True

    pin_lora = remove_lora

    def list_loras(self) -> set[int]:
        """Adapters are not kept."""
        return set()

    def reset_mm_cache(self) -> None:
        """No multi-modal inputs."""

    reset_encoder_cache = reset_mm_cache
    synchronize_device = reset_mm_cache

    def sleep(self, level: int = 1) -> None:
        """Lose what the KV cache holds."""
        del level
        if self.checker is not None:
            self.checker.forget_kv()

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Be there again."""

    def shutdown(self) -> None:
        """Nothing to give back."""


def _ends(model: Any) -> frozenset[int]:
    """The ids that end a sequence, by the model's configuration."""
    ends = getattr(model.hf_config, "eos_token_id", None)
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _allowed(grammar: Any | None, samples: Mapping[str, Sample | None]) -> "dict[str, np.ndarray[Any, Any]]":
    """Per request with structured output: the ids that its grammar allows next."""
    if grammar is None:
        return {}
    rows = np.unpackbits(grammar.grammar_bitmask.view(np.uint8), axis=1, bitorder="little")
    allowed = {}
    index = 0
    for name in grammar.structured_output_request_ids:
        allowed[name] = np.flatnonzero(rows[index])
        sample = samples[name]
        index += 1 + (len(sample.drafts) if sample is not None else 0)
    return allowed
