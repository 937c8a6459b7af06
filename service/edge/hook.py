"""The edge's hooks in vLLM: the last word on a request's id and priority, what is refused, whether the server ends.

Headers are not enough: `/v1/responses` and others ignore X-Request-Id, and a body may name its own
priority. vLLM gives every request its internal id in `InputProcessor.assign_request_id`
(v1/engine/input_processor.py, 0.26 to 0.33), in the task of the HTTP request, so the ticket is visible
there. The turns of a streaming session (`/v1/realtime`) get no id of their own: what makes each of them
(`process_inputs`) is where their priority is bounded. Right after it named a request vLLM may refuse it all the same
(503: `--max-num-queued-reqs`, `--max-num-queued-tokens`), in `AsyncLLM.check_admission`: then it waits nowhere.
Called by `identity.py`, in the API server.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

from coxswain.schemas.request_id import normalise
from coxswain.service import request_id
from coxswain.service.edge.asgi import ticket
from coxswain.service.edge.core import Ticket


def apply(request: Any, held: Ticket) -> None:
    """Bound the priority of vLLM's `EngineCoreRequest`; put the signed id into its internal id; count it as sent.

    The external id stays what vLLM had: that one is the client's, and vLLM's own maps use it.
    """
    bound(request, held)
    # Exactly this id, and as the last mark: another one would be somebody else's, sent along in a body.
    if normalise(request.request_id) != held.request:
        request.request_id = request_id.insert(request.request_id, held.request)
    if held.passage is not None:
        sampling = getattr(request, "sampling_params", None)
        held.passage.sent(time.monotonic(), sampling.n if sampling is not None else 1)


def bound(request: Any, held: Ticket) -> None:
    """Bound the priority of vLLM's `EngineCoreRequest`."""
    request.priority = min(max(request.priority, held.priority_min), held.priority_max)


def ends(app: Any) -> bool:
    """Whether vLLM's server was told to end, `app` being its FastAPI application.

    With `--shutdown-timeout` it listens until its engine is done. Requests that come meanwhile get an empty answer,
    late ones none, and then the server does not end at all. `MPClient.shutdown` (v1/engine/core_client.py) first
    detaches a finalizer.
    """
    client = getattr(getattr(app, "state", None), "engine_client", None)
    finalizer = getattr(getattr(client, "engine_core", None), "_finalizer", None)
    return finalizer is not None and not finalizer.alive


def install() -> None:
    """Wrap `assign_request_id`, `process_inputs` and, where there is one, `check_admission`; once is enough.

    Raises:
        RuntimeError: if this vLLM has no such functions: tenants would not be told apart.
    """
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    for name in ("assign_request_id", "process_inputs"):
        if not hasattr(InputProcessor, name):
            raise RuntimeError(
                f"this vLLM has no InputProcessor.{name}: use a version that Coxswain supports"
            )
    if getattr(InputProcessor.assign_request_id, "is_coxswain", False):
        return
    assign: Callable[[Any], None] = InputProcessor.assign_request_id
    process: Callable[..., Any] = InputProcessor.process_inputs

    @functools.wraps(assign)
    def assign_request_id(request: Any) -> None:
        assign(request)
        held = ticket.get()
        if held is not None:
            apply(request, held)

    @functools.wraps(process)
    def process_inputs(self: Any, *args: Any, **fields: Any) -> Any:
        request = process(self, *args, **fields)
        held = ticket.get()
        if held is not None:
            bound(request, held)
        return request

    assign_request_id.is_coxswain = True  # type: ignore[attr-defined]
    InputProcessor.assign_request_id = staticmethod(assign_request_id)
    InputProcessor.process_inputs = process_inputs
    if hasattr(AsyncLLM, "check_admission"):
        AsyncLLM.check_admission = _noting_refusals(AsyncLLM.check_admission)


def _noting_refusals(check: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(check)
    def check_admission(self: Any, n: int = 1, request_id: str | None = None) -> None:
        try:
            check(self, n, request_id)
        except Exception:
            held = ticket.get()
            # Without an id it is vLLM's first look, before it makes any request.
            if request_id is not None and held is not None and held.passage is not None:
                held.passage.refused()
            raise

    return check_admission
