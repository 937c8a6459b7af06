"""vLLM's request queue interface over the steered queue. Thin: order and charging are the core's.

vLLM peeks, and pops what it saw either to admit it or to skip it in this step and put it back; both arrive here as
`pop` and, for the second, `prepend`.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from vllm.v1.core.sched.request_queue import PriorityRequestQueue, RequestQueue

from coxswain.service.scheduler.compat import expected_cached_tokens
from coxswain.service.scheduler.core import SteeringCore
from coxswain.service.scheduler.mechanism import Mechanism
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.states import HELD, RUNNING


class SteeredRequestQueue(RequestQueue):
    """What vLLM's scheduler sees as `waiting`. Every request in it carries its record as `request.steering`."""

    def __init__(self, core: SteeringCore, mechanism: Mechanism) -> None:
        self._core = core
        self._queue = core.queue
        self._mechanism = mechanism
        self._seen: Record | None = None
        """What vLLM saw last."""

    def add_request(self, request: Any) -> None:
        """Queue a request in its class and tenant."""
        self._queue.add(request.steering)

    def peek_request(self) -> Any:
        """The request that should run next."""
        self._seen = record = self._queue.peek()
        return record.payload

    def pop_request(self) -> Any:
        """Take out what vLLM saw and charge its input: the next pick in the same step must see the charge.

        That one and no other, whoever should run next by now: vLLM has given it its blocks.
        """
        record, self._seen = self._seen, None
        assert record is not None, "vLLM pops what it has not seen"
        self._queue.take(record)
        self._core.admitting(record, expected_cached_tokens(record.payload))
        self._mechanism.popped(record)
        return record.payload

    def prepend_request(self, request: Any) -> None:
        """Put back a request that was skipped, or that vLLM preempted; one that is held stays out."""
        record = request.steering
        if record.state in HELD:
            return
        if record.state is RUNNING:
            self._core.not_admitted(record)
            self._queue.put_back(record)
        else:
            self._queue.add(record)

    def prepend_requests(self, requests: Iterable[Any]) -> None:
        """Put back all that were skipped in this step; their keys say where."""
        for request in requests:
            self.prepend_request(request)

    def remove_request(self, request: Any) -> None:
        """Take a request out; one that is not here is not an error."""
        self._queue.remove(request.steering)

    def remove_requests(self, requests: Iterable[Any]) -> None:
        """Take requests out; vLLM names requests of its other queues too."""
        for request in requests:
            self._queue.remove(request.steering)

    def __bool__(self) -> bool:
        """Whether anything may run; what its caps keep back counts in `len` alone."""
        return bool(self._queue)

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Any]:
        return (record.payload for record in self._queue.walk())


class KvHoldingQueue(PriorityRequestQueue):
    """What vLLM's scheduler sees as `kv_holding_waiting`: requests that wait with blocks of their own.

    A streaming session between two turns, one whose KV a connector is loading, and one that was released from a park.
    The second was popped from the queue as if to be admitted. The first two are queued, outside the queue, until they
    run; the third runs as far as steering is concerned (`Mechanism.released`).
    """

    def __init__(self, core: SteeringCore) -> None:
        super().__init__()
        self._core = core

    def pop_request(self) -> Any:
        """Take the next out: it counts as running at once, so that caps hold within a step."""
        request = super().pop_request()
        self._core.running(request.steering)
        return request

    def remove_requests(self, requests: Any) -> None:
        """Take requests out; where nobody waits, as mostly, vLLM's own would make a set and a heap all the same."""
        if self:
            super().remove_requests(requests)

    def prepend_requests(self, requests: Any) -> None:
        """Put back what was skipped in this step, or put here what begins to load.

        What was released from a park may be skipped step after step, for want of room for its adapter: it runs on.
        """
        for request in requests:
            record = request.steering
            if record.state is RUNNING and not self._core.engine.waits_with_kv(record):
                self._core.loading(record)
            self.add_request(request)
