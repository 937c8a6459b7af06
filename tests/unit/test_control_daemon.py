"""The controller's shell without NATS: what it does beside carrying messages."""

import asyncio
from typing import Any

from coxswain.control.daemon import Controller
from coxswain.control.policies.edf import Edf
from coxswain.schemas.connection import Connection
from coxswain.schemas.status import QueuePage


class SlowClient:
    """Answers about queues when it is let."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.let = asyncio.Event()

    async def query(self, worker: str, *_: Any, **__: Any) -> list[QueuePage]:
        """An empty queue."""
        self.asked.append(worker)
        await self.let.wait()
        return [QueuePage(requests=(), next=None, total=0)]


async def test_a_worker_is_not_asked_for_its_queue_while_it_is_being_read() -> None:
    """A long one takes longer than the core's patience; two readings at once could end in the wrong order."""
    controller, client = Controller(Connection(urls=(), fleet="main"), Edf(Edf.Params())), SlowClient()
    readings = [asyncio.create_task(controller._list(client, name)) for name in ("w1", "w1", "w2")]
    await asyncio.wait(readings, return_when=asyncio.FIRST_COMPLETED, timeout=10)
    assert client.asked == ["w1", "w2"]
    client.let.set()
    await asyncio.gather(*readings)
    assert [listing.worker for listing in controller._listings] == ["w1", "w2"]
    await controller._list(client, "w1")
    assert client.asked == ["w1", "w2", "w1"]
