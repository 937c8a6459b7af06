"""A small worker on a real NATS: for tests of what leads a fleet. The real worker is tested elsewhere."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import nats
from nats.aio.msg import Msg

from coxswain.common.connection import Connection
from coxswain.control.core import Beat, Send
from coxswain.schemas.commands import Reply, decode, encode
from coxswain.schemas.policy import Epoch, Lead
from coxswain.schemas.subjects import Subjects
from tests.support.frames import SmallWorker
from tests.support.nats import NatsServer

FLEET = "test"


def connection(server: NatsServer) -> Connection:
    """Where the fleet of these tests is."""
    return Connection(urls=(server.url,), fleet=FLEET)


@dataclass
class Told:
    """A command that reached a worker."""

    at: float
    """By the monotonic clock."""
    epoch: Epoch
    verb: str
    command: Any
    accepted: bool


class Working(SmallWorker):
    """A small worker that keeps account of who said what, and serves a step per frame if `serving`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.told: list[Told] = []
        self.leader = ""
        """The controller that it obeys."""
        self.serving = False

    def accepted(self, after: Epoch) -> list[Told]:
        """What was accepted of leaders later than this one."""
        return [each for each in self.told if each.accepted and each.epoch > after]


@asynccontextmanager
async def working(server: NatsServer, name: str = "w1", url: str = "") -> AsyncIterator[Working]:
    """A small worker on the bus: it publishes a frame every 50 ms and obeys commands and heartbeats."""
    worker, subjects = Working(name), Subjects(FLEET)
    nc = await nats.connect(
        url or server.url,
        max_reconnect_attempts=-1,
        reconnect_time_wait=0.1,
        error_cb=_ignore,
        ping_interval=1,
    )

    async def on_command(message: Msg) -> None:
        verb = subjects.parse_command(message.subject).verb
        command, _ = decode(verb, message.data)
        epoch = command.epoch or (0.0, 0)
        accepted = worker.epoch is not None and epoch >= worker.epoch
        accepted = accepted and worker.obey([Send(name, verb, command)])[0].ok
        worker.told.append(Told(time.monotonic(), epoch, verb, command, accepted))
        outcome = (
            {"outcome": "applied"} if accepted else {"outcome": "rejected", "code": 409, "error": "stale"}
        )
        reply = {"id": command.id, "worker": name, "incarnation": "01A", "worker_now": time.time(), "step": 0}
        await message.respond(encode(msgspec.convert(reply | outcome, Reply)))

    async def on_lead(message: Msg) -> None:
        lead = msgspec.json.decode(message.data, type=Lead)
        if worker.epoch is None or lead.epoch >= worker.epoch:
            worker.leader = lead.controller
            worker.obey([Beat(lead)])

    async def publish() -> None:
        while True:
            await asyncio.sleep(0.05)
            worker.step(worker.serving)
            try:
                await nc.publish(subjects.status(name), encode(worker.frame()))
            except nats.errors.Error:
                continue

    await nc.subscribe(subjects.commands_of(name)[0], cb=on_command)
    await nc.subscribe(subjects.lead, cb=on_lead)
    task = asyncio.create_task(publish())
    try:
        yield worker
    finally:
        task.cancel()
        await nc.close()


async def _ignore(_: Exception) -> None:
    """NATS is stopped on purpose in these tests."""
