"""The bus when NATS is absent, killed, frozen, slow, or without a stream: the engine never notices."""

import asyncio
import json
import time

import nats
import pytest
from nats.aio.msg import Msg
from nats.js.api import DiscardPolicy, StreamConfig

from coxswain.schemas.commands import decode_reply, encode
from coxswain.schemas.events import decode_event
from coxswain.schemas.status import decode_frame
from coxswain.schemas.subjects import Subjects
from coxswain.service.bus import eventlog
from tests.support.bus import FLEET, Worker, add_stream, stored
from tests.support.engine import INCARNATION, WORKER, event, frame
from tests.support.nats import NatsServer
from tests.support.waiting import eventually

pytestmark = pytest.mark.nats
SUBJECTS = Subjects(FLEET)
ABORT = SUBJECTS.command("operator", WORKER, "abort")


def abort(number: int, **fields: object) -> bytes:
    """A command with a number in its id."""
    return json.dumps({"id": f"c{number}", "targets": {"all": True}, **fields}).encode()


async def test_nats_absent_at_start(tmp_path) -> None:
    """Without NATS the worker starts, says so once, and is steered as soon as NATS appears."""
    server = NatsServer(tmp_path)
    with Worker(server.url) as worker:
        await eventually(lambda: worker.logged("nats.unreachable"))
        await asyncio.sleep(1.0)
        assert not worker.port.connected
        assert len(worker.logged("nats.unreachable")) == 1
        worker.engine.send_frame(frame())  # nobody listens: it is thrown away, not kept
        wakes = worker.engine.wakes
        server.start()
        try:
            await worker.connected()
            await eventually(lambda: worker.engine.wakes > wakes)
            async with await nats.connect(server.url) as client:
                reply = decode_reply((await client.request(ABORT, abort(1), timeout=30)).data)
            assert reply.outcome == "applied"
            assert len(worker.logged("nats.unreachable")) == len(worker.logged("nats.connected")) == 1
        finally:
            server.kill()


async def test_restart_of_nats(nats_server: NatsServer) -> None:
    """After NATS was killed and came back, commands, status and discovery work again, with nothing stale."""
    with Worker(nats_server.url) as worker:
        await worker.connected()
        worker.engine.send_frame(frame(), idle=True)
        async with await nats.connect(nats_server.url, reconnect_time_wait=0.05) as client:
            await client.request(ABORT, abort(1), timeout=30)
            nats_server.kill()
            await eventually(lambda: not worker.port.connected)
            worker.engine.send_frame(frame(full=False))
            wakes = worker.engine.wakes
            nats_server.start()
            await worker.connected()
            await eventually(lambda: worker.engine.wakes > wakes)
            await eventually(lambda: client.is_connected)
            status = await client.subscribe(SUBJECTS.status(WORKER))
            await client.flush()
            await client.request(ABORT, abort(2), timeout=30)
            await client.request("$SRV.PING.coxswain-worker", b"", timeout=30)
            with pytest.raises(TimeoutError):
                await status.next_msg(timeout=1.2)  # neither the old heartbeat nor the frame of the outage
            worker.engine.send_frame(frame(), idle=True)
            assert decode_frame((await status.next_msg(timeout=30)).data).seq == 2
        assert worker.engine.commands() == ["c1", "c2"]
        assert len(worker.logged("nats.lost")) == 1
        assert len(worker.logged("nats.connected")) == 2


async def test_heartbeat_of_a_sleeping_engine_survives_an_outage(nats_server: NatsServer) -> None:
    """An engine that slept through the outage has nothing to say, so its last frame is repeated again."""
    with Worker(nats_server.url) as worker:
        await worker.connected()
        worker.engine.send_frame(frame(requests=3), idle=True)
        nats_server.kill()
        await eventually(lambda: not worker.port.connected)
        await asyncio.sleep(1.2)  # longer than a heartbeat, so that one fell due meanwhile
        nats_server.start()
        async with await nats.connect(nats_server.url) as client:
            status = await client.subscribe(SUBJECTS.status(WORKER))
            beats = [decode_frame((await status.next_msg(timeout=30)).data) for _ in range(2)]
        assert [len(beat.requests) for beat in beats] == [3, 3]
        assert beats[1].seq == beats[0].seq + 1


async def test_command_that_outlived_its_deadline_is_not_applied(nats_server: NatsServer) -> None:
    """A command that a frozen server delivers late is refused: its deadline has passed."""
    with Worker(nats_server.url) as worker:
        await worker.connected()
        async with await nats.connect(nats_server.url) as client:
            await client.flush()
            nats_server.pause()
            answer = asyncio.ensure_future(
                client.request(ABORT, abort(1, expires_at=time.time() + 0.3), timeout=30)
            )
            await asyncio.sleep(0.6)
            nats_server.resume()
            assert decode_reply((await answer).data).code == 410
        assert worker.engine.commands() == []


async def test_frozen_server_is_given_up_and_found_again(nats_server: NatsServer) -> None:
    """A server that keeps the connection but is silent counts as lost; when it thaws, the worker is back."""
    with Worker(nats_server.url) as worker:
        await worker.connected()
        nats_server.pause()
        began = time.monotonic()
        while worker.port.connected:
            worker.engine.send_frame(frame(requests=100))
            assert time.monotonic() - began < 30
            await asyncio.sleep(0.02)
        nats_server.resume()
        await worker.connected()
        async with await nats.connect(nats_server.url) as client:
            await client.request(ABORT, abort(1), timeout=30)
        assert worker.engine.commands() == ["c1"]


async def test_alarm_works_without_nats(tmp_path) -> None:
    """A lease ends on time though NATS is away."""
    with Worker(NatsServer(tmp_path).url) as worker:
        began = time.monotonic()
        worker.port.wake_later(0.2)
        await eventually(lambda: worker.engine.wakes == 1)
        assert time.monotonic() - began > 0.19


async def test_events_are_stored_once_and_in_order_across_a_restart(nats_server: NatsServer) -> None:
    """Events sent before, while and after NATS was killed are all in the stream, once and in order."""
    await add_stream(nats_server.url)
    with Worker(nats_server.url, COX_BUS="thread") as worker:
        await worker.connected()
        worker.engine.send_events(3_000)  # far more than the window: the kill meets many in flight
        await asyncio.sleep(0.02)
        nats_server.kill()
        worker.engine.send_events(500)
        await eventually(lambda: not worker.port.connected)
        worker.engine.send_events(500)
        nats_server.start()
        await worker.connected()
        worker.engine.send_events(500)
        await eventually(lambda: worker.bus.bus._events.waiting == 0)
        assert worker.port.events_dropped == 0
    assert await stored(nats_server.url) == list(range(1, 4_501))


async def test_event_whose_acknowledgement_was_lost_is_stored_once(nats_server: NatsServer) -> None:
    """Events that the stream has already are sent again under the same id, and stored no second time."""
    await add_stream(nats_server.url)
    async with await nats.connect(nats_server.url) as client:
        for seq in range(1, 11):
            sent = event(seq).event(WORKER, INCARNATION)
            await client.jetstream().publish(
                SUBJECTS.event(WORKER, "queued"),
                encode(sent),
                headers={"Nats-Msg-Id": sent.id},
            )
    with Worker(nats_server.url, COX_BUS="thread") as worker:
        await worker.connected()
        worker.engine.send_events(20)
        await eventually(lambda: worker.bus.bus._events.waiting == 0)
    assert await stored(nats_server.url) == list(range(1, 21))


async def test_backlog_is_bounded(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """While NATS is away only so many events are kept: the oldest go first, and each is counted."""
    monkeypatch.setattr(eventlog, "MAX_BACKLOG", 100)
    await add_stream(nats_server.url)
    nats_server.kill()
    with Worker(nats_server.url, COX_BUS="thread") as worker:
        worker.engine.send_events(150)
        await eventually(lambda: worker.port.events_dropped == 50)
        assert len(worker.logged("events.backlog_full")) == 1
        nats_server.start()
        await eventually(lambda: worker.bus.bus._events.waiting == 0)
        assert worker.logged("events.resumed")[0]["dropped_total"] == 50
    assert await stored(nats_server.url) == list(range(51, 151))


async def test_missing_stream_is_named_and_found_later(
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a stream events are dropped and counted, the log says once what to run, and then it works."""
    monkeypatch.setattr(eventlog, "NO_STREAM_SAID_S", 0.1)
    monkeypatch.setattr(eventlog, "NO_STREAM_GRACE_S", 0.3)
    monkeypatch.setattr(eventlog, "PROBE_S", 0.2)
    with Worker(nats_server.url, COX_BUS="thread") as worker:
        await worker.connected()
        worker.engine.send_events(5)
        await eventually(lambda: worker.port.events_dropped == 5)
        worker.engine.send_events(5)
        await eventually(lambda: worker.port.events_dropped == 10)
        assert len(worker.logged("events.no_stream")) == 1
        assert "cox init" in worker.logged("events.no_stream")[0]["hint"]
        await add_stream(nats_server.url)
        await asyncio.sleep(0.3)
        worker.engine.send_events(5)
        await eventually(lambda: worker.logged("events.resumed"))
        await eventually(lambda: worker.bus.bus._events.waiting == 0)
    assert await stored(nats_server.url) == [11, 12, 13, 14, 15]


async def test_who_listens_hears_every_event_without_a_stream(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subscriber keeps NATS from saying that nobody stores events: it hears each all the same, later ones at once."""
    monkeypatch.setattr(eventlog, "ACK_TIMEOUT_S", 0.1)
    monkeypatch.setattr(eventlog, "NO_STREAM_SAID_S", 0.2)
    monkeypatch.setattr(eventlog, "NO_STREAM_GRACE_S", 0.5)
    monkeypatch.setattr(eventlog, "PROBE_S", 0.2)
    heard: list[int] = []

    async def hear(msg: Msg) -> None:
        heard.append(decode_event(msg.data).seq)

    async with await nats.connect(nats_server.url) as client:
        await client.subscribe(SUBJECTS.events_all, cb=hear)
        await client.flush()
        with Worker(nats_server.url, COX_BUS="thread") as worker:
            await worker.connected()
            worker.engine.send_events(1_000)
            await eventually(lambda: set(heard) == set(range(1, 1_001)))
            await eventually(lambda: worker.port.events_dropped == 1_000)
            assert "cox init" in worker.logged("events.no_stream")[0]["hint"]
            heard.clear()
            for last in range(1_100, 1_500, 100):
                worker.engine.send_events(100)
                await eventually(lambda last=last: last in heard)
            await eventually(lambda: worker.port.events_dropped == 1_400)
            assert heard == list(range(1_001, 1_401))
            monkeypatch.undo()  # JetStream may take its time
            await add_stream(nats_server.url)
            while not worker.logged("events.resumed"):
                worker.engine.send_events(1)
                await asyncio.sleep(0.05)
            lost = worker.port.events_dropped
            worker.engine.send_events(300)
            newest = worker.engine._events
            await eventually(lambda: worker.bus.bus._events.settled == newest)
            assert worker.port.events_dropped == lost
    assert (await stored(nats_server.url))[-301:] == list(range(newest - 300, newest + 1))


async def test_stream_that_appears_in_time_loses_nothing(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that is away for a moment, as in an election, is said to be and costs no event and no order."""
    monkeypatch.setattr(eventlog, "NO_STREAM_SAID_S", 0.2)
    monkeypatch.setattr(eventlog, "PROBE_S", 0.1)
    with Worker(nats_server.url, COX_BUS="thread") as worker:
        await worker.connected()
        worker.engine.send_events(600)
        began = time.monotonic()
        await asyncio.sleep(0.3)
        probes = (time.monotonic() - began) / eventlog.PROBE_S
        assert (
            worker.bus.bus._events._sent <= (probes + 3) * eventlog.WINDOW
        )  # it pauses, and does not hammer
        await eventually(lambda: worker.logged("events.no_stream"))
        await add_stream(nats_server.url)
        await eventually(lambda: worker.bus.bus._events.waiting == 0)
        assert worker.port.events_dropped == 0
    assert await stored(nats_server.url) == list(range(1, 601))


async def test_stream_that_refuses(nats_server: NatsServer) -> None:
    """An event that the stream refuses is dropped and counted, and does not keep back those after it."""
    async with await nats.connect(nats_server.url) as client:
        await client.jetstream().add_stream(
            StreamConfig(name=SUBJECTS.stream, subjects=[SUBJECTS.events_all], max_msg_size=10),
        )
    with Worker(nats_server.url) as worker:
        await worker.connected()
        worker.engine.send_events(20)
        await eventually(lambda: worker.port.events_dropped == 20)
        assert len(worker.logged("events.refused")) == 1


async def test_full_stream_keeps_events_waiting(nats_server: NatsServer) -> None:
    """While a stream has no room events wait, said once; when it has, all are stored, once and in order."""
    await add_stream(nats_server.url)
    async with await nats.connect(nats_server.url) as client:
        stream = client.jetstream()
        config = (await stream.stream_info(SUBJECTS.stream)).config
        await stream.update_stream(config.evolve(max_msgs=5, discard=DiscardPolicy.NEW))
        with Worker(nats_server.url, COX_BUS="thread") as worker:
            await worker.connected()
            worker.engine.send_events(20)
            await eventually(lambda: worker.logged("events.full"))
            await asyncio.sleep(0.5)
            worker.engine.send_events(20)
            await eventually(lambda: worker.bus.bus._events.waiting == 35)
            status = await client.subscribe(SUBJECTS.status(WORKER))
            await client.flush()
            worker.engine.send_frame(frame())
            said = decode_frame((await status.next_msg(timeout=30)).data)
            assert said.events_waiting == 35
            assert said.events_waiting_s >= 0.5, "it says so while it can still be mended"
            await stream.update_stream(config)
            await eventually(lambda: worker.bus.bus._events.waiting == 0)
            assert worker.port.events_dropped == 0
            assert len(worker.logged("events.full")) == 1
    assert await stored(nats_server.url) == list(range(1, 41))


async def test_slow_consumer_does_not_hurt(nats_server: NatsServer) -> None:
    """A subscriber that never reads its status costs the worker nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", nats_server.port, limit=1024)
    writer.write(b'CONNECT {"verbose":false}\r\nSUB cox.v1.> 1\r\nPING\r\n')
    await writer.drain()
    with Worker(nats_server.url) as worker:
        await worker.connected()
        async with await nats.connect(nats_server.url) as client:
            for number in range(50):
                for _ in range(10):
                    worker.engine.send_frame(frame(requests=200))
                await client.request(ABORT, abort(number), timeout=2)
        assert len(worker.engine.commands()) == 50
        assert worker.port.connected
    reader.feed_eof()
    writer.close()


async def test_stop_sends_what_is_left(nats_server: NatsServer) -> None:
    """Events that the engine left just before the end are stored."""
    await add_stream(nats_server.url)
    with Worker(nats_server.url) as worker:
        await worker.connected()
        worker.engine.send_events(2_000)
        assert worker.bus.stop()
    assert await stored(nats_server.url) == list(range(1, 2_001))


@pytest.mark.parametrize("fault", ["absent", "killed", "frozen"])
async def test_stop_is_bounded_without_nats(fault: str, nats_server: NatsServer) -> None:
    """The engine's exit waits no longer than it said, whatever became of NATS."""
    if fault == "absent":
        nats_server.kill()
    with Worker(nats_server.url) as worker:
        if fault != "absent":
            await worker.connected()
            nats_server.kill() if fault == "killed" else nats_server.pause()
        worker.engine.send_events(1_000)
        worker.engine.send_frame(frame(requests=1_000))
        began = time.monotonic()
        worker.bus.stop(timeout_s=2.0)
        assert time.monotonic() - began < 10


async def test_engine_outlives_its_bus(nats_server: NatsServer) -> None:
    """After stop, whatever the engine still says goes nowhere and disturbs nobody."""
    with Worker(nats_server.url) as worker:
        await worker.connected()
        assert worker.bus.stop()
        worker.engine.send_events(10)
        worker.port.wake_later(0.01)
        assert worker.port.collect() == []
        assert not worker.port.connected
