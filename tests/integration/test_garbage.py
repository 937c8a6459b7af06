"""What a request leaves behind when it has ended, on vLLM's real scheduler: nothing."""

import gc
import os
import weakref
from unittest.mock import patch

import pytest

from bench.rig import Rig, vllm_config

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("aborted", [False, True])
def test_ended_request_needs_no_garbage_collector(aborted: bool) -> None:
    """Request and record know each other; when it ends they go at once, and no pause of the engine's sees to it."""
    from vllm.v1.request import RequestStatus

    from coxswain.service.scheduler import SteeredScheduler

    with patch.dict(os.environ):
        os.environ.pop("COX_NATS_URL", None)
        rig = Rig(SteeredScheduler, vllm_config(max_num_seqs=2, async_scheduling=False))
    gc.collect()
    gc.disable()
    try:
        request = weakref.ref(rig.add("cmpl-one", tokens=4))
        rig.step()
        if aborted:
            rig.scheduler.finish_requests("cmpl-one", RequestStatus.FINISHED_ABORTED)
        rig.run()
        assert request() is None
    finally:
        gc.enable()
        rig.scheduler.shutdown()
