"""Hand-made SchedulerOutputs: the fields of vLLM's that a model runner reads, right unless a test breaks them."""

from types import SimpleNamespace
from typing import Any


def new(
    name: str, prompt: list[int], blocks: list[int], *, computed: int = 0, prefill: list[int] | None = None
) -> Any:
    """A request that the runner has not seen; `prefill` are all its tokens, where they are more than the prompt."""
    return SimpleNamespace(
        req_id=name,
        prompt_token_ids=prompt,
        prefill_token_ids=prompt if prefill is None else prefill,
        block_ids=(blocks,),
        num_computed_tokens=computed,
        lora_request=None,
    )


def cached(
    name: str,
    computed: int,
    outputs: int,
    blocks: list[int] | None = None,
    *,
    resumed: bool = False,
    tokens: list[int] | None = None,
) -> Any:
    """One row of the requests that the runner knows; `tokens` are its `all_token_ids`."""
    return SimpleNamespace(
        name=name, computed=computed, outputs=outputs, blocks=blocks, resumed=resumed, tokens=tokens
    )


def step(
    scheduled: dict[str, int],
    *rows: Any,
    finished: tuple[str, ...] = (),
    preempted: tuple[str, ...] = (),
    total: int | None = None,
    copies: list[tuple[int, int]] | None = None,
) -> Any:
    """One step: how many tokens of which requests, and what `new` and `cached` say of them."""
    fresh = [row for row in rows if hasattr(row, "req_id")]
    known = [row for row in rows if not hasattr(row, "req_id")]
    return SimpleNamespace(
        scheduled_new_reqs=fresh,
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[row.name for row in known],
            resumed_req_ids={row.name for row in known if row.resumed},
            all_token_ids={row.name: row.tokens for row in known if row.tokens is not None},
            new_block_ids=[None if row.blocks is None else (row.blocks,) for row in known],
            num_computed_tokens=[row.computed for row in known],
            num_output_tokens=[row.outputs for row in known],
        ),
        num_scheduled_tokens=scheduled,
        scheduled_spec_decode_tokens={},
        total_num_scheduled_tokens=sum(scheduled.values()) if total is None else total,
        finished_req_ids=set(finished),
        preempted_req_ids=set(preempted),
        new_block_ids_to_zero=None,
        kv_cache_block_copies=copies,
    )
