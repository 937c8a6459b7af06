"""A wall clock that jumps, on the real engine: what is steered by time does not notice."""

import time
from pathlib import Path

import pytest

from tests.support.simulated import engine

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("jump_s", [-3_600.0, 3_600.0])
def test_requests_arrive_by_the_workers_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    """vLLM's server stamps requests by the wall clock: after a step of it they arrive neither long ago nor too soon."""
    with engine(tmp_path, v2=True, asynchronous=False) as steered:
        steered.add("before", [1, 2, 3], 5, arrival_time=time.time())
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        steered.add("after", [1, 2, 3], 5, arrival_time=time.time())
        records, now = steered.scheduler.core.roster.records, steered.scheduler.now()
        before, after = records["before"].arrived_at, records["after"].arrived_at
        assert now - 60.0 < before < after <= now
        steered.run()
