"""Pooling models: vLLM's own front end is told of an aborted request so that it lives on, and answers its client."""

from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


def test_an_aborted_pooling_request_is_answered_and_others_go_on() -> None:
    """With nothing in it, as vLLM itself does; told as of a completion, its front end would fail for good."""
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
    from vllm.v1.request import Request
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    from coxswain.service.scheduler import compat

    front = OutputProcessor(None, log_stats=False)
    clients = {}
    for name in ("embedding", "another"):
        request = EngineCoreRequest(
            name, [1, 2, 3], None, None, PoolingParams(task="embed"), 0.0, None, None, None, external_req_id=name
        )  # fmt: skip
        clients[name] = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, name)
        front.add_request(request, None, None, 0, clients[name])
    asked: list[list[Any]] = []
    queue: Queue[tuple[int, EngineCoreOutputs]] = Queue()
    engine = SimpleNamespace(output_queue=queue, _send_abort_outputs=asked.append)
    pooling = Request("embedding", [1, 2, 3], None, PoolingParams(task="embed"), client_index=2)
    generating = SimpleNamespace(request_id="completion", pooling_params=None)
    compat.send_aborts(engine, [pooling, generating])
    assert asked == [[generating]]
    client, told = queue.get_nowait()
    assert client == 2
    sent = MsgpackEncoder().encode(told)
    received = MsgpackDecoder(EngineCoreOutputs).decode(sent)
    assert received.finished_requests == {"embedding"}
    front.process_outputs(received.outputs)
    answer: Any = clients["embedding"].get_nowait()
    assert (answer.finished, answer.outputs.data.numel()) == (True, 0)
    assert front.has_request("another")
    assert clients["another"].get_nowait() is None
