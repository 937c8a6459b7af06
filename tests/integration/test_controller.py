"""The controller against a real nats-server: leading, taking over, stepping down, tables, loss of NATS."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.js.api import StreamConfig
from nats.js.errors import KeyNotFoundError

from coxswain.control.client import Client
from coxswain.control.core import Send
from coxswain.control.daemon import Controller, run
from coxswain.control.errors import NotSetUpError, RowError, UnreachableError
from coxswain.control.lease import KEY, Lease
from coxswain.control.policies.fcfs import Fcfs
from coxswain.control.policies.vtc import Vtc
from coxswain.control.tables import LEASE_TTL_S, LogLimits, init
from coxswain.schemas.commands import decode, encode
from coxswain.schemas.names import tenant_key
from coxswain.schemas.policy import ClassPolicy, LeaseHolder, TenantPolicy, digest
from coxswain.schemas.subjects import CONTROLLER
from tests.support.nats import NatsServer
from tests.support.waiting import eventually
from tests.support.working import connection, working

pytestmark = pytest.mark.nats


@pytest.fixture
async def client(nats_server: NatsServer) -> AsyncIterator[Client]:
    """A client of a fleet that was set up."""
    async with await Client.connect(connection(nats_server)) as client:
        await init(client.js, client.subjects)
        yield client


@asynccontextmanager
async def controlling(server: NatsServer, policy: Any = None, name: str = "") -> AsyncIterator[Controller]:
    """A controller that runs beside the test and is stopped in order at the end."""
    controller = Controller(connection(server), policy or Vtc(Vtc.Params()), name=name)
    task = asyncio.create_task(controller.run())
    try:
        yield controller
    finally:
        controller.stopping.set()
        await asyncio.wait_for(task, 30)


def leads(controller: Controller) -> bool:
    """Whether it holds the lease now."""
    return controller.lease is not None and controller.lease.epoch is not None


async def test_one_of_two_leads_and_the_other_takes_over(nats_server: NatsServer, client: Client) -> None:
    """A leader that is stopped gives its lease back, and a standby leads soon after, with a later epoch."""
    async with (
        controlling(nats_server, name="second") as second,
        controlling(nats_server, name="first") as first,
    ):
        await eventually(lambda: leads(first) or leads(second))
        await asyncio.sleep(0.6)
        assert not (leads(first) and leads(second))
        await eventually(lambda: leads(first) != leads(second))
        leader, standby = (first, second) if leads(first) else (second, first)
        assert leader.lease is not None
        before = leader.lease.epoch
        leader.stopping.set()
        await eventually(lambda: leads(standby))
        assert standby.lease is not None
        assert standby.lease.epoch > before


async def test_a_controller_that_vanishes_is_replaced_after_its_lease(
    nats_server: NatsServer, client: Client
) -> None:
    """Nobody gives a crashed leader's lease back: a standby leads once it has run out, and never before."""
    holder = LeaseHolder(controller="crashed", policy="vtc", since=0.0)
    crashed = Lease(client.js, client.subjects, holder)
    task = asyncio.create_task(crashed.run())
    await eventually(lambda: crashed.epoch is not None)
    async with controlling(nats_server) as standby:
        await asyncio.sleep(1.5)
        assert not (leads(standby) and crashed.epoch), "two led at once"
        task.cancel()
        await eventually(lambda: leads(standby))
        assert crashed.epoch is None, "two led at once"


async def test_a_worker_that_claims_a_later_epoch_is_named_and_the_others_are_led_on(
    nats_server: NatsServer, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the lease says who leads: whatever a worker says of epochs, the same leader goes on, and says who it was."""
    async with (
        working(nats_server) as honest,
        working(nats_server, "liar") as liar,
        controlling(nats_server) as controller,
    ):
        await eventually(lambda: leads(controller) and honest.epoch and liar.epoch)
        liar.epoch = (9e9, 1)
        said = ""

        def named() -> bool:
            nonlocal said
            told = capsys.readouterr()
            said += told.out + told.err
            return "lease.disputed" in said and "liar" in said

        await eventually(named)
        await client.tenants.put("acme", TenantPolicy(weight=2.0))
        await eventually(lambda: honest.config == digest({}, {"acme": TenantPolicy(weight=2.0)}))
        named()
    ended = [line for line in said.splitlines() if "lease.lost" in line or "lease.given_up" in line]
    # On a machine that stalls a lease may run out, which is nobody's word.
    assert all("could not renew in time" in line or "the key changed" in line for line in ended), ended


async def test_a_table_edit_reaches_the_worker(nats_server: NatsServer, client: Client) -> None:
    """Rows that are put and deleted while the leader runs are in force on the worker a moment later."""
    async with working(nats_server) as worker, controlling(nats_server) as controller:
        await eventually(lambda: leads(controller) and worker.epoch)
        classes, tenants = {"batch": ClassPolicy(position=5)}, {"acme/ü": TenantPolicy(weight=2.0)}
        await client.classes.put("batch", classes["batch"])
        await client.tenants.put("acme/ü", tenants["acme/ü"])
        await eventually(lambda: worker.config == digest(classes, tenants))
        classes = {"batch": ClassPolicy(position=6)}
        await client.classes.put("batch", classes["batch"])
        await eventually(lambda: worker.config == digest(classes, tenants))
        assert await client.tenants.delete("acme/ü")
        await eventually(lambda: worker.config == digest(classes, {}))
        assert not await client.tenants.delete("acme/ü")


async def test_edits_are_in_force_everywhere_within_a_second(nats_server: NatsServer, client: Client) -> None:
    """On three workers, after rows of both tables; a row that cannot be read holds up none of the others."""
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(working(nats_server, f"w{n}")) for n in range(3)]
        await stack.enter_async_context(controlling(nats_server))
        await eventually(lambda: all(worker.epoch for worker in workers))
        bucket = await client.js.key_value(client.tenants.bucket)
        classes, tenants, took = {}, {}, []
        for number in range(4):
            await bucket.put(tenant_key("broken"), b'{"weight": "much"}')
            classes["batch"] = ClassPolicy(position=number)
            tenants["acme"] = TenantPolicy(weight=2.0 + number)
            await client.classes.put("batch", classes["batch"])
            await client.tenants.put("acme", tenants["acme"])
            wanted = digest(classes, tenants)
            put_at = time.monotonic()
            await eventually(lambda: {worker.config for worker in workers} == {wanted})  # noqa: B023
            took.append(time.monotonic() - put_at)
    # A machine that has other things to do may be late once.
    assert min(took) < 1.0


async def test_a_bad_row_is_refused_and_the_last_good_one_stays(
    nats_server: NatsServer, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row written past the client is refused with a reason, also by a controller that starts later."""
    with pytest.raises(RowError, match="weight"):
        await client.tenants.put("acme", TenantPolicy(weight=-1.0))
    await client.tenants.put("acme", TenantPolicy(weight=2.0))
    bucket = await client.js.key_value(client.tenants.bucket)
    await bucket.put(tenant_key("acme"), b'{"weight": "much"}')
    await client.tenants.put("other", TenantPolicy(weight=3.0))
    wanted = digest({}, {"acme": TenantPolicy(weight=2.0), "other": TenantPolicy(weight=3.0)})
    async with working(nats_server) as worker, controlling(nats_server):
        await eventually(lambda: worker.config == wanted)
        await client.tenants.put("another", TenantPolicy())
        await eventually(lambda: worker.config != wanted)
    told = capsys.readouterr()
    assert (told.out + told.err).count("tables.row_refused") == 1
    assert "$.weight" in told.out + told.err
    rows = await client.tenants.get_all()
    assert rows.good["acme"].weight == 2.0
    assert "last good row stays" in rows.refused["acme"]


async def test_a_worker_cannot_speak_for_another(
    nats_server: NatsServer, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    """A frame on one worker's subject that claims to be of another is not believed, and is reported."""
    async with working(nats_server) as worker, controlling(nats_server) as controller:
        await eventually(lambda: "w1" in controller.core.fleet.workers)
        for name in ("w9", "No Token.>"):
            forged = msgspec.structs.replace(worker.frame(), worker=name)
            await client.nc.publish(client.subjects.status("w1"), encode(forged))
        await client.nc.flush()
        await asyncio.sleep(0.3)
        assert set(controller.core.fleet.workers) == {"w1"}
    told = capsys.readouterr()
    assert "'w9'" in told.out + told.err


async def test_fcfs_reorders_every_class(nats_server: NatsServer, client: Client) -> None:
    """Under fcfs the worker's classes are in priority order, without anybody editing a table."""
    async with working(nats_server) as worker, controlling(nats_server, Fcfs(Fcfs.Params())):
        await eventually(lambda: worker.config == digest({"default": ClassPolicy(order="priority")}, {}))


async def test_two_workers_share_one_order(nats_server: NatsServer, client: Client) -> None:
    """What one worker serves of a tenant is in the other's virtual time a moment later."""
    async with (
        working(nats_server, "w1") as left,
        working(nats_server, "w2") as right,
        controlling(nats_server) as controller,
    ):
        await eventually(lambda: leads(controller) and left.epoch and right.epoch)
        await asyncio.sleep(0.2)
        left.arrive("greedy", 500, 10, times=5)
        left.step(20)
        assert left.account("greedy").charged > 1000
        await eventually(lambda: right.account("greedy").virtual_time == left.account("greedy").virtual_time)


async def test_nats_restart_mid_run(nats_server: NatsServer, client: Client) -> None:
    """NATS is killed and comes back: somebody leads again, edits arrive, and nothing had to be restarted."""
    async with working(nats_server) as worker, controlling(nats_server) as controller:
        await eventually(lambda: leads(controller) and worker.epoch)
        nats_server.kill()
        await eventually(lambda: not leads(controller))
        nats_server.start()
        await eventually(lambda: leads(controller))
        await eventually(lambda: client.nc.is_connected)
        await client.tenants.put("acme", TenantPolicy(weight=2.0))
        await eventually(lambda: worker.config == digest({}, {"acme": TenantPolicy(weight=2.0)}))


async def test_a_controller_waits_for_nats_and_for_init(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Started before everything else, it says what is missing, and leads once that is there."""
    server = NatsServer(tmp_path)
    async with controlling(server) as controller:
        await asyncio.sleep(2.5)  # several attempts
        server.start()
        try:
            await asyncio.sleep(1.5)
            assert not leads(controller)
            async with await Client.connect(connection(server)) as client:
                await init(client.js, client.subjects)
                await eventually(lambda: leads(controller))
        finally:
            controller.stopping.set()
            await asyncio.sleep(0.3)
            server.kill()
    told = capsys.readouterr()
    said = told.out + told.err
    assert said.count("nats.unreachable") == 1
    assert "nats.lost" not in said
    assert "cox init" in said


async def test_init_is_idempotent_and_says_what_it_did(nats_server: NatsServer) -> None:
    """The first run creates, the second keeps; limits that are named change the log only, and the others stay."""
    async with await Client.connect(connection(nats_server)) as client:
        with pytest.raises(NotSetUpError, match="cox init"):
            await client.tenants.put("acme", TenantPolicy())
        with pytest.raises(NotSetUpError, match="cox init"):
            [event async for event in client.events(start="all", follow=False)]
        assert {made.outcome for made in await init(client.js, client.subjects)} == {"created"}
        assert {made.outcome for made in await init(client.js, client.subjects)} == {"kept"}
        for limits in (LogLimits(max_age_s=3600.0), LogLimits(max_bytes=1 << 20)):
            log, *buckets = await init(client.js, client.subjects, limits)
            assert (log.outcome, {made.outcome for made in buckets}) == ("updated", {"kept"})
        config = (await client.js.stream_info(client.subjects.stream)).config
        assert (config.max_age, config.max_bytes, config.num_replicas) == (3600.0, 1 << 20, 1)


async def test_init_leaves_what_it_does_not_name(client: Client) -> None:
    """Whatever else an operator set on the log stays, but a duplicate window that the named age does not allow."""
    theirs = {
        "max_msgs": 5_000, "max_msg_size": 65_536, "max_msgs_per_subject": 1_000, "duplicate_window": 600.0,
        "description": "ours", "metadata": {"team": "x"},
    }  # fmt: skip

    async def log() -> StreamConfig:
        return (await client.js.stream_info(client.subjects.stream)).config

    before = (await log()).evolve(**theirs)
    await client.js.update_stream(before)
    for limits, more in (
        (LogLimits(max_age_s=3600.0), {"max_age": 3600.0}),
        (LogLimits(max_bytes=1 << 20), {"max_bytes": 1 << 20}),
        (LogLimits(max_age_s=300.0), {"max_age": 300.0, "duplicate_window": 300.0}),
    ):
        for outcome in ("updated", "kept"):
            assert (await init(client.js, client.subjects, limits))[0].outcome == outcome
        before = before.evolve(**more)
        after = await log()
        assert after.evolve(metadata=None) == before.evolve(metadata=None)
        assert (after.metadata or {})["team"] == "x"


async def test_events_are_read_from_the_log_with_filters(client: Client) -> None:
    """The log is read from the start or a time, to its end, by request (public or body id) and tenant."""
    for number, (request, tenant) in enumerate((("r1", "a"), ("1", "b"), ("r1", "a"))):
        event = {"kind": "of a later version", "request": request, "tenant": tenant, "n": number}
        await client.js.publish(client.subjects.event("w1", "later"), msgspec.json.encode(event))

    async def numbers(**wanted: Any) -> list[int]:
        return [event["n"] async for event in client.events(follow=False, **wanted)]

    assert await numbers(start="all") == [0, 1, 2]
    assert await numbers(start="all", request="cmpl-r1") == [0, 2]
    assert await numbers(start="all", tenant="b") == [1]
    assert await numbers(start=time.time() - 60, worker="w1") == [0, 1, 2]
    assert await numbers(start=time.time() + 60) == []


async def test_a_command_is_not_delivered_late(nats_server: NatsServer, client: Client) -> None:
    """What is sent while NATS is away fails at once and stays unsent, though later commands arrive."""
    async with working(nats_server) as worker:
        nats_server.kill()
        await eventually(lambda: not client.nc.is_connected)
        late, _ = decode("configure", b'{"id": "late"}')
        with pytest.raises(UnreachableError, match="nothing was sent"):
            await client.command("w1", "configure", late, role=CONTROLLER)
        nats_server.start()
        await eventually(lambda: client.nc.is_connected)
        worker.epoch = (0.0, 0)
        await asyncio.sleep(0.5)
        prompt, _ = decode("configure", b'{"id": "prompt", "epoch": [1.0, 1]}')
        (reply,) = await client.command("w1", "configure", prompt, role=CONTROLLER)
        assert reply.outcome == "applied"
        assert [each.command.id for each in worker.got if isinstance(each, Send)] == ["prompt"]


async def test_a_leader_cut_off_steps_down_by_its_own_clock(nats_server: NatsServer, client: Client) -> None:
    """With NATS frozen the leader stops leading before the server could give the lease to another."""
    async with controlling(nats_server) as controller:
        await eventually(lambda: leads(controller))
        paused_at = time.monotonic()
        nats_server.pause()
        await eventually(lambda: not leads(controller))
        assert controller.lease is not None
        assert controller.lease._until < paused_at + LEASE_TTL_S
        nats_server.resume()
        await eventually(lambda: leads(controller))


async def test_sigterm_ends_it_in_order(nats_server: NatsServer, client: Client) -> None:
    """`run` returns on SIGTERM, and the lease is free at once."""
    task = asyncio.create_task(run(connection(nats_server), Vtc(Vtc.Params()), name="brief"))
    bucket = await client.js.key_value(client.subjects.lease_bucket)

    async def held() -> bool:
        try:
            return (await bucket.get(KEY)).value is not None
        except KeyNotFoundError:
            return False

    async with asyncio.timeout(30):
        while not await held():  # noqa: ASYNC110  (another process's key, nothing of ours to wait on)
            await asyncio.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(task, 30)
    assert not await held()
