"""LoRA adapters and step budgets: vLLM counts the adapters of what a step computes, so none is left out."""

from pathlib import Path

import pytest
from vllm.lora.request import LoRARequest

from coxswain.schemas.commands import Targets
from coxswain.schemas.status import QueueQuery
from coxswain.service.request_id import make
from coxswain.service.scheduler.states import State
from tests.support.modes import LORAS, few_steps
from tests.support.simulated import KEY, engine
from tests.support.steered import engine_id, public_id

pytestmark = pytest.mark.vllm


def test_bounded_prompt_keeps_its_adapters_place(tmp_path: Path) -> None:
    """With room for one adapter, a running prompt that may compute nothing goes on by a token."""
    names = {
        tenant: f"cmpl-{make(bytes.fromhex(KEY), tenant, '', '01KDWDV0000000000000000001')}-0-00000001"
        for tenant in ("acme", "globex")
    }
    with engine(tmp_path, v2=True, asynchronous=True, enable_prefix_caching=False, **LORAS) as steered:
        adapters = [LoRARequest(f"adapter-{number}", number, f"/nowhere/{number}") for number in (1, 2)]
        steered.add(names["acme"], list(range(1_000, 1_200)), 4, lora_request=adapters[0])
        steered.step()
        acme = Targets(tenants=("acme",))
        steered.command("limit", targets=acme, max_prefill_tokens_per_step=0)
        steered.add(names["globex"], list(range(20)), 30, lora_request=adapters[1])
        steered.step()
        assert steered.scheduled == {names["acme"]: 1}
        steered.command("limit", targets=acme, max_prefill_tokens_per_step=None)
        steered.run()
        assert steered.finished.keys() == {*names.values()}
        steered.check_empty()


def test_released_request_whose_adapter_has_no_room(tmp_path: Path) -> None:
    """It goes on through a park, and vLLM skips it: it runs, for all that look for it, and can be held or reset."""
    with engine(tmp_path, v2=True, asynchronous=True, enable_prefix_caching=True, **LORAS) as steered:
        held, other = public_id("acme"), public_id("globex")
        first, second = engine_id(held), engine_id(other)
        adapters = [LoRARequest(f"adapter-{number}", number, f"/nowhere/{number}") for number in (1, 2)]
        steered.add(first, list(range(40)), 60, lora_request=adapters[0])
        steered.until_said(first, 5)
        core, mechanism = steered.scheduler.core, steered.scheduler.mechanism
        record = core.roster.records[first]
        assert steered.told("preempt", held).outcome == "applied"
        steered.add(second, list(range(50, 90)), 150, lora_request=adapters[1])
        steered.until_said(second, 5)
        for again in (True, False):
            assert steered.told("continue", held).outcome == "applied"
            few_steps(steered)
            assert record.payload in steered.scheduler.deferred_waiting
            assert record.state is State.RUNNING
            assert mechanism.released() == [record]
            assert mechanism.blocks(record)
            assert not steered.scheduler.reporter.page(QueueQuery()).requests
            if again:
                assert steered.told("preempt", held).outcome == "applied"
                assert record.payload not in steered.scheduler.deferred_waiting
        assert steered.core.reset_prefix_cache(reset_running_requests=True)
        assert record in core.queue
        core.validate()
        steered.run()
        assert (steered.said(first), steered.said(second)) == (60, 150)
        steered.check_empty()
