"""How long a step takes: the larger of memory time and compute time, plus a fixed overhead.

Pure arithmetic, no clock. Called by `device`. The model is the roofline of Williams, Waterman and Patterson
(CACM 52(4), 2009) applied to a decoder: a step reads all weights once and the KV of every context it attends
to, and multiplies every scheduled token with every weight.

    memory_s  = (weight bytes + KV bytes per token × (context tokens + scheduled tokens)) ÷ usable bandwidth
    compute_s = (2 × weights × scheduled tokens + attention FLOPs × query-key pairs) ÷ usable FLOP/s
    step_s    = overhead_s + max(memory_s, compute_s)

Not modelled: tile and wave quantisation, CUDA graph sizes, communication, the host falling behind.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

import msgspec


class Work(NamedTuple):
    """What one step does."""

    prefill_tokens: int = 0
    """Scheduled tokens of requests that do more than their newest token."""
    decode_tokens: int = 0
    """Scheduled tokens of requests that do only their newest token."""
    context_tokens: int = 0
    """KV entries read: the sum of context lengths after the step."""
    pairs: int = 0
    """Query-key pairs: for every scheduled token, how many positions it attends to."""

    def plus(self, scheduled: int, computed: int, *, decode: bool) -> "Work":
        """This work and that of one more request: `scheduled` tokens on top of `computed`."""
        return Work(
            self.prefill_tokens + (0 if decode else scheduled),
            self.decode_tokens + (scheduled if decode else 0),
            self.context_tokens + computed + scheduled,
            self.pairs + scheduled * computed + scheduled * (scheduled + 1) // 2,
        )


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    """One accelerator with one model. Sizes in bytes and tokens, rates per second, times in seconds."""

    weights: float
    """Parameters that every token is multiplied with (embeddings are looked up, not multiplied)."""
    weight_bytes: float
    """Bytes of those per step."""
    kv_bytes: float
    """KV bytes per token: 2 × layers × KV heads × head size × bytes per element."""
    pair_flops: float
    """FLOPs per query-key pair: 4 × layers × query heads × head size."""
    bandwidth: float
    """Usable memory bandwidth, bytes/s."""
    flops: float
    """Usable FLOP/s, dense."""
    overhead_s: float
    """Time of a step that does nothing: launches, sampling, the host's part."""
    kv_tokens: int
    """KV cache capacity in tokens."""
    link_bandwidth: float
    """Usable bandwidth to host memory, each way: for KV offloading."""
    max_num_seqs: int
    """vLLM's default of `--max-num-seqs` on such a device (EngineArgs.get_batch_defaults, 0.32.0)."""
    max_num_batched_tokens: int
    """vLLM's default of `--max-num-batched-tokens` there."""

    def step_s(self, work: Work) -> float:
        """How long the device takes for this work."""
        scheduled = work.prefill_tokens + work.decode_tokens
        memory_s = (self.weight_bytes + self.kv_bytes * (work.context_tokens + scheduled)) / self.bandwidth
        compute_s = (2 * self.weights * scheduled + self.pair_flops * work.pairs) / self.flops
        return self.overhead_s + max(memory_s, compute_s)


PRESETS: Final[Mapping[str, Preset]] = MappingProxyType(
    {
        # NVIDIA H200 SXM data sheet: 4.8 TB/s, 989 TFLOP/s BF16 dense, 141 GB. Llama 3.1 8B (config.json): 8.03e9
        # parameters less 0.53e9 of embeddings, 32 layers, 32 query and 8 KV heads of 128, BF16. The three free
        # numbers (0.80 of the bandwidth, 0.62 of the FLOP/s, 1.9 ms) are fitted to one measured run, 128 running
        # requests of 512 in and 512 out: 10.5k output tokens/s, 9.16 ms between tokens
        # (docs/results/2026-11-22-h200/overhead.json). KV: 0.85 × 141 GB less 16 GB of weights and 3 GB of rest.
        "h200-8b": Preset(
            weights=7.50e9, weight_bytes=15.0e9, kv_bytes=131_072, pair_flops=4 * 32 * 32 * 128,
            bandwidth=0.80 * 4.8e12, flops=0.62 * 989e12, overhead_s=1.9e-3,
            kv_tokens=768_000, link_bandwidth=0.80 * 64e9, max_num_seqs=1_024, max_num_batched_tokens=8_192,
        ),
        # NVIDIA A10G data sheet: 600 GB/s, 70 TFLOP/s FP16 dense, 24 GB, PCIe 4.0 x16. LLaMA 7B, of either
        # generation (config.json): 6.74e9 parameters less 0.13e9 of embeddings, 32 layers, 32 query and 32 KV heads
        # of 128, FP16. The shares of peak are the H200's, not fitted. KV: the pool of VTC's experiments on this pair,
        # 10,000 tokens (OSDI'24, section 5.1; `--num-token 10000` in its code). Its published throughput on the
        # arena trace, 777 tokens/s under FCFS, comes out at 784 (docs/lab.md).
        "a10g-7b": Preset(
            weights=6.61e9, weight_bytes=13.2e9, kv_bytes=524_288, pair_flops=4 * 32 * 32 * 128,
            bandwidth=0.80 * 600e9, flops=0.62 * 70e12, overhead_s=1.9e-3,
            kv_tokens=10_000, link_bandwidth=0.80 * 32e9, max_num_seqs=256, max_num_batched_tokens=2_048,
        ),
        # The model of `coxswain.service.tiny` on two slow cores: 4.2 ms per step whatever is in it, up to some
        # 100k prompt tokens/s. For watching the scheduler, not for predicting anything.
        "cpu": Preset(
            weights=0.5e6, weight_bytes=2.0e6, kv_bytes=1_024, pair_flops=4 * 2 * 2 * 64,
            bandwidth=5e9, flops=0.1e12, overhead_s=4.0e-3,
            kv_tokens=262_144, link_bandwidth=5e9, max_num_seqs=256, max_num_batched_tokens=2_048,
        ),
        # No time at all: for runs that ask whether the scheduler is right, not how fast it is.
        "instant": Preset(
            weights=0.0, weight_bytes=0.0, kv_bytes=0.0, pair_flops=0.0,
            bandwidth=1.0, flops=1.0, overhead_s=0.0,
            kv_tokens=262_144, link_bandwidth=1e30, max_num_seqs=256, max_num_batched_tokens=2_048,
        ),
    },
)  # fmt: skip
"""Devices that can be simulated, by name."""
