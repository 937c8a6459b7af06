"""The controller's shell without NATS: what it does beside carrying messages."""

import asyncio
from typing import Any

import structlog

from coxswain.common.connection import Connection
from coxswain.control.core import Answer, Send
from coxswain.control.daemon import Controller
from coxswain.control.errors import NoAnswerError
from coxswain.control.failures import PATIENCE
from coxswain.control.lease import RETRY_S
from coxswain.control.metrics import NOBODY
from coxswain.control.policies.edf import Edf
from coxswain.control.tables import LEASE_TTL_S
from coxswain.control.told import ANSWER_S
from coxswain.schemas.commands import Configure, Limit, Reply, Targets
from coxswain.schemas.errors import Code
from coxswain.schemas.names import OTHER
from coxswain.schemas.policy import LEADER_LEASE_S
from coxswain.schemas.status import QueuePage


class SlowClient:
    """Answers about queues when it is let, and not to commands."""

    patience_s = 0.0

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.let = asyncio.Event()

    async def command(self, worker: str, *_: Any, timeout_s: float = 2.0, **__: Any) -> list[Reply]:
        """Nobody is there."""
        self.asked.append(worker)
        self.patience_s = timeout_s
        raise NoAnswerError("nobody answered")

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


async def test_the_core_hears_that_nobody_answered_before_it_gives_a_command_up() -> None:
    """Else it would wait for longer than it must, and not know whether anybody answered."""
    controller, client = Controller(Connection(urls=(), fleet="main"), Edf(Edf.Params())), SlowClient()
    send = Send("w1", "limit", Limit(id="a1", targets=Targets(all=True)))
    await controller._send(client, send)
    assert controller._answers == [Answer(send, ok=False)]
    assert client.patience_s <= ANSWER_S - 0.5


class RefusingClient(SlowClient):
    """Refuses each command with the next of these codes."""

    def __init__(self, *codes: int) -> None:
        super().__init__()
        self.codes = iter(codes)

    async def command(self, worker: str, _verb: str, command: Any, **__: Any) -> list[Reply]:
        """No."""
        return [
            Reply(
                id=command.id, worker=worker, incarnation="01A", worker_now=0.0, step=0, outcome="rejected",
                code=next(self.codes), error="no",
            )
        ]  # fmt: skip


async def test_codes_that_nobody_knows_are_counted_as_one() -> None:
    """A worker that answers with a new code each time makes no series each time."""
    codes = (Code.STALE, Code.CLOSING, 700, 701, -3)
    controller = Controller(Connection(urls=(), fleet="main"), Edf(Edf.Params()))
    client = RefusingClient(*codes)
    for number in range(len(codes)):
        await controller._send(client, Send("w1", "limit", Limit(id=f"a{number}", targets=Targets(all=True))))
    await controller._send(SlowClient(), Send("w1", "limit", Limit(id="b", targets=Targets(all=True))))
    assert controller.meter.refused == {
        ("limit", "409"): 1, ("limit", "503"): 1, ("limit", OTHER): 3, ("limit", NOBODY): 1,
    }  # fmt: skip


class OlderClient(SlowClient):
    """Applies each command but for fields that it does not know."""

    async def command(self, worker: str, _verb: str, command: Any, **__: Any) -> list[Reply]:
        """As far as it can."""
        return [
            Reply(
                id=command.id, worker=worker, incarnation="01A", worker_now=0.0, step=0, outcome="applied",
                ignored=("classes.chat.spare",),
            )
        ]  # fmt: skip


async def test_fields_that_a_worker_does_not_know_are_logged_and_told_to_the_core() -> None:
    """It applied the rest, so nothing was refused; the line says what is missing there, once a minute."""
    controller = Controller(Connection(urls=(), fleet="main"), Edf(Edf.Params()))
    send = Send("w1", "configure", Configure(id="a1"))
    with structlog.testing.capture_logs() as lines:
        for _ in range(3):
            await controller._send(OlderClient(), send)
    assert controller._answers == [Answer(send, ok=True, ignored=("classes.chat.spare",))] * 3
    assert controller.meter.refused == {}
    assert [(line["event"], line["reason"]) for line in lines] == [
        ("command.fields_ignored", "classes.chat.spare")
    ]


class HeldLease:
    """A lease that is ours until it is given up."""

    epoch: Any = (1.0, 1)

    def __init__(self) -> None:
        self.others_try_s: list[float] = []

    def step_down(self, _: str, others_try_s: float) -> None:
        """Note for how long."""
        self.others_try_s.append(others_try_s)


async def test_a_leader_whose_policy_fails_stands_back_for_long_enough() -> None:
    """A standby gets the lease only when its key has expired; and no worker may give its leader up meanwhile."""
    controller, lease = Controller(Connection(urls=(), fleet="main"), Edf(Edf.Params())), HeldLease()
    for _ in range(PATIENCE):
        controller.core.failures.failed("decide", ValueError("no"))
        controller._look_after_policy(lease)  # type: ignore[arg-type]
    (others_try_s,) = lease.others_try_s
    assert LEASE_TTL_S + 2 * RETRY_S < others_try_s < LEADER_LEASE_S
