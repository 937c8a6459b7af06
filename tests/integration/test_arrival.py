"""Where a request's record is made: beside the step where vLLM makes the request, else as it is added. One outcome."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCoreProc

from coxswain.service.scheduler import compat
from tests.support.steered import engine_id, public_id, steered_rig
from tests.support.waiting import eventually

pytestmark = pytest.mark.vllm


def from_client(**fields: Any) -> EngineCoreRequest:
    """What vLLM's server sends its engine."""
    return EngineCoreRequest(
        request_id="r", prompt_token_ids=[1, 2, 3], mm_features=None, sampling_params=SamplingParams(max_tokens=2),
        pooling_params=None, arrival_time=1.0, lora_request=None, cache_salt=None, data_parallel_rank=None, **fields,
    )  # fmt: skip


def bare_engine() -> Any:
    """vLLM's engine as far as it makes requests."""
    engine = object.__new__(EngineCoreProc)
    engine.mm_receiver_cache = engine.request_block_hasher = None
    return engine


def test_vllms_engine_tells_of_each_request() -> None:
    """Whole, before its caller has it; and the caller gets what vLLM gives."""
    engine, told = bare_engine(), []
    compat.meet(engine, told.append)
    request, wave = engine.preprocess_add_request(from_client(current_wave=3, priority=7))
    assert told == [request]
    assert (request.num_prompt_tokens, request.priority, wave) == (3, 7, 3)


def test_a_request_that_vllm_cannot_make_is_told_to_nobody() -> None:
    """Its error goes where it went before."""
    engine, told = bare_engine(), []
    compat.meet(engine, told.append)
    broken = from_client()
    broken.sampling_params = None
    with pytest.raises(ValueError, match="unset"):
        engine.preprocess_add_request(broken)
    assert told == []


@pytest.mark.parametrize("engine", [None, SimpleNamespace(input_queue=None)])
def test_an_engine_that_tells_nothing_is_none_of_ours_to_change(engine: Any) -> None:
    """As in its caller's process, where it is not found."""
    before = dict(vars(engine)) if engine else None
    compat.meet(engine, lambda _: None)
    assert before is None or vars(engine) == before


@pytest.mark.parametrize("beside", [True, False], ids=["beside-the-step", "in-the-step"])
@pytest.mark.parametrize("forged", [False, True], ids=["signed", "forged"])
async def test_who_asks_is_who_the_id_proves(beside: bool, forged: bool) -> None:
    """Whoever made the record, and whenever: an id that is not signed with the key proves nothing."""
    public = public_id("acme", "chat")
    public = public[:-1] + "z" if forged else public
    with steered_rig(None, step_s=0.0) as rig:
        request = rig.request(engine_id(public), tokens=2, arrival_time=1.0, priority=4)
        assert hasattr(request, "steering"), "the engine told nothing"
        if not beside:
            del request.steering
        rig.call(lambda: rig.scheduler.add_request(request))
        await eventually(lambda: request.request_id in rig.finished)
    record = request.steering
    assert (record.account.name, record.asked_class) == (("default", "") if forged else ("acme", "chat"))
    assert record.tenant == record.account.name
    assert (record.priority, record.prompt_tokens, record.arrived_at) == (4, 16, 1.0)
    assert record.queued_since >= record.arrived_at
