"""The client against workers that answer by hand: what comes back, and what is said when nothing does."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from nats.aio.client import Client as Nats
from nats.aio.client import Server
from nats.aio.msg import Msg

from coxswain.common.connection import MAX_PINGS, PING_INTERVAL_S, Connection
from coxswain.control.client import Client
from coxswain.control.errors import NoAnswerError, UnreachableError
from coxswain.control.transport import next_server, open_link
from coxswain.schemas.commands import Drain, Reply, encode
from coxswain.schemas.errors import CODE_HEADER, ERROR_HEADER, Code, RefusedError
from coxswain.schemas.names import NameRefusedError
from coxswain.schemas.status import RequestQuery
from coxswain.service.config import Settings
from tests.support.frames import frame, row
from tests.support.nats import NatsServer
from tests.support.waiting import eventually

pytestmark = pytest.mark.nats

DRAIN = Drain(id="d1", on=True)
Answer = Callable[[Msg], Awaitable[None]]


@pytest.fixture
async def client(nats_server: NatsServer) -> AsyncIterator[Client]:
    """A client of fleet `main`."""
    async with await Client.connect(Connection(urls=(nats_server.url,))) as client:
        yield client


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[Nats]:
    """The workers' side of the wire."""
    nc = await open_link(Connection(urls=(nats_server.url,)), name="workers", timeout_s=2)
    yield nc
    await nc.close()


async def _serve(bus: Nats, client: Client, worker: str, answer: Answer) -> None:
    for subjects in (client.subjects.commands_of(worker), client.subjects.queries_of(worker)):
        for subject in subjects:
            await bus.subscribe(subject, cb=answer)
    await bus.flush()


def _applies(worker: str) -> Answer:
    async def answer(message: Msg) -> None:
        reply = Reply(id="d1", worker=worker, incarnation="01A", worker_now=0.0, step=1, outcome="applied")
        await message.respond(encode(reply))

    return answer


async def test_a_command_to_all_gathers_every_reply(client: Client, bus: Nats) -> None:
    """`all` returns what every worker says, and does not wait out the whole timeout once they have."""
    for worker in ("w1", "w2", "w3"):
        await _serve(bus, client, worker, _applies(worker))
    began = time.monotonic()
    replies = await client.command("all", "drain", DRAIN, timeout_s=60.0)
    assert sorted(reply.worker for reply in replies) == ["w1", "w2", "w3"]
    assert time.monotonic() - began < 30.0
    (reply,) = await client.command("w2", "drain", DRAIN)
    assert reply.worker == "w2"


async def test_nobody_and_silence_are_told_apart(client: Client, bus: Nats) -> None:
    """No such worker is said at once; one that listens and does not answer, after the timeout."""
    for worker in ("w1", "all"):
        began = time.monotonic()
        with pytest.raises(NoAnswerError, match="fleet 'main'"):
            await client.command(worker, "drain", DRAIN, timeout_s=60.0)
        with pytest.raises(NoAnswerError, match="fleet 'main'"):
            await client.query(worker, "status", timeout_s=60.0)
        assert time.monotonic() - began < 30.0
    assert await client.statuses() == {}

    async def silent(_: Msg) -> None:
        """Say nothing."""

    await _serve(bus, client, "w1", silent)
    with pytest.raises(NoAnswerError, match=r"did not answer within 0\.3 s"):
        await client.command("w1", "drain", DRAIN, timeout_s=0.3)
    with pytest.raises(NoAnswerError, match=r"did not answer within 0\.3 s"):
        await client.query("w1", "status", timeout_s=0.3)


async def test_a_frozen_server_is_given_up_for_another(nats_server: NatsServer, tmp_path: Path) -> None:
    """Its connections stay open and nothing answers: whoever was on it goes to another, before leaders are given up."""
    (tmp_path / "other").mkdir()
    servers = {server.port: server for server in (nats_server, NatsServer(tmp_path / "other").start())}
    told: list[str] = []
    try:
        connection = Connection(urls=tuple(server.url for server in servers.values()))
        async with await Client.connect(connection, notice=told.append) as client:
            first = client.nc.connected_url.port
            servers[first].pause()
            await eventually(lambda: "back" in told, 60.0)
            assert client.nc.connected_url.port != first
    finally:
        for server in servers.values():
            server.kill()
    assert Settings.from_env({}).leader_lease_s > (MAX_PINGS + 1) * PING_INTERVAL_S


def test_the_server_that_was_lost_is_not_the_next_one() -> None:
    """Another is tried first, whichever has failed more often; a single one is tried again."""
    one, two = (Server(uri=urlsplit(f"nats://{host}:4222")) for host in "ab")
    two.reconnects = 9
    assert {next_server([one, two], one.uri.netloc)[0].uri for _ in range(20)} == {two.uri}
    assert {next_server([one, two], None)[0].uri for _ in range(50)} == {one.uri, two.uri}
    assert next_server([one], one.uri.netloc)[0] is one


async def test_a_status_in_parts_comes_back_whole(client: Client, bus: Nats) -> None:
    """A frame over NATS's payload limit is put together again, for one worker and for all."""

    async def answer(message: Msg) -> None:
        for part, tenant in enumerate("ab"):
            status = frame("w1", "01A", 1, row(tenant), part=part, parts=2)
            await message.respond(encode(status))

    await _serve(bus, client, "w1", answer)
    (one,) = await client.query("w1", "status")
    assert [each.tenant for each in one.tenants] == ["a", "b"]
    assert await client.statuses() == {"w1": one}


async def test_a_refused_query_carries_its_code_and_text(client: Client, bus: Nats) -> None:
    """Headers become a `RefusedError`; among `all`, one that answers outweighs those that refuse."""

    async def refuse(message: Msg) -> None:
        headers = {CODE_HEADER: "404", ERROR_HEADER: "no request r1 here"}
        await bus.publish(message.reply, b"", headers=headers)

    await _serve(bus, client, "w1", refuse)
    for worker in ("w1", "all"):
        with pytest.raises(RefusedError, match="no request r1 here") as refused:
            await client.query(worker, "request", RequestQuery(request="r1"))
        assert refused.value.code is Code.NOT_FOUND

    async def page(message: Msg) -> None:
        await message.respond(b'{"requests": [], "next": null, "total": 0}')

    await _serve(bus, client, "w2", page)
    assert [answer.total for answer in await client.query("all", "queue")] == [0]


async def test_frames_come_as_they_are_published(client: Client, bus: Nats) -> None:
    """The live view yields every worker's frames and passes over what is not one."""
    frames = client.frames()
    first = asyncio.ensure_future(anext(frames))
    await asyncio.sleep(0.1)
    for payload in (b"nonsense", encode(frame("w7"))):
        await bus.publish(client.subjects.status("w7"), payload)
    assert (await asyncio.wait_for(first, 2)).worker == "w7"
    await frames.aclose()


async def test_a_worker_name_that_is_no_token_is_refused(client: Client) -> None:
    """A name with a dot or a wildcard would reach other subjects; it is refused before anything is sent."""
    for name in ("a.b", "*", ">", "", "W1"):
        with pytest.raises(NameRefusedError):
            await client.command(name, "drain", DRAIN)


async def test_no_server_says_what_to_do() -> None:
    """Without NATS the error names the address (no password) and the setting, at once; bad TLS files too."""
    began = time.monotonic()
    with pytest.raises(UnreachableError, match=r"nats://127.0.0.1:9.*COX_NATS_URL"):
        await Client.connect(Connection(urls=("nats://127.0.0.1:9",)), timeout_s=5.0)
    assert time.monotonic() - began < 2.0
    with pytest.raises(UnreachableError) as told:
        await Client.connect(Connection(urls=("nats://me:secret@127.0.0.1:9", "me:x@secret@127.0.0.1:9")))
    assert "secret" not in str(told.value)
    with pytest.raises(UnreachableError, match=r"missing\.pem"):
        await Client.connect(Connection(ca="missing.pem"))
