"""The bus in its own process, on a real nats-server: nothing that happens to it hurts the engine or loses an event."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import nats
import psutil
import pytest

from coxswain.schemas.commands import decode_reply
from coxswain.schemas.status import decode_frame
from coxswain.schemas.subjects import Subjects
from coxswain.service.bus import process, wire
from coxswain.service.port import MAX_COMMANDS, MAX_OUTBOUND
from tests.support.bus import FLEET, Worker, add_stream, stored
from tests.support.engine import WORKER, frame
from tests.support.nats import NatsServer
from tests.support.waiting import eventually

pytestmark = pytest.mark.nats
SUBJECTS = Subjects(FLEET)


ABORT = SUBJECTS.command("operator", WORKER, "abort")


def body(number: int) -> bytes:
    """A command."""
    return json.dumps({"id": f"c{number}", "targets": {"all": True}}).encode()


async def abort(client, number: int, timeout_s: float = 5):
    """Send one command; its reply."""
    return decode_reply((await client.request(ABORT, body(number), timeout=timeout_s)).data)


def arrived(worker: Worker) -> bytes:
    """What the process has said, and nobody has read."""
    return worker.bus._ours.recv(2**20, socket.MSG_PEEK) if worker.bus._arrived.poll(0) else b""


async def test_killed_bus_is_started_again_and_loses_no_event(nats_server: NatsServer) -> None:
    """Its successor is told what was not stored, goes on with higher numbers and takes commands."""
    await add_stream(nats_server.url)
    frames = []

    async def heard(msg) -> None:
        frames.append(decode_frame(msg.data))

    async with await nats.connect(nats_server.url) as client:
        await client.subscribe(SUBJECTS.status(WORKER), cb=heard)
        with Worker(nats_server.url) as worker:
            await worker.connected()
            refused = await client.request(SUBJECTS.command("operator", WORKER, "fly"), b"{}", timeout=5)
            assert decode_reply(refused.data).code == 400
            worker.engine.send_frame(frame(), idle=True)
            await eventually(lambda: frames and worker.bus._begin.refused)  # told four times a second
            first = worker.bus.pid
            for _ in range(20):
                worker.engine.send_events(50)
            os.kill(first, signal.SIGKILL)
            worker.engine.send_events(50)
            await eventually(lambda: worker.bus.pid not in {None, first} and worker.port.connected)
            assert (await abort(client, 1)).outcome == "applied"
            assert worker.logged("bus.lost")[0]["why"] == "it ended with -9"
            before = frames[0]
            await eventually(lambda: frames[-1].seq > before.seq + 1_000)
            assert frames[-1].commands.rejected_total == before.commands.rejected_total == {"400": 1}
            assert frames[-1].commands.outcomes_total == {"other": {"400": 1}}, "`fly` is no verb"
            await eventually(lambda: not worker.bus._outbox._kept)
            assert worker.port.events_dropped == 0
    assert await stored(nats_server.url) == list(range(1, 1_051))


async def test_bus_that_does_not_understand_its_engine_is_replaced(nats_server: NatsServer) -> None:
    """It does not live on with one ear: it ends, and its successor takes commands."""
    with Worker(nats_server.url) as worker:
        await worker.connected()
        first = worker.bus.pid
        worker.bus._outbox._socket.send((7).to_bytes(wire.LENGTH, "big") + b"garbage")
        await eventually(lambda: worker.bus.pid not in {None, first} and worker.port.connected)
        assert worker.logged("bus.lost")[0]["why"] == "it ended with 1"
        async with await nats.connect(nats_server.url) as client:
            assert (await abort(client, 1)).outcome == "applied"


async def test_frozen_bus_costs_the_engine_nothing_and_is_replaced(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine never waits for a bus that takes nothing, keeps a bounded amount, and gets another one."""
    with Worker(nats_server.url) as worker:
        await worker.connected()  # which may take longer than what follows
        monkeypatch.setattr(process, "SILENCE_S", 2.0)
        monkeypatch.setattr(process, "GRACE_S", 0.5)
        first = worker.bus.pid
        os.kill(first, signal.SIGSTOP)
        longest = 0.0
        for _ in range(300):
            began = time.thread_time()
            worker.engine.send_frame(frame(requests=300))
            longest = max(longest, time.thread_time() - began)
        assert longest < 0.1
        await eventually(lambda: not worker.port.connected)  # no frames are built for it
        worker.engine.send_events(2 * MAX_OUTBOUND)
        assert len(worker.port.outbound) < MAX_OUTBOUND
        await eventually(lambda: worker.logged("bus.lost"))
        monkeypatch.undo()  # its successor may take its time to start
        await eventually(lambda: worker.bus.pid not in {None, first} and worker.port.connected)
        assert worker.logged("bus.lost")[0]["why"].startswith("it said nothing")
        async with await nats.connect(nats_server.url) as client:
            assert (await abort(client, 1)).outcome == "applied"


async def test_bus_that_was_away_goes_on(nats_server: NatsServer) -> None:
    """One that takes nothing for a while is not replaced; what the engine said meanwhile arrives."""
    await add_stream(nats_server.url)
    with Worker(nats_server.url) as worker:
        await worker.connected()
        first = worker.bus.pid
        os.kill(first, signal.SIGSTOP)
        for _ in range(300):  # more than the socket holds
            worker.engine.send_frame(frame(requests=300))
        worker.engine.send_events(500)
        await eventually(lambda: not worker.port.connected)
        os.kill(first, signal.SIGCONT)
        await eventually(lambda: worker.port.connected)
        async with await nats.connect(nats_server.url) as client:
            assert (await abort(client, 1)).outcome == "applied"
        assert worker.bus.pid == first
        await eventually(lambda: not worker.bus._outbox._kept)
    assert await stored(nats_server.url) == list(range(1, 501))


async def test_the_engine_finds_what_the_thread_has_had_no_time_for(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands that came while the engine's thread had the interpreter are in force in its next step."""
    with Worker(nats_server.url, busy=True) as worker:
        await worker.connected()
        held, stuck = threading.Event(), threading.Event()
        wait = worker.bus._wait

        def late(*args) -> dict[int, int]:
            ready = wait(*args)
            stuck.set()
            held.wait(10)
            return ready

        monkeypatch.setattr(worker.bus, "_wait", late)
        worker.bus._rouse()  # out of the wait that it is in, into ours
        async with await nats.connect(nats_server.url) as client:
            asked = asyncio.create_task(abort(client, 1))
            await asyncio.to_thread(stuck.wait, 5)
            try:
                await eventually(lambda: worker.bus._arrived.poll(0))
                assert not worker.port.pending()
                worker.port.look()
                assert worker.port.pending() == 1
                worker.port.look()  # nothing there
                assert worker.port.pending() == 1
                # Of a flood, a look takes what costs a step a millisecond, and nothing while something waits.
                worker.port.take()
                for number in range(2, 502):
                    await client.publish(ABORT, body(number), reply="_INBOX.nobody")
                await eventually(lambda: len(arrived(worker)) > 2 * process.LOOK)
                worker.port.look()
                taken = worker.port.pending()
                assert 10 < taken < 200
                worker.port.look()
                assert worker.port.pending() == taken
            finally:
                held.set()
                asked.cancel()
            await eventually(lambda: worker.port.pending() == 500)


async def test_alarm_rings_without_a_process(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease ends in time also while there is no bus, and none can be started."""
    with Worker(nats_server.url) as worker:
        await worker.connected()
        monkeypatch.setattr(sys, "executable", "/nonexistent/python")
        os.kill(worker.bus.pid, signal.SIGKILL)
        await eventually(lambda: len(worker.logged("bus.lost")) > 1)
        assert "cannot be started" in worker.logged("bus.lost")[1]["why"]
        wakes = worker.engine.wakes
        worker.port.wake_later(0.05)
        await eventually(lambda: worker.engine.wakes > wakes)


async def test_flood_while_the_engine_is_busy(nats_server: NatsServer) -> None:
    """What the engine has no room for is refused one by one, and counted; what it took is applied."""
    with Worker(nats_server.url, busy=True) as worker:
        await worker.connected()
        async with await nats.connect(nats_server.url) as client:
            asked = [asyncio.create_task(abort(client, number, 30)) for number in range(MAX_COMMANDS + 500)]
            await eventually(lambda: sum(task.done() for task in asked) >= 500)
            worker.engine.busy = False
            worker.port.wake_engine()
            codes = [(await task).code for task in asked]
        assert (codes.count(429), codes.count(None)) == (500, MAX_COMMANDS)


async def test_bus_ends_with_its_engine(nats_server: NatsServer, tmp_path: Path) -> None:
    """However the engine's process ends, no bus is left behind; and Ctrl-C is the engine's alone."""
    script = tmp_path / "engine.py"
    script.write_text(
        "import sys, time\n"
        "from tests.support.bus import Worker\n"
        "with Worker(sys.argv[1]) as worker:\n"
        "    while not worker.port.connected: time.sleep(0.01)\n"
        "    print(worker.bus.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(script), nats_server.url]
    with subprocess.Popen(  # noqa: ASYNC220 - one, and at once
        command, stdout=subprocess.PIPE, env=environment
    ) as engine:
        assert engine.stdout is not None
        bus = psutil.Process(int(await asyncio.to_thread(engine.stdout.readline)))
        for number in (signal.SIGINT, signal.SIGTERM):
            bus.send_signal(number)
        await asyncio.sleep(0.3)
        assert bus.is_running()
        engine.kill()
        await eventually(lambda: not bus.is_running() or bus.status() == psutil.STATUS_ZOMBIE)
