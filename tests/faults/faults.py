"""The faults: what is done to the fleet, one small function each.

A fault is an async generator: it injects, yields for how many seconds the fault stays, then heals; the first line of
its docstring says it in the tables. To add one, write it here; all else (load, checks, recovery, table) is shared.
"""

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from typing import Final

from nats.errors import Error as NatsError
from nats.js.api import DiscardPolicy
from nats.js.errors import Error as JetStreamError

from coxswain.control.lease import KEY
from tests.faults import cluster, stops, unreadable  # noqa: F401 - adds its own
from tests.faults.fleet import Clock, Worker
from tests.faults.hands import FAULTS, Hands, fault
from tests.faults.load import STORM

__all__ = ["FAULTS"]

FLOOD: Final = Path(__file__).with_name("flood.py")
STEERED_S: Final = 15.0
"""Patience with a controller that has no fault of its own."""


@fault()
async def nothing(hands: Hands) -> AsyncGenerator[float, None]:
    """Nothing: what load and steering alone look like."""
    del hands
    yield 3.0


# NATS


@fault(short=True)
async def nats_killed(hands: Hands) -> AsyncGenerator[float, None]:
    """NATS killed for 2 s, and started again with its store."""
    hands.fleet.nats.kill()
    yield 2.0
    hands.fleet.nats.start()


@fault()
async def nats_killed_long(hands: Hands) -> AsyncGenerator[float, None]:
    """NATS killed for 12 s: longer than any lease of a leader."""
    hands.fleet.nats.kill()
    yield 12.0
    hands.fleet.nats.start()


@fault(short=True, forgets=True)
async def nats_store_lost(hands: Hands) -> AsyncGenerator[float, None]:
    """NATS killed, and started again with an empty disk; `cox init` a second later."""
    hands.fleet.nats.kill()
    shutil.rmtree(hands.fleet.nats.store)
    yield 0.5
    hands.fleet.nats.start()
    await asyncio.sleep(1.0)
    await hands.fleet.init()


@fault(short=True)
async def nats_paused(hands: Hands) -> AsyncGenerator[float, None]:
    """NATS frozen for 3 s (SIGSTOP): connections stay open, nothing answers."""
    hands.fleet.nats.pause()
    yield 3.0
    hands.fleet.nats.resume()


@fault()
async def nats_paused_long(hands: Hands) -> AsyncGenerator[float, None]:
    """NATS frozen for 12 s: workers give the connection up."""
    hands.fleet.nats.pause()
    yield 12.0
    hands.fleet.nats.resume()


@fault()
async def link_slow(hands: Hands) -> AsyncGenerator[float, None]:
    """The link of one worker and one controller slow for 4 s: 300 ms each way, 100 kB/s."""
    hands.fleet.proxy.latency_s, hands.fleet.proxy.bytes_per_s = 0.3, 100_000.0
    yield 4.0
    hands.fleet.proxy.latency_s, hands.fleet.proxy.bytes_per_s = 0.0, float("inf")


@fault()
async def link_cut(hands: Hands) -> AsyncGenerator[float, None]:
    """One worker and one controller cut off for 8 s, while both live on."""
    await hands.fleet.proxy.cut()
    yield 8.0
    await hands.fleet.proxy.mend()


@fault(short=True)
async def jetstream_full(hands: Hands) -> AsyncGenerator[float, None]:
    """JetStream's disk full for 3 s: somebody else's stream takes all that the server may store."""
    js = hands.fleet.cox.js
    await js.add_stream(name="FILLER", subjects=["filler"])
    with suppress(JetStreamError, NatsError):
        while True:
            await js.publish("filler", bytes(512 << 10), timeout=2)
    with suppress(JetStreamError, NatsError):
        while True:
            await js.publish("filler", bytes(1 << 10), timeout=2)
    yield 3.0
    await js.delete_stream("FILLER")


@fault(forgets=True)
async def disk_full(hands: Hands) -> AsyncGenerator[float, None]:
    """NATS's disk itself full for 3 s (8 MB, a real ENOSPC; needs root), then more room, and NATS started again."""
    nats = hands.fleet.nats
    nats.kill()
    shutil.rmtree(nats.store)
    nats.store.mkdir()
    await mount("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(nats.store))
    try:
        nats.start()
        with suppress(TimeoutError):  # `init` asks for more than there is, which NATS cannot know
            async with asyncio.timeout(STEERED_S):
                await hands.fleet.init()
        with suppress(OSError):  # NATS writes meanwhile, so that it is full before
            (nats.store / "filler").write_bytes(bytes(free_bytes(nats.store)))
        yield 3.0
    finally:
        nats.kill()
        await mount("umount", str(nats.store))
    nats.start()
    await hands.fleet.init()


async def mount(*words: str) -> None:
    """Run `mount` or `umount`."""
    process = await asyncio.create_subprocess_exec(*words)
    assert await process.wait() == 0, " ".join(words)


def free_bytes(folder: Path) -> int:
    """Room left where a folder is."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


@fault()
async def event_stream_full(hands: Hands) -> AsyncGenerator[float, None]:
    """The event stream full for 4 s and set to refuse what is new: events wait."""
    js, name = hands.fleet.cox.js, hands.fleet.cox.subjects.stream
    info = await js.stream_info(name)
    config = info.config
    await js.update_stream(config.evolve(discard=DiscardPolicy.NEW, max_msgs=info.state.messages))
    yield 4.0
    await js.update_stream(config.evolve(discard=DiscardPolicy.OLD, max_msgs=-1))


@fault(forgets=True)
async def event_stream_gone(hands: Hands) -> AsyncGenerator[float, None]:
    """The event stream deleted for 4 s, and made again by `cox init`."""
    await hands.fleet.cox.js.delete_stream(hands.fleet.cox.subjects.stream)
    yield 4.0
    await hands.fleet.init()


# Controllers


@fault()
async def leader_killed(hands: Hands) -> AsyncGenerator[float, None]:
    """The leading controller killed; the standby takes over, and another is started 3 s later."""
    leader = await hands.leader()
    leader.kill()
    yield 3.0
    leader.start()


@fault(short=True)
async def leader_paused(hands: Hands) -> AsyncGenerator[float, None]:
    """Two that lead: the leader frozen for 4 s wakes up and knows nothing of its successor."""
    leader = await hands.leader()
    leader.send(signal.SIGSTOP)
    yield 4.0
    leader.send(signal.SIGCONT)


@fault()
async def lease_stolen(hands: Hands) -> AsyncGenerator[float, None]:
    """Two at once: the lease deleted under the leader, four times in 4 s."""
    bucket = await hands.fleet.cox.js.key_value(hands.fleet.cox.subjects.lease_bucket)
    for _ in range(4):
        await bucket.purge(KEY)
        await asyncio.sleep(1.0)
    yield 0.0


@fault()
async def controllers_gone(hands: Hands) -> AsyncGenerator[float, None]:
    """Both controllers killed for 8 s: workers give the leader up and go on by themselves."""
    for leader in hands.fleet.leaders.values():
        leader.kill()
    yield 8.0
    for leader in hands.fleet.leaders.values():
        leader.start()


# Workers


@fault(freezes_s=3.0)
async def engine_paused(hands: Hands) -> AsyncGenerator[float, None]:
    """One worker's engine frozen for 3 s (SIGSTOP)."""
    engine = hands.fleet.workers["w1"].processes()["engine"]
    engine.suspend()
    yield 3.0
    engine.resume()


@fault(freezes_s=8.0)
async def worker_paused(hands: Hands) -> AsyncGenerator[float, None]:
    """All of one worker frozen for 8 s."""
    hands.fleet.workers["w1"].pause()
    yield 8.0
    hands.fleet.workers["w1"].resume()


@fault(short=True, kills=("w1",))
async def worker_killed(hands: Hands) -> AsyncGenerator[float, None]:
    """One worker killed (-9), with everything that it had, and started again."""
    worker = hands.fleet.workers["w1"]
    worker.kill()
    yield 1.0
    worker.start()
    await worker.up()


@fault(kills=("w2",))
async def engine_killed(hands: Hands) -> AsyncGenerator[float, None]:
    """One worker's engine killed (-9): vLLM's server ends by itself, and is started again."""
    worker = hands.fleet.workers["w2"]
    worker.processes()["engine"].kill()
    yield 3.0
    worker.kill()
    worker.start()
    await worker.up()


# The process that has a worker's connection to NATS


@fault(short=True)
async def bus_killed(hands: Hands) -> AsyncGenerator[float, None]:
    """One worker's bus process killed (-9): its engine starts another."""
    hands.fleet.workers["w1"].processes()["bus"].kill()
    yield 0.0


@fault()
async def bus_paused(hands: Hands) -> AsyncGenerator[float, None]:
    """One worker's bus process frozen for 5 s (SIGSTOP)."""
    bus = hands.fleet.workers["w1"].processes()["bus"]
    bus.suspend()
    yield 5.0
    bus.resume()


@fault()
async def bus_stuck(hands: Hands) -> AsyncGenerator[float, None]:
    """One worker's bus process frozen for good: its engine gives it up and starts another."""
    bus = hands.fleet.workers["w2"].processes()["bus"]
    bus.suspend()
    while bus.is_running():  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.1)
    yield 0.0


# Hostile and clumsy peers


async def flood(hands: Hands, kind: str, rate: int, seconds: float) -> None:
    """Publish to one worker from a process of its own, for so long, or until a slow machine has sent all."""
    own = hands.fleet.cox.subjects
    subject = own.query("w1", "status") if kind == "question" else own.command("operator", "w1", "prioritize")
    words = [str(hands.fleet.nats.port), subject, kind, str(rate), str(seconds)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(FLOOD), *words, stdout=asyncio.subprocess.PIPE
    )
    try:
        out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert int(out) == int(rate * seconds), f"a flood of only {int(out)} commands"


@fault(short=True)
async def flood_valid(hands: Hands) -> AsyncGenerator[float, None]:
    """10,000 good commands a second to one worker, for 3 s."""
    await flood(hands, "valid", 10_000, 3.0)
    yield 0.0


@fault()
async def flood_malformed(hands: Hands) -> AsyncGenerator[float, None]:
    """10,000 commands a second that are no commands, for 3 s."""
    await flood(hands, "malformed", 10_000, 3.0)
    yield 0.0


@fault()
async def flood_huge(hands: Hands) -> AsyncGenerator[float, None]:
    """100 commands a second of 1 MB each, for 3 s."""
    await flood(hands, "huge", 100, 3.0)
    yield 0.0


@fault()
async def flood_questions(hands: Hands) -> AsyncGenerator[float, None]:
    """2,000 questions for its status a second to one worker, for 8 s: longer than it believes in a silent leader."""
    await flood(hands, "question", 2_000, 8.0)
    assert hands.watch.leader_age_s < 5.0, "a worker heard its leader no more"
    yield 0.0


@fault()
async def subscriber_deaf(hands: Hands) -> AsyncGenerator[float, None]:
    """Ten subscribers to everything that never read, for 8 s."""
    writers = []
    for _ in range(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", hands.fleet.nats.port, limit=1_024)
        reader._transport.pause_reading()
        writer.write(b'CONNECT {"verbose":false}\r\nSUB cox.> 1\r\n')
        writers.append(writer)
    yield 8.0
    for writer in writers:
        writer.transport.abort()


@fault(short=True)
async def clients_leave(hands: Hands) -> AsyncGenerator[float, None]:
    """120 clients come in four waves and go away in the middle of an answer, or before it began."""

    async def one(worker: Worker, patience_s: float) -> None:
        asked = hands.load.begin(worker, STORM, 200)
        await asyncio.sleep(patience_s)
        await hands.load.leave(asked)

    for _ in range(4):
        workers = list(hands.fleet.workers.values())
        await asyncio.gather(*(one(workers[number % 2], 0.02 * number) for number in range(30)))
    yield 0.0


# Clocks


async def jump(hands: Hands, clock: Clock, seconds: float) -> AsyncGenerator[float, None]:
    """Let a clock jump; meanwhile a controller's commands must still be effective."""
    clock.jump(seconds)
    try:
        async with asyncio.timeout(STEERED_S):
            await hands.configured()
        yield 2.0
    finally:
        clock.jump(0.0)


@fault(short=True)
async def worker_clock_back(hands: Hands) -> AsyncGenerator[float, None]:
    """One worker's wall clock jumps back by an hour, and forth again later; it stays steered."""
    async for seconds in jump(hands, hands.fleet.workers["w1"].clock, -3_600.0):
        yield seconds


@fault()
async def worker_clock_ahead(hands: Hands) -> AsyncGenerator[float, None]:
    """One worker's wall clock jumps ahead by an hour, and back again later; it stays steered."""
    async for seconds in jump(hands, hands.fleet.workers["w2"].clock, 3_600.0):
        yield seconds


@fault()
async def leader_clock_back(hands: Hands) -> AsyncGenerator[float, None]:
    """The leader's wall clock jumps back by an hour, and forth again later; it goes on steering."""
    async for seconds in jump(hands, (await hands.leader()).clock, -3_600.0):
        yield seconds


@fault()
async def leader_clock_ahead(hands: Hands) -> AsyncGenerator[float, None]:
    """The leader's wall clock jumps ahead by an hour, and back again later; it goes on steering."""
    async for seconds in jump(hands, (await hands.leader()).clock, 3_600.0):
        yield seconds
