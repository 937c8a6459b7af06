"""A real EngineCore on the simulated device, or on a real one, in this process, one step at a time."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from coxswain.schemas import events as ev
from coxswain.schemas.commands import COMMANDS, Targets
from coxswain.schemas.policy import Epoch
from coxswain.schemas.subjects import OPERATOR
from coxswain.service.port import CommandIn, ReplyOut
from coxswain.service.simulated.settings import EXECUTOR

STEERED = "coxswain.service.scheduler.SteeredScheduler"
KEY = "5e" * 32
"""Signs request ids, so that they can name tenants and classes."""


class Engine:
    """EngineCore, stepped by hand, what its requests have said, and what the device computed for them."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.steps = 0
        self.outputs: dict[str, list[int]] = {}
        self.pooled: dict[str, Any] = {}
        """What a pooling model made of each: tensors."""
        self.finished: dict[str, str] = {}
        """Why each ended, as its client was told."""
        self.replies: list[Any] = []
        self.computed: Counter[str] = Counter()
        """Positions that the device computed, each as often as it did."""
        self.scheduled: dict[str, int] = {}
        """What the last step computed."""
        self._cached: dict[Any, list[int | None]] = {}
        """What a key of the prefix cache stands for."""
        self.cut_short = 0
        """How often `compat.allocation` answered in vLLM's place."""
        self._commands = 0
        self._watch(core.model_executor.driver_worker)
        if hasattr(core.scheduler, "mechanism"):
            self._check_allocation(core.scheduler.kv_cache_manager, core.scheduler.mechanism)

    @property
    def scheduler(self) -> Any:
        """The scheduler under test."""
        return self.core.scheduler

    @property
    def checker(self) -> Any:
        """The checker of the simulated device; a real one has none."""
        return getattr(self.core.model_executor.driver_worker, "checker", None)

    def _watch(self, worker: Any) -> None:
        execute = worker.execute_model

        def execute_model(output: Any) -> Any:
            self.scheduled = dict(output.num_scheduled_tokens)
            self.computed.update(self.scheduled)
            return execute(output)

        worker.execute_model = execute_model

    def _check_allocation(self, manager: Any, mechanism: Any) -> None:
        """Where `compat.allocation` answers in vLLM's place: vLLM would say the same, and change nothing."""
        from coxswain.service.scheduler import compat

        its, asked = type(manager).allocate_slots, []

        def vllms(request: Any, *args: Any, **kwargs: Any) -> Any:
            asked.append(request)
            return its(manager, request, *args, **kwargs)

        manager.allocate_slots = vllms
        ours = compat.allocation(manager)

        def state(request: Any) -> tuple[Any, ...]:
            (group,), pool = manager.coordinator.single_type_managers, manager.block_pool
            table = [block.block_id for block in group.req_to_blocks.get(request.request_id, ())]
            cached, free = group.num_cached_block.get(request.request_id), pool.get_num_free_blocks()
            return table, cached, free, len(pool.cached_block_hash_to_block), len(group.new_block_ids)

        def allocate_slots(request: Any, *args: Any, **kwargs: Any) -> Any:
            before = state(request)
            blocks = ours(request, *args, **kwargs)
            if not asked:
                self.cut_short += 1
                assert state(request) == before
                assert vllms(request, *args, **kwargs) is blocks
                assert state(request) == before
            asked.clear()
            return blocks

        mechanism._allocate = manager.allocate_slots = allocate_slots

    def forget(self) -> None:
        """Begin anew: nothing must be left of what was."""
        self.check_empty()
        for memory in (self.outputs, self.pooled, self.finished, self.replies, self.computed):
            memory.clear()

    def events(self) -> list[tuple[Any, type[ev.Event], dict[str, Any]]]:
        """From now on: every event as (record, kind, fields), in the list that is returned."""
        heard: list[tuple[Any, type[ev.Event], dict[str, Any]]] = []
        self.scheduler.core.emit = lambda _now, record, kind, fields: heard.append((record, kind, fields))
        return heard

    def add(self, name: str, prompt: list[int], tokens: int, *, params: Any = None, **fields: Any) -> None:
        """Add a request that says exactly so many tokens, or as its sampling parameters say."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        request = Request(
            request_id=name,
            prompt_token_ids=list(prompt),
            sampling_params=params or SamplingParams(max_tokens=tokens, ignore_eos=True),
            pooling_params=None,
            block_hasher=self.core.request_block_hasher,
            **fields,
        )
        if request.use_structured_output:
            self.core.structured_output_manager.grammar_init(request)
            futures.wait([request.structured_output_request._grammar])  # a seed does the same everywhere
        self.core.add_request(request)

    def command(
        self, verb: str, *requests: str, role: str = OPERATOR, epoch: Epoch | None = None, **fields: Any
    ) -> None:
        """Put a command where the bus would put it: it is in force before the next step."""
        self._commands += 1
        if requests:
            fields["targets"] = Targets(requests=requests)
        command = COMMANDS[verb](id=f"c{self._commands}-{verb}", epoch=epoch, **fields)
        assert self.scheduler.port.offer(CommandIn(role, verb, command, (), None))

    def told(self, verb: str, *requests: str, **fields: Any) -> Any:
        """Send a command, take the step that applies it, and return the reply."""
        before = len(self.replies)
        self.command(verb, *requests, **fields)
        self.step()
        assert len(self.replies) > before
        return self.replies[-1]

    def step(self) -> bool:
        """One turn of EngineCore's loop; False if it had nothing to do."""
        busy = self.scheduler.has_requests() or bool(self.core.batch_queue)
        if busy:
            outputs, executed = self.core.step_fn()
            self.core.post_step(executed)
            self.steps += 1
            for part in (outputs or {}).values():
                self._note(part.outputs)
        port = getattr(self.scheduler, "port", None)
        if port is not None:
            self.replies += [item.reply for item in port.collect() if isinstance(item, ReplyOut)]
        return busy

    def _note(self, outputs: list[Any]) -> None:
        for item in outputs:
            self.outputs.setdefault(item.request_id, []).extend(item.new_token_ids)
            if item.pooling_output is not None:
                self.pooled[item.request_id] = item.pooling_output
            if item.finish_reason is not None:
                self.finished[item.request_id] = str(item.finish_reason)

    def run(self, most: int = 20_000) -> None:
        """Step until there is nothing to do."""
        self.until(lambda: False, most)

    def until(self, condition: Callable[[], bool], most: int = 20_000) -> None:
        """Step until the condition holds or there is nothing to do."""
        for _ in range(most):
            if condition() or not self.step():
                return
        raise AssertionError(f"still busy after {most} steps")

    def until_said(self, name: str, tokens: int) -> None:
        """Step until a request's client has so many tokens."""
        self.until(lambda: self.said(name) >= tokens)
        assert self.said(name) >= tokens

    def said(self, name: str) -> int:
        """How many tokens a request's client has."""
        return len(self.outputs.get(name, []))

    def check_blocks(self) -> None:
        """Every block in use is in a live request's table, as often as it is counted."""
        manager = self.scheduler.kv_cache_manager
        tables = manager.coordinator.single_type_managers[0].req_to_blocks
        assert {name for name, blocks in tables.items() if blocks} <= self.scheduler.requests.keys()
        used = Counter(block.block_id for blocks in tables.values() for block in blocks)
        # With a connector, blocks go back to the pool when the steps that may write them have ended.
        used.update(block.block_id for _, blocks in self.scheduler.deferred_frees for block in blocks)
        pool = manager.block_pool
        counted = {b.block_id: b.ref_cnt for b in pool.blocks if b.ref_cnt and not b.is_null}
        assert counted == used
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1 - len(used)

    def check_prefix_cache(self) -> None:
        """Between two steps: whatever the prefix cache offers was computed, of the tokens that its key stands for."""
        pool = self.scheduler.kv_cache_manager.block_pool
        for block in pool.blocks:
            if block.block_hash is not None:
                cells = self.checker.kv.cells(block.block_id)
                assert None not in cells, f"{block} is offered, and was not computed"
                assert self._cached.setdefault(block.block_hash, cells) == cells, (
                    f"{block} holds other tokens"
                )

    def check_empty(self) -> None:
        """No request, queue entry, slot or block is left, anywhere."""
        scheduler = self.scheduler
        assert not scheduler.requests
        assert not scheduler.running
        assert not len(scheduler.waiting)
        assert not len(scheduler.kv_holding_waiting)
        assert not scheduler.deferred_waiting
        assert not scheduler._inflight_prefills
        assert scheduler.num_waiting_for_streaming_input == 0
        assert scheduler.kv_cache_manager.usage == 0
        self.check_blocks()
        if self.checker is not None and self.checker.v2:
            assert self.checker.slots == 0
        if hasattr(scheduler, "core"):
            scheduler.core.validate()
            assert not scheduler.core.roster.records
            assert not scheduler.core.queue
            assert not scheduler._loads
            assert scheduler.max_num_active_reqs == scheduler.mechanism._active
            assert scheduler.kv_cache_manager.allocate_slots == scheduler.mechanism._allocate


@contextmanager
def engine(
    folder: Path,
    *,
    v2: bool,
    asynchronous: bool,
    scheduler: str | None = STEERED,
    preset: str = "instant",
    model: str | None = None,
    executor: str = EXECUTOR,
    **options: Any,
) -> Iterator[Engine]:
    """An engine, on the simulated device with its checker on unless told otherwise; `options` are vLLM's arguments."""
    from vllm import envs
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.abstract import Executor

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4_000,
        "max_position_embeddings": 4_096, "eos_token_id": 2, "torch_dtype": "float32",
    }  # fmt: skip
    if model is None:
        (folder / "config.json").write_text(json.dumps(config))
    env = {
        "COX_SIM_PRESET": preset,
        "COX_SIM_CHECK": "1",
        "COX_IDENTITY_KEY": KEY,
        "VLLM_USE_V2_MODEL_RUNNER": str(int(v2)),
    }
    defaults: dict[str, Any] = {
        "max_model_len": 288, "max_num_seqs": 8, "max_num_active_seqs": 5, "max_num_batched_tokens": 96,
        "block_size": 16, "num_gpu_blocks_override": 48,
    }  # fmt: skip
    # Commands are not put off on a slow machine: what a seed does is the same everywhere.
    patient = patch("coxswain.service.scheduler.inbox.DRAIN_S", float("inf"))
    with patch.dict(os.environ, env), patient:
        os.environ.pop("COX_NATS_URL", None)
        arguments = EngineArgs(
            model=model or str(folder), skip_tokenizer_init=model is None, async_scheduling=asynchronous,
            scheduler_cls=scheduler, distributed_executor_backend=executor, **{**defaults, **options},
        )  # fmt: skip
        vllm_config = arguments.create_engine_config()
        assert vllm_config.use_v2_model_runner is v2
        assert vllm_config.scheduler_config.async_scheduling is asynchronous
        core = EngineCore(vllm_config, Executor.get_class(vllm_config), log_stats=False)
        envs.disable_envs_cache()  # EngineCore fixes them; the next engine has others
        try:
            yield Engine(core)
        finally:
            core.shutdown()
