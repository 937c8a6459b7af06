"""The programs of docs/events.md, run as they stand against a real JetStream."""

import asyncio
import os
import sys
import time
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path

import duckdb
import msgspec
import pytest

from coxswain.common.connection import Connection
from coxswain.control.client import Client
from coxswain.control.tables import init
from coxswain.schemas import events as ev
from tests.integration.test_event_log import store
from tests.support.log import LoggedEngine
from tests.support.nats import NatsServer

pytestmark = pytest.mark.nats

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


async def run(server: NatsServer, program: str, *arguments: str) -> asyncio.subprocess.Process:
    """Start an example."""
    env = {**os.environ, "COX_NATS_URL": server.url, "COX_FLEET": "main"}
    return await asyncio.create_subprocess_exec(
        sys.executable, str(EXAMPLES / program), *arguments, env=env, stdout=PIPE, stderr=STDOUT
    )


def served(*tenants: str, first: int = 0) -> LoggedEngine:
    """A request of each tenant, from beginning to end; `first` numbers them."""
    made = LoggedEngine(slots=4)
    made.now, made.made = time.time() - 5.0, first
    for tenant in tenants:
        record = made.submit(tenant)
        made.admit()
        made.wait(0.5)
        made.finish(record)
    return made


async def test_events_are_kept_in_duckdb_once_however_often_the_program_runs(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """A second run adds what is new and nothing twice; the sums are those of the log."""
    path = tmp_path / "events.duckdb"
    made = served("acme", "globex", "acme")
    half = len(made.log) // 2
    async with await Client.connect(Connection(urls=(nats_server.url,), fleet="main")) as client:
        await init(client.js, client.subjects)
        for part in (made.log[:half], made.log[half:], []):
            await store(client, *part)
            program = await run(nats_server, "events_to_duckdb.py", str(path), "once")
            said, _ = await asyncio.wait_for(program.communicate(), 30)
            assert program.returncode == 0, said.decode()
    with duckdb.connect(str(path), read_only=True) as db:
        kept = db.execute("SELECT id, kind, tenant FROM events ORDER BY id").fetchall()
        waits = db.execute(
            "SELECT sum((event->>'queued_s')::DOUBLE) FROM events WHERE kind = 'finished'"
        ).fetchone()
    wanted = [(each.id, str(type(each).__struct_config__.tag), each.tenant) for each in made.log]
    assert sorted(kept) == sorted(wanted)
    assert waits == (pytest.approx(sum(e.queued_s for e in made.log if isinstance(e, ev.Finished))),)


def written(path: Path, text: bytes) -> bool:
    """Whether a database has it in its file, or in the log beside it."""
    return any(text in file.read_bytes() for file in path.parent.glob(f"{path.name}*"))


async def test_the_last_events_of_a_fleet_that_falls_quiet_are_kept(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """A program that follows, and is killed a moment after nothing more came, has lost nothing."""
    path, made = tmp_path / "events.duckdb", served("acme")
    async with await Client.connect(Connection(urls=(nats_server.url,), fleet="main")) as client:
        await init(client.js, client.subjects)
        await store(client, *made.log)
        program = await run(nats_server, "events_to_duckdb.py", str(path))
        try:
            deadline, last = time.monotonic() + 20, made.log[-1].id.encode()
            while not written(path, last):
                assert time.monotonic() < deadline, "not written"
                await asyncio.sleep(0.2)
        finally:
            program.kill()
            await program.communicate()
    with duckdb.connect(str(path)) as db:
        assert db.execute("SELECT count(*) FROM events").fetchone() == (len(made.log),)


async def test_a_tail_says_what_is_new_of_one_tenant(nats_server: NatsServer) -> None:
    """Only ends, and only its own."""
    async with await Client.connect(Connection(urls=(nats_server.url,), fleet="main")) as client:
        await init(client.js, client.subjects)
        program = await run(nats_server, "events_tail.py", "acme")
        assert program.stdout is not None
        try:
            saying = asyncio.create_task(program.stdout.readline())
            deadline = time.monotonic() + 20
            count = 0
            while not saying.done():
                assert time.monotonic() < deadline, "nothing was said"
                count += 2
                made = served("globex", "acme", first=count)
                for event in made.log:
                    kind = str(type(event).__struct_config__.tag)
                    await client.nc.publish(client.subjects.event("w1", kind), msgspec.json.encode(event))
                await asyncio.sleep(0.1)
            line = (await saying).decode()
        finally:
            program.kill()
            await program.communicate()
    assert line.split()[1] == "stop"
    assert int(line.split()[0].removeprefix("r")) % 2 == 0, line  # the second of each two
