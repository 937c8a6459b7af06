"""What the worker says of itself while the demo runs: its latest status, samples for the metrics, its events.

All of it comes over NATS, as any observer would see it. Called by `stack` (which runs it) and the acts.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, TypeVar

from coxswain.control.client import Client
from coxswain.control.demo.metrics import Sample, sample
from coxswain.control.demo.processes import DemoError
from coxswain.control.fleet import WorkerView
from coxswain.schemas.events import Event

E = TypeVar("E", bound=Event)


class Watch:
    """Follows one worker. `run` feeds it; everything else reads.

    Args:
        client: a connection to the fleet.
        worker: whose status and events.
    """

    def __init__(self, client: Client, worker: str) -> None:
        self._client = client
        self.worker = worker
        self.view: WorkerView | None = None
        """None until the worker was heard."""
        self.samples: list[Sample] = []
        self.events: list[Event | dict[str, Any]] = []
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Follow until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_status())
            group.create_task(self._follow_events())

    async def until(self, fact: Callable[[WorkerView], bool], what: str, *, timeout_s: float) -> WorkerView:
        """Wait until something is true of the worker.

        Raises:
            DemoError: it was not within `timeout_s`; `what` says what was waited for.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while self.view is None or not fact(self.view):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError as error:
            raise DemoError(f"waited {timeout_s:g} s in vain: {what}") from error
        return self.view

    async def event(self, kind: type[E], request: str, *, timeout_s: float = 5.0) -> E:
        """The latest event of a kind about a request, waiting for one if there is none yet.

        Raises:
            DemoError: none came within `timeout_s`.
        """
        end = time.monotonic() + timeout_s
        while True:
            for event in reversed(self.events):
                if isinstance(event, kind) and event.request == request:
                    return event
            if time.monotonic() > end:
                raise DemoError(f"no event {kind.__name__} of {request} came within {timeout_s:g} s")
            await asyncio.sleep(0.02)

    async def _follow_status(self) -> None:
        async with aclosing(self._client.frames()) as frames:
            async for frame in frames:
                if frame.worker != self.worker:
                    continue
                now = time.time()
                if self.view is None or self.view.incarnation != frame.incarnation:
                    self.view = WorkerView(frame, now)
                self.view.merge(frame, now)
                self.samples.append(sample(frame.sent_at, self.view.rows.values()))
                self._news.set()

    async def _follow_events(self) -> None:
        async with aclosing(self._client.events(worker=self.worker)) as events:
            async for event in events:
                self.events.append(event)
