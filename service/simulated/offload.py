"""KV offloading to host memory on the simulated device: vLLM's OffloadingConnector, with what stands in for its copies.

The connector, its scheduler side and its manager are vLLM's own; only the worker that copies blocks is ours. Called
by `device`, once per step, where a model runner calls its connector (vllm/v1/worker/gpu/kv_connector.py).

Copies run beside steps and take the link's time. A store reads its blocks when it ends, a load fills its blocks when it
ends: the latest that a real one may. So a scheduler that reuses blocks too early, or runs a request before its KV is
there, loads or reads something else, and the checker says so.
"""

import time
from typing import Any, NamedTuple

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.outputs import KVConnectorOutput

from coxswain.service.simulated.kv import KvContent

CONNECTOR = "OffloadingConnector"
SPEC = "CPUOffloadingSpec"


class Copy(NamedTuple):
    """A transfer under way: device blocks and the places in host memory of each."""

    job: int
    store: bool
    blocks: list[int]
    places: list[tuple[int, int]]
    due: float
    """When it ends (monotonic s)."""


class HostMemory(OffloadingWorker):
    """Host memory behind a link: what each block held when it was stored.

    Args:
        kv: the device's KV as the checker keeps it, or None without a checker: then only time passes.
        blocks_per_chunk: device blocks per chunk of host memory.
        block_s: how long the link takes for one block.
    """

    def __init__(self, kv: KvContent | None, blocks_per_chunk: int, block_s: float) -> None:
        self._kv = kv
        self._per_chunk = blocks_per_chunk
        self._block_s = block_s
        self._free_at = {True: 0.0, False: 0.0}
        """When each direction of the link has done everything that it was given."""
        self._held: dict[tuple[int, int], list[int | None]] = {}
        self._begun: dict[int, Copy] = {}
        """Since results were last asked for: a copy never ends within the step that begins it."""
        self._flying: dict[int, Copy] = {}
        self._ended: list[int] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Begin to copy device blocks to host memory."""
        return self._submit(job_id, src_spec, dst_spec, store=True)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Begin to copy host memory to device blocks."""
        return self._submit(job_id, dst_spec, src_spec, store=False)

    def _submit(self, job: int, device: Any, host: Any, *, store: bool) -> bool:
        (first,) = device.block_indices  # one KV cache group
        blocks, chunks = np.asarray(device.block_ids).tolist(), np.asarray(host.chunk_ids).tolist()
        begin = first % self._per_chunk
        places = [
            (chunks[(begin + index) // self._per_chunk], (begin + index) % self._per_chunk)
            for index in range(len(blocks))
        ]
        due = max(time.monotonic(), self._free_at[store]) + len(blocks) * self._block_s
        self._free_at[store] = due
        self._begun[job] = Copy(job, store, blocks, places, due)
        if self._kv is not None and not store:
            self._kv.zero(blocks)
        return True

    def get_finished(self) -> list[TransferResult]:
        """Copies that have ended."""
        now = time.monotonic()
        for job in [job for job, copy in self._flying.items() if copy.due <= now]:
            self._end(self._flying.pop(job))
        self._flying |= self._begun
        self._begun = {}
        ended, self._ended = self._ended, []
        return [TransferResult(job_id=job, success=True) for job in ended]

    def wait(self, job_ids: set[int]) -> None:
        """Wait until these have ended."""
        for job in job_ids:
            copy = self._begun.pop(job, None) or self._flying.pop(job, None)
            if copy is not None:
                time.sleep(max(0.0, copy.due - time.monotonic()))
                self._end(copy)

    def _end(self, copy: Copy) -> None:
        self._ended.append(copy.job)
        if self._kv is None:
            return
        for block, place in zip(copy.blocks, copy.places, strict=True):
            if copy.store:
                self._held[place] = self._kv.cells(block)
            else:
                self._kv.fill(block, self._held[place])


class Connector:
    """The worker side of a KV connector, as a model runner calls it.

    Args:
        config: vLLM's configuration.
        kv_cache_config: vLLM's layout of the KV cache.
        kv: the checker's KV, or None.
        block_s: how long the link takes for one block.
    """

    def __init__(self, config: Any, kv_cache_config: Any, kv: KvContent | None, block_s: float) -> None:
        self._connector: Any = KVConnectorFactory.create_connector(
            config, KVConnectorRole.WORKER, kv_cache_config
        )
        worker = self._connector.connector_worker
        # Instead of `register_kv_caches`: there are no tensors to register.
        worker.worker = HostMemory(kv, worker.spec.blocks_per_chunk, block_s)

    def before(self, scheduler_output: Any) -> None:
        """Before a step: finish what must not wait, begin loads that the step needs."""
        metadata = scheduler_output.kv_connector_metadata
        self._connector.handle_preemptions(metadata)
        self._connector.bind_connector_metadata(metadata)
        if scheduler_output.has_sync_kv_loads:
            self._connector.start_load_kv(None)

    def after(self, scheduler_output: Any) -> KVConnectorOutput:
        """After a step: begin the other transfers, say which have ended."""
        connector = self._connector
        if not scheduler_output.has_sync_kv_loads:
            connector.start_load_kv(None)
        connector.wait_for_save()
        results = connector.get_transfer_results(scheduler_output.finished_req_ids)
        output = KVConnectorOutput(
            finished_sending=results.finished_sending or None,
            finished_recving=results.finished_recving or None,
            failed_recving=results.failed_recving,
            kv_connector_worker_meta=connector.build_connector_worker_meta(),
        )
        connector.clear_connector_metadata()
        return output


def obstacle(config: Any) -> str | None:
    """What of a KV transfer configuration is not simulated, or None."""
    transfer = config.kv_transfer_config
    if transfer is None:
        return None
    if transfer.kv_connector != CONNECTOR:
        return f"KV connector {transfer.kv_connector} ({CONNECTOR} is there)"
    spec = transfer.kv_connector_extra_config.get("spec_name", SPEC)
    return None if spec == SPEC else f"offloading spec {spec} ({SPEC} is there)"
