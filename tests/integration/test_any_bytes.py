"""What nats-server passes on and nats-py cannot read: whoever sends it, everybody hears on, and nobody is deceived."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import pytest
from nats.aio.msg import Msg

from coxswain.common.connection import Connection
from coxswain.common.nats_client import NatsClient
from coxswain.control.client import Client
from coxswain.control.tables import init
from coxswain.schemas.commands import encode
from coxswain.schemas.policy import Lead, TenantPolicy
from coxswain.service.bus.connect import close, connect
from coxswain.service.port import LeadIn, QueryIn
from tests.support.any_bytes import LINES, send
from tests.support.bus import Worker
from tests.support.engine import INCARNATION, event
from tests.support.nats import NatsServer
from tests.support.secured import Secured, secured
from tests.support.waiting import eventually

pytestmark = [pytest.mark.nats, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A server with every role."""
    with secured(tmp_path_factory.mktemp("bytes")) as server:
        yield server


@pytest.fixture
def worker(server: Secured) -> Iterator[Worker]:
    """A worker on it."""
    with Worker(server.nats.url, COX_BUS="thread", **server.env("worker-w1")) as worker:
        yield worker


@pytest.fixture
async def viewer(server: Secured) -> AsyncIterator[Client]:
    """A client that may look, and no more."""
    async with await Client.connect(server.at("viewer")) as viewer:
        yield viewer


@pytest.fixture
async def stolen(server: Secured) -> AsyncIterator[NatsClient]:
    """A connection with the worker's key."""
    at = server.at("worker-w1")
    client = await connect(at, name="t", on_error=lambda _: None, on_closed=lambda: None)
    yield client
    await close(client)


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
async def test_a_viewer_cannot_make_a_worker_deaf(worker: Worker, viewer: Client, line: bytes) -> None:
    """After a question that cannot be read a worker answers the next, on the same connection."""
    await worker.connected()
    await send(viewer.nc, line % b"cox.v1.main.query.all.status")
    await send(viewer.nc, line % b"$SRV.PING")
    assert (await viewer.query("w1", "status"))[0].worker == "w1"
    assert len(worker.logged("nats.connected")) == 1


async def test_a_viewer_cannot_speak_for_the_leader(worker: Worker, viewer: Client) -> None:
    """A vertical tab does not end a subject: what follows is not the number of the leader's."""
    await worker.connected()
    word = encode(Lead(epoch=(time.time(), 1), controller="nobody", policy="none", at=time.time()))
    for space in (b"\x0b", b"\x0c", b"\r"):
        for number in range(1, 12):
            line = b"PUB cox.v1.main.query.all.status%s%d in %d\r\n%s\r\n"
            await send(viewer.nc, line % (space, number, len(word), word))
    await viewer.query("w1", "status")
    assert [type(item) for item in worker.engine.taken] == [QueryIn]
    worker.port.offer(LeadIn(Lead(epoch=(1.0, 1), controller="c", policy="p", at=1.0)))
    await eventually(lambda: [type(item) for item in worker.engine.taken] == [QueryIn, LeadIn])


async def test_a_worker_cannot_make_its_observers_deaf(viewer: Client, stolen: NatsClient) -> None:
    """Who listens to status hears what comes after what it could not read, on the same connection."""
    heard = asyncio.Event()

    async def hear(msg: Msg) -> None:
        if msg.data == b"last":
            heard.set()

    await viewer.nc.subscribe(viewer.subjects.status_all, cb=hear)
    for line in LINES.values():
        await send(stolen, line % b"cox.v1.main.status.w1")
    await send(stolen, b"PUB cox.v1.main.status.w1 4\r\nlast\r\n")
    await asyncio.wait_for(heard.wait(), 30)
    assert viewer.nc.stats["reconnects"] == 0


async def test_nobody_can_make_the_log_unreadable(nats_server: NatsServer) -> None:
    """Whatever is stored in it, a reader passes over what it cannot read, and comes to the end."""
    pub = b"PUB cox.v1.main.event.w1.queued %d\r\n%s\r\n"
    first, last = (encode(event(seq).event("w1", INCARNATION)) for seq in (1, 2))
    async with await Client.connect(Connection(urls=(nats_server.url,), fleet="main")) as client:
        await init(client.js, client.subjects)
        await send(client.nc, pub % (len(first), first))
        for line in LINES.values():
            await send(client.nc, line % b"cox.v1.main.event.w1.queued")
        await send(client.nc, pub % (len(last), last))
        async with asyncio.timeout(30):
            assert [each.seq async for each in client.events(start="all", follow=False)] == [1, 2]


async def test_a_row_that_nobody_can_name_leaves_the_table_readable(server: Secured, viewer: Client) -> None:
    """An operator's slip in the tables keeps nobody from the other rows."""
    async with await Client.connect(server.at("operator")) as operator:
        await operator.tenants.put("acme", TenantPolicy(weight=2.0))
        await send(operator.nc, b"PUB $KV.cox_main_tenants.\xff 2\r\n{}\r\n")
        await operator.tenants.put("globex", TenantPolicy(weight=3.0))
    async with asyncio.timeout(30):
        rows = await viewer.tenants.get_all()
    assert set(rows.good) == {"acme", "globex"}


async def test_an_answer_that_is_none_ends_no_watch(
    server: Secured, viewer: Client, stolen: NatsClient
) -> None:
    """What a stranger puts into the inbox of a watch is passed over; the watch goes on."""
    async with await Client.connect(server.at("operator")) as operator:
        snapshots = viewer.tenants.watch()
        await anext(snapshots)
        for subscription in list(viewer.nc._subs.values()):
            if subscription.subject.startswith("_INBOX."):
                await stolen.publish(subscription.subject, b"{}", reply="nowhere")
        await stolen.flush()
        await operator.tenants.put("initech", TenantPolicy(weight=5.0))
        async with asyncio.timeout(30):
            async for rows in snapshots:
                if "initech" in rows.good:
                    break
        await snapshots.aclose()
    assert viewer.nc.stats["reconnects"] == 0
