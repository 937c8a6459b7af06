"""A worker on a cluster of three NATS servers: the loss of one is no loss of the bus.

Whole fleets on a cluster, and more faults of it: `make soak` (`tests/faults/cluster.py`).
"""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest
from ulid import ULID

from coxswain.common.connection import Connection
from coxswain.control.client import Client
from coxswain.control.errors import ControlError
from coxswain.control.lease import KEY
from coxswain.control.tables import LogLimits, init
from coxswain.schemas.commands import Abort, Targets
from coxswain.schemas.subjects import Subjects
from tests.support.bus import FLEET, Worker, stored
from tests.support.cluster import NatsCluster, leader_of
from tests.support.engine import WORKER
from tests.support.waiting import eventually

pytestmark = [pytest.mark.nats, pytest.mark.timeout(120)]

SUBJECTS = Subjects(FLEET)
SOON_S = 20.0
"""For an election and a new connection, on a machine that has other things to do."""


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[NatsCluster]:
    """Three servers with stream and buckets, three copies of each."""
    async with NatsCluster(tmp_path) as cluster:
        async with asyncio.timeout(60), await nats.connect(list(cluster.urls)) as client:
            while True:  # until they have elected whom to ask
                try:
                    await init(client.jetstream(), SUBJECTS, LogLimits(replicas=3))
                    break
                except ControlError:
                    await asyncio.sleep(0.1)
        yield cluster


async def test_the_loss_of_the_server_that_leads_the_log_loses_nothing(cluster: NatsCluster) -> None:
    """Killed in a stream of events: each is stored once and in order, commands are answered, somebody can lead."""
    client = await Client.connect(Connection(urls=cluster.urls, fleet=FLEET))
    try:
        with Worker(cluster.url) as worker:
            await worker.connected()
            leader = cluster.nodes[await leader_of(client.js, SUBJECTS.stream)]
            for count in range(30):
                if count == 10:
                    leader.kill()
                worker.engine.send_events(20)
                await asyncio.sleep(0.02)
            await answered(client)
            await leased(client)
            await eventually(lambda: worker.port.connected and not worker.bus._outbox._kept, SOON_S)
            assert worker.port.events_dropped == 0
        alive = next(node for node in cluster.nodes.values() if node is not leader)
        assert await stored(alive.url) == list(range(1, 601))
    finally:
        await client.close()


async def answered(client: Client) -> None:
    """Wait until a command is applied."""
    deadline = time.monotonic() + SOON_S
    while True:
        command = Abort(id=str(ULID()), targets=Targets(requests=("r1",)))
        try:
            (reply,) = await client.command(WORKER, "abort", command, timeout_s=1.0)
        except ControlError:
            assert time.monotonic() < deadline, "no command is answered"
        else:
            assert reply.outcome == "applied"
            return


async def leased(client: Client) -> None:
    """Wait until a key of the lease's bucket can be written."""
    deadline = time.monotonic() + SOON_S
    while True:
        try:
            async with asyncio.timeout(2.0):
                bucket = await client.js.key_value(SUBJECTS.lease_bucket)
                await bucket.put(KEY, b"c1")
                return
        except (nats.errors.Error, nats.js.errors.Error, TimeoutError):
            assert time.monotonic() < deadline, "nobody can lead"
