"""The waiting queue as vLLM's scheduler uses it: it peeks, gives what it saw its blocks, and pops."""

from types import SimpleNamespace
from typing import Any

import pytest

from coxswain.schemas.policy import TenantRank
from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.vllm


def test_what_vllm_saw_is_what_it_gets() -> None:
    """Somebody else's turn may come between its look and its grasp: the blocks are not his."""
    from coxswain.service.scheduler.adapter import SteeredRequestQueue

    engine = FakeEngine()
    seen, other = engine.submit("a"), engine.submit("b")
    for record in (seen, other):
        record.payload.prefill_stats = None
    mechanism: Any = SimpleNamespace(popped=lambda record: None)
    queue = SteeredRequestQueue(engine.core, mechanism)
    assert queue.peek_request() is seen.payload
    engine.core.rank("b", TenantRank(base=-100.0, weight=1.0))
    assert engine.core.queue.peek() is other
    assert queue.pop_request() is seen.payload
    assert other in engine.core.queue
    assert seen not in engine.core.queue
    assert queue.peek_request() is other.payload
