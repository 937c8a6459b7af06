"""LoRA adapters and step budgets: vLLM counts the adapters of what a step computes, so none is left out."""

from pathlib import Path

import pytest
from vllm.lora.request import LoRARequest

from coxswain.schemas.commands import Targets
from coxswain.service.request_id import make
from tests.support.simulated import KEY, engine

pytestmark = pytest.mark.vllm


def test_bounded_prompt_keeps_its_adapters_place(tmp_path: Path) -> None:
    """With room for one adapter, a running prompt that may compute nothing goes on by a token."""
    loras = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "lora_dtype": "bfloat16"}
    names = {
        tenant: f"cmpl-{make(bytes.fromhex(KEY), tenant, '', '01KDWDV0000000000000000001')}-0-00000001"
        for tenant in ("acme", "globex")
    }
    with engine(tmp_path, v2=True, asynchronous=True, enable_prefix_caching=False, **loras) as steered:
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
