"""Sabotage for the negative control: two requests' block tables, swapped inside the model runner.

Runs in the worker's process, sent there by `identity` through vLLM's collective_rpc. Only the blocks that both
have are swapped, so that every write still has a block to go to.
"""

from typing import Any


def swap_tables(worker: Any, names: list[str]) -> int:
    """Swap the leading blocks of two held requests, by public id; how many there were.

    Raises:
        LookupError: the runner does not know one of them.
    """
    runner = worker.model_runner
    return _swap_v2(runner, names) if hasattr(runner, "req_states") else _swap_v1(runner, names)


def _find(known: Any, name: str) -> str:
    """vLLM's internal id of a request: ours and eight random digits."""
    found = [key for key in known if key.startswith(name)]
    if len(found) != 1:
        raise LookupError(f"{name}: {len(found)} such requests in the model runner")
    return str(found[0])


def _swap_v2(runner: Any, names: list[str]) -> int:
    """vllm/v1/worker/gpu: a table on the GPU, a row per slot (block_table.py:54, states.py:28; 0.32.0)."""
    index = runner.req_states.req_id_to_index
    one, other = (index[_find(index, name)] for name in names)
    tables = runner.block_tables
    count = int(min(tables.num_blocks.np[0, one], tables.num_blocks.np[0, other]))
    table = tables.block_tables[0].gpu
    table[[one, other], :count] = table[[other, one], :count]
    return count


def _swap_v1(runner: Any, names: list[str]) -> int:
    """vllm/v1/worker: a list per request, and a row in the batch for those of the last step (0.32.0)."""
    states = [runner.requests[_find(runner.requests, name)] for name in names]
    one, other = (state.block_ids[0] for state in states)
    count = min(len(one), len(other))
    one[:count], other[:count] = other[:count], one[:count]
    batch = runner.input_batch
    for state in states:
        row = batch.req_id_to_index.get(state.req_id)
        if row is not None:
            batch.block_table.block_tables[0].block_table.np[row, :count] = state.block_ids[0][:count]
    return count
