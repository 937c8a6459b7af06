"""The event log in a real JetStream: read to its end, followed, resumed, explained."""

import asyncio
import json
import time
from typing import Any

import msgspec
import pytest
from nats.js import JetStreamContext
from typer.testing import CliRunner

from coxswain.common.connection import Connection
from coxswain.control.cli import app
from coxswain.control.cli.exits import Exit
from coxswain.control.client import Client
from coxswain.control.errors import NotSetUpError
from coxswain.control.tables import init
from coxswain.schemas import events as ev
from tests.support.log import LoggedEngine
from tests.support.nats import NatsServer

pytestmark = pytest.mark.nats


def connection(server: NatsServer) -> Connection:
    """Fleet `main` on this server."""
    return Connection(urls=(server.url,), fleet="main")


async def store(client: Client, *events: ev.Event) -> None:
    """Put events where a worker's bus puts them, and wait until JetStream has them."""
    for event in events:
        subject = client.subjects.event(event.worker, str(type(event).__struct_config__.tag))
        await client.js.publish(subject, msgspec.json.encode(event), headers={"Nats-Msg-Id": event.id})


def numbered(first: int, count: int, at: float) -> list[ev.Event]:
    """Events that are told apart by `seq`."""
    return [
        ev.FirstToken(
            id=f"w1:01A:{seq}", worker="w1", incarnation="01A", seq=seq, at=at, step=seq, request=f"r{seq}",
            tenant="acme" if seq % 2 else "globex", ttft_s=0.1,
        )
        for seq in range(first, first + count)
    ]  # fmt: skip


async def read(client: Client, count: int | None = None, **options: Any) -> list[int]:
    """The numbers of the events of the log; the first `count` if it goes on."""
    found: list[int] = []
    stream = client.events(**options)
    try:
        async for event in stream:
            assert isinstance(event, ev.Event)
            found.append(event.seq)
            if count is not None and len(found) >= count:
                break
    finally:
        await stream.aclose()
    return found


async def test_a_log_is_read_to_its_end_while_it_grows(nats_server: NatsServer) -> None:
    """In order, once each, however fast new events come; nobody waits for the last one."""
    async with await Client.connect(connection(nats_server)) as client:
        await init(client.js, client.subjects)
        await store(client, *numbered(1, 1_200, time.time()))

        enough = asyncio.Event()  # asked, not cancelled: nats-py may swallow that and write on

        async def go_on() -> None:
            for seq in range(1_201, 5_000):
                if enough.is_set():
                    return
                await store(client, *numbered(seq, 1, time.time()))

        writing = asyncio.create_task(go_on())
        try:
            for _ in range(3):
                seqs = await asyncio.wait_for(read(client, start="all", follow=False), 30)
                assert seqs[:1_200] == list(range(1, 1_201))
                assert seqs == list(range(1, len(seqs) + 1))
        finally:
            enough.set()
            await writing
        assert await read(client, start="all", follow=False, tenant="acme") == [
            seq for seq in await read(client, start="all", follow=False) if seq % 2
        ]


async def test_a_long_log_is_read_without_a_stall(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server stops after some megabytes until it is told that they were taken: one consumer reads all."""
    made = []
    real = JetStreamContext.add_consumer

    async def add_consumer(js: JetStreamContext, *arguments: Any, **more: Any) -> Any:
        made.append(arguments)
        return await real(js, *arguments, **more)

    monkeypatch.setattr(JetStreamContext, "add_consumer", add_consumer)
    async with await Client.connect(connection(nats_server)) as client:
        await init(client.js, client.subjects)
        for seq in range(3_000):
            event = ev.Limited(
                id=f"w1:01A:{seq}", worker="w1", incarnation="01A", seq=seq, at=0.0, step=0, by="operator",
                detail="x" * 2_000,
            )  # fmt: skip
            await client.nc.publish(client.subjects.event("w1", "limited"), msgspec.json.encode(event))
        deadline = time.monotonic() + 30
        while (await client.js.stream_info(client.subjects.stream)).state.messages < 3_000:
            assert time.monotonic() < deadline, "JetStream did not store them"
            await asyncio.sleep(0.05)
        assert await read(client, start="all", follow=False) == list(range(3_000))
    assert len(made) == 1


async def test_an_empty_log_ends_at_once(nats_server: NatsServer) -> None:
    """And one that was never made is named."""
    async with await Client.connect(connection(nats_server)) as client:
        with pytest.raises(NotSetUpError, match="cox init"):
            await read(client, start="all", follow=False)
        await init(client.js, client.subjects)
        assert await asyncio.wait_for(read(client, start=time.time() - 60, follow=False), 30) == []


async def test_a_reader_goes_on_after_the_server_was_restarted(nats_server: NatsServer) -> None:
    """Behind the last event that it was given: none twice, none missing."""
    async with await Client.connect(connection(nats_server)) as client:
        await init(client.js, client.subjects)
        await store(client, *numbered(1, 20, time.time()))
        reading = asyncio.create_task(read(client, 40, start="all"))
        await asyncio.sleep(0.3)
        nats_server.restart()
        deadline = time.monotonic() + 30
        for event in numbered(21, 20, time.time()):
            while True:
                try:
                    await store(client, event)
                    break
                except Exception:  # noqa: BLE001  (whatever NATS says while it is away)
                    assert time.monotonic() < deadline, "NATS did not come back"
                    await asyncio.sleep(0.1)
        assert await asyncio.wait_for(reading, 40) == list(range(1, 41))


async def test_explain_reads_what_workers_wrote(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a real core's events in JetStream to a story on the terminal, and as JSON."""
    monkeypatch.setenv("COX_NATS_URL", nats_server.url)
    made = LoggedEngine(slots=2)
    made.now = time.time() - 30.0
    for tenant in ("b", "b", "a"):
        made.submit(tenant, prompt=50)
    mine = made.submit("a", prompt=50)
    while mine in made.waiting:
        made.wait(1.0)
        made.admit()
    made.wait(2.0)
    made.finish(mine)
    async with await Client.connect(connection(nats_server)) as client:
        await init(client.js, client.subjects)
        await store(client, *made.log)

    def cox(*arguments: str) -> Any:
        return CliRunner().invoke(app, arguments)

    told = await asyncio.to_thread(cox, "explain", mine.request, "--json")
    assert told.exit_code == Exit.DONE, told.output
    [child] = json.loads(told.stdout)["children"]
    assert {(each["tenant"], each["why"]) for each in child["ahead"]} == {
        ("a", "earlier"),
        ("b", "lower virtual time"),
    }
    assert child["finished"]["queued_s"] == pytest.approx(child["queued_s"])
    found = await asyncio.to_thread(cox, "explain", "--tenant", "a", "--since", "10m")
    assert found.exit_code == Exit.DONE, found.output
    assert "went first while it waited" in found.stdout
    for arguments, code, words in (
        (("explain",), Exit.USAGE, "name either a request"),
        (("explain", mine.request, "--tenant", "a"), Exit.USAGE, "or a tenant"),
        (("explain", "nobody"), Exit.NOT_FOUND, "has nothing on request nobody"),
        (("explain", "--tenant", "nobody"), Exit.NOT_FOUND, "look further back"),
    ):
        refused = await asyncio.to_thread(cox, *arguments)
        assert (refused.exit_code, words in refused.stderr) == (code, True), refused.output
