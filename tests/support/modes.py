"""Modes of vLLM for tests: engines by mode, the words of the simulated model, and how to disturb a request."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest

from coxswain.service.simulated.tokens import Vocabulary, seed_of
from tests.support.simulated import Engine, engine

V1_SYNC, V1_ASYNC, V2_SYNC, V2_ASYNC = (
    pytest.param({"v2": v2, "asynchronous": asynchronous}, id=f"{runner}-{how}")
    for runner, v2 in (("v1", False), ("v2", True))
    for how, asynchronous in (("sync", False), ("async", True))
)
MODES = pytest.mark.parametrize("mode", [V1_SYNC, V1_ASYNC, V2_SYNC, V2_ASYNC])
KV = pytest.mark.parametrize("kv", ["keep", "park", "drop"])
PROMPT = list(range(500, 540))
OFFLOAD = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"cpu_bytes_to_use": 20_000_000, "offload_prompt_only": False},
}
DRAFTS: dict[bool, dict[str, Any]] = {
    asynchronous: {"method": method, "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    for asynchronous, method in ((False, "ngram"), (True, "ngram_gpu"))
}
"""Speculative decoding without and with asynchronous scheduling."""
SCARCE: dict[str, Any] = {
    "num_gpu_blocks_override": 24, "long_prefill_token_threshold": 16, "max_num_batched_tokens": 192,
    "max_num_seqs": 12, "max_num_active_seqs": 9,
}  # fmt: skip
"""Many prompts at once in few blocks: some lose them in the very step in which a chunk of theirs was scheduled."""
LORAS: dict[str, Any] = {
    "enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "lora_dtype": "bfloat16"
}  # fmt: skip
"""Two adapters, with room for one."""


Start = Callable[..., Engine]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts an engine in a mode, or gives the one that is there already, empty."""
    with ExitStack() as stack:
        known: dict[str, Engine] = {}

        def started(mode: dict[str, bool], **options: Any) -> Engine:
            key = repr((mode, options))
            if key in known and known[key].scheduler.requests:
                del known[key]  # another test failed in it
            if key not in known:
                folder = tmp_path_factory.mktemp("engine")
                known[key] = stack.enter_context(engine(folder, **mode, **options))
            known[key].forget()
            return known[key]

        yield started


@pytest.fixture
def taken_back() -> Iterator[list[int]]:
    """How many blocks each preemption took out of the prefix cache."""
    from coxswain.service.scheduler import compat  # vLLM, which takes ten seconds

    counts: list[int] = []
    take_back = compat.take_back

    def counted(scheduler: Any, request: Any) -> None:
        pool = scheduler.kv_cache_manager.block_pool
        before = len(pool.cached_block_hash_to_block)
        take_back(scheduler, request)
        counts.append(before - len(pool.cached_block_hash_to_block))

    with patch.object(compat, "take_back", counted):
        yield counts


def words(prompt: list[int], tokens: int) -> list[int]:
    """What the simulated model says to a prompt."""
    vocabulary = Vocabulary(4_000, frozenset({2}))
    return [vocabulary.token(seed_of(prompt), len(prompt) + place) for place in range(tokens)]


def disturb(engine: Engine, name: str, kv: str) -> None:
    """Hold a request, let others run, continue it."""
    reply = engine.told("preempt", name, kv="drop" if kv == "drop" else "keep")
    assert reply.outcome == "applied", reply
    for _ in range(3):
        engine.step()  # what was in flight comes
    said = engine.said(name)
    if kv == "park":
        record = engine.scheduler.core.roster.records[name]
        engine.scheduler.core.holds.park(engine.scheduler.now(), record, "test")
    for _ in range(3):
        engine.step()
    assert engine.said(name) == said, "held requests say nothing"
    engine.command("continue", name)


def stories(engine: Engine, name: str) -> dict[str, int]:
    """A request's counts so far."""
    record = engine.scheduler.core.roster.records[name]
    engine.scheduler.core.ledger.settle(record)
    return {kind: getattr(record, f"{kind}_tokens") for kind in ("recomputed", "restored", "reloaded")}


def few_steps(engine: Engine) -> None:
    """A few steps: what was in flight comes."""
    for _ in range(3):
        engine.step()
