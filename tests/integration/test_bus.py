"""The bus on a real nats-server, in fair weather: commands, queries, status, discovery.

The engine is a thread that drains the port; `test_bus_faults.py` is about outages.
"""

import asyncio
import json
import time
from typing import Any

import msgspec
import nats
import psutil
import pytest
from msgspec.structs import replace

from coxswain.common.connection import Connection
from coxswain.control.client import Client
from coxswain.schemas.commands import Reply, decode_reply
from coxswain.schemas.errors import CODE_HEADER, ERROR_HEADER
from coxswain.schemas.status import QueuePage, decode_config, decode_frame, decode_page, decode_report
from coxswain.schemas.subjects import Subjects
from coxswain.service.bus import intake
from coxswain.service.bus.intake import MAX_PAYLOAD
from coxswain.service.bus.session import Session
from coxswain.service.port import MAX_COMMANDS, AnswerOut, CommandIn, FrameOut, LeadIn, QueryIn, ReplyOut
from tests.support.bus import FLEET, Worker, add_stream, stored
from tests.support.engine import INCARNATION, WORKER, event, frame
from tests.support.nats import NatsServer
from tests.support.waiting import eventually

pytestmark = pytest.mark.nats
SUBJECTS = Subjects(FLEET)
TARGETS = {"requests": ["r1"]}


@pytest.fixture
async def client(nats_server: NatsServer):
    """An operator's connection."""
    async with await nats.connect(nats_server.url) as connection:
        yield connection


@pytest.fixture
async def worker(nats_server: NatsServer):
    """A connected worker."""
    with Worker(nats_server.url) as started:
        yield await started.connected()


async def ask(client, role: str, verb: str, payload: object, *, to: str = WORKER):
    """Send one command; its reply and the headers."""
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    answer = await client.request(SUBJECTS.command(role, to, verb), data, timeout=5)
    return decode_reply(answer.data), answer.headers or {}


async def test_command_reaches_the_engine_and_is_answered(client, worker: Worker) -> None:
    """A command wakes the engine, arrives as its struct with unknown fields named, and is answered."""
    sent = {"id": "c1", "targets": TARGETS, "kv": "keep", "leas_s": 3}
    reply, headers = await ask(client, "operator", "preempt", sent)
    taken = worker.engine.taken[-1]
    assert isinstance(taken, CommandIn)
    assert (taken.role, taken.verb, taken.command.id, taken.command.kv) == (
        "operator",
        "preempt",
        "c1",
        "keep",
    )
    assert (reply.outcome, reply.ignored, headers) == ("applied", ("leas_s",), {})


async def test_command_to_all_reaches_every_worker(client, nats_server: NatsServer, worker: Worker) -> None:
    """What is sent to `all` is delivered to each worker, not to one of them."""
    with Worker(nats_server.url, COX_WORKER="w2") as second:
        await second.connected()
        await client.publish(
            SUBJECTS.command("operator", "all", "abort"), b'{"id": "c1", "targets": {"all": true}}'
        )
        await eventually(lambda: worker.engine.commands() == second.engine.commands() == ["c1"])


async def test_command_without_reply_subject_is_applied(client, worker: Worker) -> None:
    """Fire and forget works."""
    await client.publish(
        SUBJECTS.command("operator", WORKER, "abort"), b'{"id": "c2", "targets": {"all": true}}'
    )
    await eventually(lambda: worker.engine.commands() == ["c2"])


async def test_every_static_refusal(client, worker: Worker) -> None:
    """Each refusal arrives as body and headers, names the command, and nothing of it reaches the engine."""
    now = time.time()
    refused = [
        ("nobody", "abort", {"id": "c", "targets": TARGETS}, 403),
        ("operator", "fly", {"id": "c"}, 400),
        ("operator", "abort", b'{"id": "c", "targets": ', 400),
        ("operator", "abort", {"id": "c", "targets": TARGETS, "expires_at": now + 90}, 400),
        ("operator", "abort", {"id": "c", "targets": TARGETS, "expires_at": now - 1}, 410),
        ("controller", "abort", {"id": "c", "targets": TARGETS, "epoch": [1, 1]}, 400),
        ("controller", "abort", {"id": "c", "targets": TARGETS, "expires_at": now + 9}, 400),
        ("operator", "abort", {"id": "c", "targets": {"requests": ["r"] * 10_001}}, 413),
        ("operator", "limit", {"id": "c", "targets": TARGETS, "max_running": -1}, 400),
        ("operator", "drain", {"id": "c"}, 400),
    ]
    for role, verb, payload, code in refused:
        reply, headers = await ask(client, role, verb, payload)
        assert (reply.outcome, reply.code, reply.incarnation) == ("rejected", code, INCARNATION), (
            verb,
            payload,
        )
        assert reply.id == ("" if isinstance(payload, bytes) else "c")
        assert headers == {CODE_HEADER: str(code), ERROR_HEADER: reply.error}
        assert abs(reply.worker_now - time.time()) < 5
    assert worker.engine.taken == []
    assert worker.logged("command.refused")


async def test_oversized_payload(tmp_path) -> None:
    """Where the server lets a larger payload through, the worker refuses it, and goes on."""
    server = NatsServer(tmp_path, "max_payload: 4194304").start()
    try:
        with Worker(server.url) as worker:
            await worker.connected()
            async with await nats.connect(server.url) as client:
                reply, _ = await ask(client, "operator", "abort", b" " * (MAX_PAYLOAD + 1))
                assert reply.code == 413
                reply, _ = await ask(client, "operator", "abort", {"id": "c", "targets": TARGETS})
                assert reply.outcome == "applied"
    finally:
        server.kill()


async def test_full_queue_says_so(client, nats_server: NatsServer) -> None:
    """While the engine does not keep up, commands are refused with 429; then they are taken again."""
    with Worker(nats_server.url, busy=True) as worker:
        await worker.connected()
        for number in range(MAX_COMMANDS):
            payload = b'{"id": "c%d", "targets": {"all": true}}' % number
            await client.publish(SUBJECTS.command("operator", WORKER, "abort"), payload)
        await eventually(lambda: worker.port.pending() == MAX_COMMANDS)
        reply, _ = await ask(client, "operator", "abort", {"id": "more", "targets": TARGETS})
        assert (reply.code, reply.id) == (429, "more")
        worker.engine.busy = False
        worker.port.wake_engine()
        await eventually(lambda: worker.port.pending() == 0)
        reply, _ = await ask(client, "operator", "abort", {"id": "again", "targets": TARGETS})
        assert reply.outcome == "applied"


async def test_closing_worker_refuses(client, nats_server: NatsServer) -> None:
    """A worker that shuts down says so instead of letting the sender wait."""
    with Worker(nats_server.url, COX_BUS="thread") as worker:
        await worker.connected()
        worker.port.closing = True
        reply, _ = await ask(client, "operator", "abort", {"id": "c", "targets": TARGETS})
        assert reply.code == 503


async def test_fault_of_our_own_is_not_shown(
    client,
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If checking a command fails in a way nobody foresaw, the sender is refused without our internals."""

    def broken(*_: object) -> None:
        raise KeyError("internals")

    with Worker(nats_server.url, COX_BUS="thread") as worker:
        await worker.connected()
        with monkeypatch.context() as patch:
            patch.setattr(intake, "command", broken)
            reply, headers = await ask(client, "operator", "abort", {"id": "c1", "targets": TARGETS})
        assert reply.code == 400
        assert "internals" not in str(reply) + str(headers)
        assert "KeyError" in worker.logged("command.check_failed")[0]["exception"]
        reply, _ = await ask(client, "operator", "abort", {"id": "c2", "targets": TARGETS})
        assert reply.outcome == "applied"


async def test_queries(client, worker: Worker) -> None:
    """All four queries are answered; a status answer carries this moment and no new number."""

    async def query(what: str, payload: bytes = b"") -> bytes:
        return (await client.request(SUBJECTS.query(WORKER, what), payload, timeout=5)).data

    assert decode_page(await query("queue", b'{"limit": 5}')).total == 0
    assert isinstance(worker.engine.taken[-1], QueryIn)
    assert worker.engine.taken[-1].query.limit == 5
    assert decode_report(await query("request", b'{"request": "r9"}')).request == "r9"
    assert decode_config(await query("config")).worker == WORKER
    status = decode_frame(await query("status"))
    assert (status.seq, status.parts) == (0, 1)
    assert abs(status.sent_at - time.time()) < 5


async def test_bad_query_is_refused(client, worker: Worker) -> None:
    """A query that cannot be answered gets an error body and the service headers."""
    answer = await client.request(SUBJECTS.query(WORKER, "weather"), b"", timeout=5)
    body = json.loads(answer.data)
    assert body["code"] == 400
    assert answer.headers == {CODE_HEADER: "400", ERROR_HEADER: body["error"]}
    assert worker.engine.taken == []


async def test_lead_reaches_the_engine(client, worker: Worker) -> None:
    """A leader's heartbeat is handed on; a malformed one is logged once and ignored."""
    for _ in range(3):
        await client.publish(SUBJECTS.lead, b"{}")
    await client.publish(SUBJECTS.lead, b'{"epoch": [1.0, 2], "controller": "c", "policy": "vtc", "at": 1.0}')
    await eventually(lambda: worker.engine.taken)
    assert isinstance(worker.engine.taken[0], LeadIn)
    assert worker.engine.taken[0].lead.epoch == (1.0, 2)
    assert len(worker.logged("lead.malformed")) == 1


async def test_idle_frame_is_repeated_until_the_engine_speaks(client, worker: Worker) -> None:
    """A sleeping engine's last frame comes again every second; a frame of a waking one ends that."""
    status = await client.subscribe(SUBJECTS.status(WORKER))
    await client.flush()
    worker.engine.send_frame(frame(age_s=1.0), idle=True)
    first, second, third = [decode_frame((await status.next_msg(timeout=30)).data) for _ in range(3)]
    assert (first.seq, second.seq, third.seq) == (1, 2, 3)
    assert 0.9 < third.sent_at - second.sent_at < 10
    assert third.leader.age_s - second.leader.age_s == pytest.approx(third.sent_at - second.sent_at, abs=0.01)
    worker.engine.send_frame(frame(full=False))
    said = [decode_frame((await status.next_msg(timeout=30)).data) for _ in range(2)]
    assert [each.full for each in said] == [False, True], "what changed, and everything, which is due"
    with pytest.raises(TimeoutError):
        await status.next_msg(timeout=1.5)


async def test_sleeping_bus_uses_no_cpu(worker: Worker) -> None:
    """With nothing to do but the heartbeat, neither the engine's process nor the bus's uses CPU worth the name."""
    worker.engine.send_frame(frame(), idle=True)
    bus = psutil.Process(worker.bus.pid)
    began, bus_began = time.process_time(), sum(bus.cpu_times()[:2])
    await asyncio.sleep(1.5)
    assert time.process_time() - began < 0.1
    assert sum(bus.cpu_times()[:2]) - bus_began < 0.1


async def test_large_frame_is_split(tmp_path) -> None:
    """A frame over the server's max_payload arrives in parts that hold every row."""
    server = NatsServer(tmp_path, "max_payload: 8192").start()
    try:
        with Worker(server.url) as worker:
            await worker.connected()
            async with await nats.connect(server.url) as client:
                status = await client.subscribe(SUBJECTS.status(WORKER))
                await client.flush()
                worker.engine.send_frame(frame(requests=200, tenants=20))
                parts = [decode_frame((await status.next_msg(timeout=30)).data)]
                while len(parts) < parts[0].parts:
                    parts.append(decode_frame((await status.next_msg(timeout=30)).data))
        assert len(parts) > 3
        assert {part.seq for part in parts} == {1}
        assert sum(len(part.requests) for part in parts) == 200
        assert sum(len(part.tenants) for part in parts) == 20
    finally:
        server.kill()


async def test_large_answer_to_a_status_query_is_split(tmp_path) -> None:
    """What is published in parts is answered in parts, which a client puts together."""
    server = NatsServer(tmp_path, "max_payload: 8192").start()
    try:
        with Worker(server.url) as worker:
            await worker.connected()
            worker.engine.status = frame(requests=200, tenants=20)
            async with await Client.connect(Connection(urls=(server.url,), fleet=FLEET)) as asked:
                (answer,) = await asked.query(WORKER, "status")
        assert (answer.part, answer.parts) == (0, 1)
        assert (len(answer.requests), len(answer.tenants)) == (200, 20)
    finally:
        server.kill()


async def test_alarm_wakes_a_sleeping_engine(worker: Worker) -> None:
    """The engine is woken when it asked for it, an earlier wish replaces a later one, and none is no wish."""
    wakes = await eventually(lambda: worker.engine.wakes)  # by the connection
    worker.port.wake_later(30.0)
    began = time.monotonic()
    worker.port.wake_later(0.2)
    await eventually(lambda: worker.engine.wakes == wakes + 1)
    assert 0.19 < time.monotonic() - began < 20
    worker.port.wake_later(0.2)
    worker.port.wake_later(None)
    await asyncio.sleep(0.5)
    assert worker.engine.wakes == wakes + 1
    worker.port.wake_later(0.0)
    await eventually(lambda: worker.engine.wakes == wakes + 2)


async def test_second_incarnation_is_reported_by_both(nats_server: NatsServer, worker: Worker) -> None:
    """Two workers under one name each log the other's incarnation, once however many frames they see."""
    with Worker(nats_server.url, incarnation="01HZXW5N6C3V9Q8R7T2K4M1XYZ") as twin:
        await twin.connected()
        for _ in range(5):
            worker.engine.send_frame(frame())
            twin.engine.send_frame(msgspec.structs.replace(frame(), incarnation="01HZXW5N6C3V9Q8R7T2K4M1XYZ"))
            await asyncio.sleep(0.02)
        await eventually(lambda: worker.logged("worker.second_incarnation"))
        await eventually(lambda: twin.logged("worker.second_incarnation"))
        assert len(worker.logged("worker.second_incarnation")) == 1
        assert worker.logged("worker.second_incarnation")[0]["other"] == "01HZXW5N6C3V9Q8R7T2K4M1XYZ"
        assert twin.logged("worker.second_incarnation")[0]["other"] == INCARNATION


async def test_service_discovery_shows_the_worker(client, worker: Worker) -> None:
    """NATS's own `$SRV.PING` finds the worker, its fleet, name, incarnation and what it says of itself."""
    answer = json.loads((await client.request("$SRV.PING.coxswain-worker", b"", timeout=5)).data)
    assert answer["metadata"] == {
        "model": "model",
        "fleet": FLEET,
        "worker": WORKER,
        "incarnation": INCARNATION,
    }


async def test_flood_of_rubbish_does_not_stop_the_bus(client, worker: Worker) -> None:
    """Thousands of malformed commands are each refused, logged once, and a good one still gets through."""
    for _ in range(3_000):
        await client.publish(SUBJECTS.command("operator", WORKER, "abort"), b"rubbish")
    reply, _ = await ask(client, "operator", "abort", {"id": "good", "targets": TARGETS})
    assert reply.outcome == "applied"
    assert len(worker.logged("command.refused")) == 1
    status = await client.subscribe(SUBJECTS.status(WORKER))
    await client.flush()
    worker.engine.send_frame(frame())
    counted = decode_frame((await status.next_msg(timeout=30)).data)
    assert counted.commands.rejected_total == {"400": 3_000}
    assert counted.commands.outcomes_total == {"abort": {"400": 3_000}}


async def test_an_item_that_cannot_be_sent_costs_no_other(client, nats_server: NatsServer) -> None:
    """Of what waits together one item of each kind is broken: the others go out, and the log says that some failed."""
    await add_stream(nats_server.url)
    bad: Any = object()
    reply = Reply(id="c1", worker=WORKER, incarnation=INCARNATION, worker_now=1.0, step=1, outcome="applied")
    answers, status = await client.subscribe("in.*"), await client.subscribe(SUBJECTS.status(WORKER))
    with Worker(nats_server.url, COX_BUS="thread") as worker:
        await worker.connected()
        waiting = worker.port.outbound
        waiting.extend([event(1), replace(event(2), kind="none"), event(3)])
        waiting.extend(
            [ReplyOut("in.1", bad), ReplyOut("in.2", reply), AnswerOut("in.3", bad), FrameOut(bad, False)]
        )
        waiting.extend(
            [AnswerOut("in.4", QueuePage(requests=(), next=None, total=7)), ReplyOut("in.5", reply)]
        )
        worker.engine.send_frame(frame(requests=3))
        assert [(await answers.next_msg(timeout=30)).subject for _ in range(3)] == ["in.2", "in.4", "in.5"]
        assert len(decode_frame((await status.next_msg(timeout=30)).data).requests) == 3
        worker.bus.stop()
        assert worker.logged("bus.pump_failed")
    assert await stored(nats_server.url) == [1, 3]


async def test_a_heartbeat_that_fails_is_tried_again(
    client, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fails is followed by others when they are due, no sooner."""
    beat, tried = Session.heartbeat, []

    async def fail_once(session: Session) -> None:
        tried.append(time.monotonic())
        if len(tried) == 1:
            raise ValueError("once")
        await beat(session)

    monkeypatch.setattr(Session, "heartbeat", fail_once)
    status = await client.subscribe(SUBJECTS.status(WORKER))
    with Worker(nats_server.url, COX_BUS="thread") as worker:
        await worker.connected()
        worker.engine.send_frame(frame(requests=3), idle=True)
        await status.next_msg(timeout=30)
        await status.next_msg(timeout=30)
    assert tried[1] - tried[0] > 0.9
