"""Everything that depends on a vLLM version, in one place.

Reference: 0.32.0. Another version is refused at start with a clear message, unless `COX_ALLOW_VLLM` names it.
Private things of vLLM that are touched anywhere in `service/scheduler` are listed in `PRIVATE` with where they
are, and a test checks that they still exist.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
import vllm
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequestType, FinishReason
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.request import RequestStatus

from coxswain.service.config import SettingRefusedError

TESTED: Final = ("0.32.0",)

PRIVATE: Final = {
    "vllm.v1.core.sched.scheduler:Scheduler": (
        "_preempt_request", "_free_request", "_enqueue_waiting_request", "_update_request_as_session",
        "_handle_stopped_request", "_handle_blocked_waiting_request", "finish_requests",
        "has_requests", "has_finished_requests", "reset_prefix_cache", "get_request_counts",
        "_request_blocks_can_be_freed", "_reserve_prefill_lookahead", "_handle_invalid_blocks",
    ),
    "vllm.v1.core.kv_cache_manager:KVCacheManager": (
        "allocate_slots", "get_blocks", "get_computed_blocks", "empty_kv_cache_blocks",
    ),
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager": (
        "req_to_blocks", "num_cached_block", "block_size", "enable_caching",
    ),
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator": ("get_num_blocks_to_allocate",),
    "vllm.v1.core.block_pool:BlockPool": ("evict_blocks", "get_num_free_blocks"),
    "vllm.v1.engine.core:EngineCoreProc": (
        "_send_abort_outputs", "_process_input_queue", "run_engine_core", "preprocess_add_request",
    ),
    "vllm.v1.core.sched.request_queue:RequestQueue": (
        "add_request", "pop_request", "peek_request", "prepend_request", "prepend_requests", "remove_request",
        "remove_requests",
    ),
}  # fmt: skip
"""What we override or call that vLLM does not promise to keep."""


_REASONS: Final = {
    status: str(reason)
    for status in RequestStatus
    if (reason := RequestStatus.get_finished_reason(status)) is not None  # `stop` is 0
}


class UnknownVllmError(RuntimeError):
    """This vLLM was not tested with this scheduler."""


def version() -> str:
    """vLLM's version without the local part (`0.32.0+cpu` is `0.32.0`)."""
    return str(vllm.__version__).partition("+")[0]


def check_version(env: Mapping[str, str]) -> None:
    """Refuse a vLLM that was not tested.

    Raises:
        UnknownVllmError: unless `COX_ALLOW_VLLM` names this version.
    """
    found = version()
    if found not in TESTED and found != env.get("COX_ALLOW_VLLM"):
        raise UnknownVllmError(
            f"vLLM {found} was not tested with this scheduler (tested: {', '.join(TESTED)}). Install a tested "
            f"version, or set COX_ALLOW_VLLM={found} to run it all the same.",
        )


def check_mode(config: Any) -> None:
    """Refuse a mode of vLLM in which steering has been seen to fail.

    A pipeline on the V1 runner has several steps in flight without asynchronous scheduling. vLLM schedules it with
    its plain Scheduler, not with AsyncScheduler, which ours extends: the first stage dies of a token that has not
    come out of the last. With that mended, other tokens came out on two H200s once requests had lost their KV.

    A pooling model samples nothing, so neither concerns it.

    Raises:
        SettingRefusedError: for a pipeline that generates without asynchronous scheduling.
    """
    staged = (
        config.parallel_config.pipeline_parallel_size > 1 and config.model_config.runner_type != "pooling"
    )
    if staged and not config.scheduler_config.async_scheduling:
        raise SettingRefusedError(
            "pipeline parallelism is steered with asynchronous scheduling only, which vLLM turns off for its V1 model"
            " runner and for most kinds of drafts: leave them out, or use tensor parallelism"
        )


def find_engine() -> Any | None:
    """The EngineCore process object that is constructing the scheduler, or None (offline, in-process engine).

    vLLM gives a scheduler no reference to its engine; the engine's constructor is on the call stack, whatever
    the deployment (local process, Ray, data parallel).
    """
    frame = inspect.currentframe()
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if candidate is not None and hasattr(candidate, "input_queue") and hasattr(candidate, "output_queue"):
            return candidate
        frame = frame.f_back
    return None


def data_parallel_size(parallel: Any) -> int:
    """How many data parallel ranks there are, or 2 where only that there are several can be known.

    vLLM makes the ranks of a dense model forget each other before it makes their schedulers
    (ParallelConfig.reconfigure_for_independent_dp_rank); rank 0 then looks like an engine that is alone. The
    function that started its process remembers.
    """
    size = max(parallel.data_parallel_size, parallel.data_parallel_index + 1)
    frame = inspect.currentframe()
    while frame is not None and size == 1:
        if frame.f_code.co_name == "run_engine_core" and frame.f_locals.get("data_parallel"):
            size = 2
        frame = frame.f_back
    return int(size)


def wake(engine: Any) -> None:
    """Wake an engine that blocks on its input queue; may be called from any thread."""
    engine.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))


def meet(engine: Any | None, told: Callable[[Any], None]) -> None:
    """Have `told` called with each request that vLLM makes, on the thread that reads the engine's sockets.

    That is before the scheduler gets it, and beside the step. An engine in its caller's process is not found
    (`find_engine`), and one that does not make its requests so tells nothing: `add_request` must do without.
    """
    made = getattr(engine, "preprocess_add_request", None)
    if engine is None or made is None:
        return

    def preprocess_add_request(*args: Any, **kwargs: Any) -> Any:
        result = made(*args, **kwargs)
        told(result[0])
        return result

    engine.preprocess_add_request = preprocess_add_request


def stops(engine: Any | None) -> bool:
    """Whether the engine has been asked to shut down (it serves on for `--shutdown-timeout`)."""
    return bool(getattr(engine, "shutdown_state", 0))


def send_aborts(engine: Any | None, requests: list[Any]) -> None:
    """Tell the clients of aborted requests; `finish_requests` alone answers nobody."""
    if engine is None:
        return
    if generating := [request for request in requests if request.pooling_params is None]:
        engine._send_abort_outputs(generating)  # noqa: SLF001
    for request in requests:
        if request.pooling_params is not None:
            # vLLM's own lack an output by which its front end knows what it is about: that fails, for all and for good
            # (OutputProcessor.process_outputs; its abort_requests makes the same empty one).
            output = EngineCoreOutput(
                request.request_id, [], pooling_output=torch.empty(0), finish_reason=FinishReason.ABORT
            )
            told = EngineCoreOutputs(finished_requests={request.request_id}, outputs=[output])
            engine.output_queue.put_nowait((request.client_index, told))


def ready(scheduler: Any, request: Any) -> bool:
    """Whether the admission loop of vLLM would take this waiting request rather than skip it."""
    if request.num_stale_output_tokens and not request.drop_stale_output:
        return False
    if request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
        structured = request.structured_output_request
        if structured is None or structured.grammar is None or isinstance(structured.grammar, Exception):
            return False
    elif not may_run(request):
        return False
    if request.lora_request is None or scheduler.lora_config is None:
        return True
    loras = {r.lora_request.lora_int_id for r in scheduler.running if r.lora_request}
    return len(loras) < scheduler.lora_config.max_loras or request.lora_request.lora_int_id in loras


def allocation(manager: Any) -> Callable[..., Any]:
    """vLLM's `allocate_slots`, but for the answer that it gives most often: nothing to do.

    A running request whose new tokens fit into the blocks that it has, without filling the last, gets no block and
    enters none into the prefix cache. vLLM finds that out in a dozen calls, once per request and step, which is a third
    of what its scheduler costs; three comparisons do. Whatever else is asked is vLLM's to answer, and so is everything
    for models with more than full attention, whose steps also free blocks, and in a version that was not tested.
    """
    allocate: Callable[..., Any] = manager.allocate_slots
    if version() not in TESTED or not _is_full_attention(manager):
        return allocate
    group, nothing = manager.coordinator.single_type_managers[0], manager.empty_kv_cache_blocks
    blocks, cached = group.req_to_blocks, group.num_cached_block
    size, caches = group.block_size, group.enable_caching
    running = RequestStatus.RUNNING

    def allocate_slots(
        request: Any, num_new_tokens: int, *, num_lookahead_tokens: int = 0, **others: Any
    ) -> Any:
        name, end = request.request_id, request.num_computed_tokens + num_new_tokens
        if (
            end + num_lookahead_tokens <= len(blocks.get(name, ())) * size
            and (not caches or end < (cached.get(name, -1) + 1) * size)
            and request.status is running
            and num_new_tokens
            and not others
        ):
            return nothing
        return allocate(request, num_new_tokens, num_lookahead_tokens=num_lookahead_tokens, **others)

    return allocate_slots


def _is_full_attention(manager: Any) -> bool:
    """Whether blocks stay until their request ends: exactly these classes, for a plugin's own may do more."""
    from vllm.v1.core import kv_cache_coordinator as coordinators
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    known = (coordinators.UnitaryKVCacheCoordinator, coordinators.KVCacheCoordinatorNoPrefixCache)
    groups = manager.coordinator.single_type_managers
    return (
        type(manager) is KVCacheManager
        and type(manager.coordinator) in known
        and [type(group) for group in groups] == [FullAttentionManager]
    )


def blocks_needed(scheduler: Any, request: Any, enough: int) -> int:
    """KV blocks that admitting a waiting request takes (`KVCacheManager.allocate_slots` with the whole input).

    Where a bound without the prefix cache is within `enough`, that bound: it needs no look-up.
    """
    manager = scheduler.kv_cache_manager
    coordinator = manager.coordinator
    tokens = min(request.num_tokens, scheduler.max_model_len)
    watermark = manager.watermark_blocks if scheduler.running else 0
    most = watermark + sum(-(-tokens // group.block_size) for group in coordinator.single_type_managers)
    if most <= enough:
        return int(most)
    computed, blocks = request.num_computed_tokens, manager.empty_kv_cache_blocks
    if not computed:
        blocks, computed = manager.get_computed_blocks(request)[:2]
    return int(watermark) + int(
        coordinator.get_num_blocks_to_allocate(
            request_id=request.request_id, num_tokens=tokens, new_computed_blocks=blocks.blocks, num_encoder_tokens=0,
            total_computed_tokens=computed, num_local_computed_tokens=computed, num_tokens_main_model=tokens,
            apply_admission_cap=True, prefill_end=max(request.num_prompt_tokens, request.num_tokens - 1),
        )
    )  # fmt: skip


def take_back(scheduler: Any, request: Any) -> None:
    """Take out of the prefix cache what a request, about to be preempted, was to compute in this very step.

    `allocate_slots` enters full blocks as it allocates them. Where vLLM chooses victims by priority, one may have had
    its chunk before somebody behind it ran out of blocks; vLLM takes the tokens back and leaves the entries
    (Scheduler.schedule, the PRIORITY branch), so whoever has the prefix next attends to KV that nobody wrote. Stock
    vLLM does it too, with `--scheduling-policy priority`; by `fcfs` the victim is the last, which has had nothing yet.

    What earlier steps have in flight counts as computed, and is: nothing of it is taken out, nor of what it shares.
    """
    manager = scheduler.kv_cache_manager
    groups = manager.coordinator.single_type_managers
    for group, blocks in zip(groups, manager.get_blocks(request.request_id).blocks, strict=True):
        scheduled = blocks[request.num_computed_tokens // group.block_size :]
        group.block_pool.evict_blocks({block.block_id for block in scheduled if block.block_hash is not None})


def can_take_back(scheduler: Any) -> bool:
    """Whether blocks of attention are all that a scheduled chunk leaves behind.

    Inputs of an encoder count as encoded for whoever comes later in the step, and Mamba's states are copied and
    offered to connectors: vLLM takes neither back.
    """
    groups = scheduler.kv_cache_config.kv_cache_groups
    return not scheduler.vllm_config.model_config.supports_multimodal_inputs and all(
        isinstance(group.kv_cache_spec, AttentionSpec) for group in groups
    )


def may_run(request: Any) -> bool:
    """Whether a waiting request waits for nothing but its turn."""
    return request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)


def expected_cached_tokens(request: Any) -> int:
    """Input tokens that the admission at hand found in the prefix cache or a KV connector."""
    stats = request.prefill_stats
    return stats.num_local_cached_tokens + stats.num_external_cached_tokens if stats is not None else 0


def watch_connector(scheduler: Any) -> dict[str, int]:
    """Stand between a scheduler and its KV connector, if it has one, for three things.

    Returns:
        How many positions were there before those that the connector loads, by request that it loads for; whoever
        reads an entry takes it out. What is loaded is known when the request runs: a load can fail. vLLM itself
        keeps the number for a request's first admission only.

    A request that lost its KV since the last step waits for the next one: OffloadingConnector takes a load that
    begins in the step that reports the preemption for one that it must flush, and asserts
    (offloading/scheduler.py:1862). vLLM never resumes a preempted request in the same step; drop and continue may.

    A connector that cannot load for a request that lost its KV is not asked to: it is computed again.
    """
    loads: dict[str, int] = {}
    connector = scheduler.connector
    if connector is None:
        return loads
    told, asked = connector.update_state_after_alloc, connector.get_num_new_matched_tokens
    resumes, before = not _cannot_resume(connector), 0

    def update_state_after_alloc(request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            loads[request.request_id] = before
        told(request, blocks, num_external_tokens)

    def get_num_new_matched_tokens(request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        nonlocal before
        loads.pop(request.request_id, None)
        if request.request_id in scheduler.reset_preempted_req_ids:
            return None, False  # "ask again": the scheduler skips it in this step
        if request.num_preemptions and not resumes:
            return 0, False
        before = num_computed_tokens
        found: tuple[int | None, bool] = asked(request, num_computed_tokens)
        return found

    connector.update_state_after_alloc = update_state_after_alloc
    connector.get_num_new_matched_tokens = get_num_new_matched_tokens
    return loads


def _cannot_resume(connector: Any) -> bool:
    """Whether it, or one of several in a MultiConnector, cannot load for a request that lost its KV.

    ExampleConnector looks for a file of prompt and output, and stores prompts only (example_connector.py:369); the
    worker dies of the file that is not there, of vLLM's own preemptions too.
    """
    parts = getattr(connector, "_connectors", ())
    return any(kind.__name__ == "ExampleConnector" for kind in type(connector).__mro__) or any(
        map(_cannot_resume, parts)
    )


def rejected_drafts(requests: Mapping[str, Any], scheduled: Any, result: Any) -> Iterator[tuple[Any, int]]:
    """Requests of a step's output with how many of their drafts the model rejected.

    Those that Scheduler.update_from_output is about to take off `num_computed_tokens`: not those of a step that
    was under way when the request lost its KV.
    """
    for request_id, drafts in scheduled.scheduled_spec_decode_tokens.items():
        request = requests.get(request_id)
        if request is None or request.is_finished() or request.num_stale_output_tokens:
            continue
        sampled = result.sampled_token_ids[result.req_id_to_index[request_id]]
        if sampled:
            yield request, len(drafts) + 1 - len(sampled)


def finish_reason(request: Any) -> str:
    """vLLM's word for how the request ended: `stop`, `length`, `abort`, `error`, `repetition`."""
    return _REASONS.get(request.status, "unknown")


def settings(config: Any) -> dict[str, str | int | float | bool | None]:
    """vLLM's settings that matter to steering, for `query config`."""
    scheduler, cache = config.scheduler_config, config.cache_config
    return {
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_active_seqs": scheduler.max_num_active_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "max_model_len": config.model_config.max_model_len,
        "async_scheduling": scheduler.async_scheduling,
        "enable_chunked_prefill": scheduler.enable_chunked_prefill,
        "enable_prefix_caching": cache.enable_prefix_caching,
        "block_size": cache.block_size,
        "model_runner": "v2" if config.use_v2_model_runner else "v1",
        "kv_connector": config.kv_transfer_config.kv_connector if config.kv_transfer_config else None,
        "lora": config.lora_config is not None,
        "speculative_tokens": config.num_speculative_tokens,
        "shutdown_timeout_s": config.shutdown_timeout,
        "api_servers": config.parallel_config._api_process_count,  # noqa: SLF001 - no public name for it
        "python": sys.version.split()[0],
    }
