"""An engine in this process's children: made for a GPU or for a dry run, asked, and brought to rest.

Called by `host`, `identity` and `trial`. vLLM is imported inside the functions, and torch is never used here: an engine
is forked from this process, and one forked from a process that has used torch hangs.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bench.gpu import wire
from bench.gpu.plan import STEERED, Mode

IDLE_S = 60.0
STEERED_SCHEDULER = "coxswain.service.scheduler.SteeredScheduler"


def make(model: Path, *, scheduler: str, mode: Mode, **options: Any) -> Any:
    """An AsyncLLM; unless told otherwise without prefix caching, so that every token is computed."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    if mode is Mode.GPU:
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
    usual = {"skip_tokenizer_init": True, "enable_prefix_caching": False, "disable_log_stats": True}
    arguments = AsyncEngineArgs(model=str(model), scheduler_cls=scheduler, **(usual | options))
    return AsyncLLM.from_engine_args(arguments)


@asynccontextmanager
async def steered(
    worker: str,
    model: Path,
    mode: Mode,
    *,
    ranks: int = 1,
    scheduler: str = STEERED_SCHEDULER,
    **options: Any,
) -> AsyncIterator[tuple[Any, wire.Wire]]:
    """A steered engine of this name and who commands it, both classes configured; it is shut down at the end.

    Of more than one data parallel `ranks` each is a worker of its own.
    """
    async with wire.server_at_hand() as url:
        os.environ.update(wire.environment(worker, url))
        if ranks > 1:
            options["data_parallel_size"] = ranks
        llm = make(model, scheduler=scheduler, mode=mode, **options)
        try:
            async with await wire.connect() as client:
                send = wire.Wire(client, *wire.workers(worker, ranks))
                await send.ready()
                await send.classes()
                yield llm, send
        finally:
            llm.shutdown()


def make_8b(model: Path, side: str, *, kv_bytes: int, mode: Mode, graphs: int = 0, **more: Any) -> Any:
    """The engine of one side: 8B shape on the GPU, or on the simulated device.

    `graphs`: CUDA graphs for steps of up to so many tokens; 0 leaves it to vLLM, which stops at 512. `more`: what
    else the engine is told.
    """
    sizes = mode.sizes
    options: dict[str, Any] = {
        "load_format": "dummy", "max_model_len": sizes.max_model_len, "max_num_batched_tokens": sizes.batched_tokens,
        "max_num_seqs": sizes.slots[1] + sizes.spare, "max_num_active_seqs": sizes.slots[1],
    }  # fmt: skip
    if mode is not Mode.GPU:
        options |= simulated(check=mode is Mode.DRY)
    else:
        # Given, not measured: other engines of this run take and free memory at the same time. The share
        # that vLLM checks at start is then only a lower bound on what must be free.
        options |= {"kv_cache_memory_bytes": kv_bytes, "gpu_memory_utilization": 0.3}
        if graphs:
            usual = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))
            captured = [*usual, *range(640, graphs + 1, 128)]
            options["compilation_config"] = {"cudagraph_capture_sizes": captured}
    stock = "Stock" if more.get("async_scheduling", True) else "StockSynchronous"
    scheduler = f"bench.gpu.schedulers.{'Steered' if side == STEERED else stock}"
    return make(model, scheduler=scheduler, mode=mode, **(options | more))


def simulated(*, check: bool) -> dict[str, Any]:
    """The engine's options for the simulated device; sets this process's environment for it."""
    from coxswain.service.simulated.settings import EXECUTOR

    os.environ.update(
        COX_SIM_PRESET="h200-8b",
        COX_SIM_CHECK=str(int(check)),
        VLLM_USE_V2_MODEL_RUNNER="1",
        VLLM_WORKER_MULTIPROC_METHOD="fork",
    )
    return {"distributed_executor_backend": EXECUTOR, "block_size": 16, "num_gpu_blocks_override": 20_000}


async def ask(llm: Any, what: str, value: Any = None) -> Any:
    """Call `bench.gpu.schedulers.bench` in the engine."""
    return await llm.engine_core.call_utility_async("bench", what, value)


async def at_rest(llm: Any) -> None:
    """Wait until the scheduler knows of no request.

    Raises:
        TimeoutError: some are still there after a minute.
    """
    async with asyncio.timeout(IDLE_S):
        while await ask(llm, "requests"):  # noqa: ASYNC110 - the engine is another process
            await asyncio.sleep(0.05)
