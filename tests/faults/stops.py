"""Orderly ends: SIGTERM, as `systemctl stop` and Kubernetes send it, to the parts of a fleet in one order or another.

Stricter than a kill: a worker that is told to end serves what it has to the last token, held or not, and ends in
bounded time, whoever else is gone by then. What comes meanwhile is refused, and its client told.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Final

from ulid import ULID

from coxswain.control.errors import ControlError
from coxswain.schemas.commands import Preempt, Targets
from tests.faults.fleet import Worker
from tests.faults.hands import Hands, fault
from tests.faults.load import Asked
from tests.faults.steering import PATIENCE_S

END_S: Final = 60.0
"""For the requests under way, then for vLLM to end its engine, on a machine that has other things to do."""
LEADER_END_S: Final = 10.0
ARRIVED_S: Final = 0.5
"""What was sent so long ago is in the engine."""


@fault(kills=("w1",), drains=True)
async def worker_stopped(hands: Hands) -> AsyncGenerator[float, None]:
    """One worker stopped (SIGTERM) with requests running, queued and held: they end, then it does; started again."""
    began = time.time()
    asked = await stopped(hands, hands.fleet.workers["w1"])
    names = {one.stream.request for one in asked}
    log = await hands.watch.log(began - 60.0)
    assert names <= log.finished.keys(), "its last events are in the log"
    yield 0.0
    await started(hands.fleet.workers["w1"])


@fault(kills=("w1",), drains=True)
async def worker_stopped_nats_next(hands: Hands) -> AsyncGenerator[float, None]:
    """One worker stopped (SIGTERM), and NATS half a second later, while that ends its requests."""
    ending = asyncio.create_task(stopped(hands, hands.fleet.workers["w1"]))
    await asyncio.sleep(0.5)
    await asyncio.to_thread(hands.fleet.nats.stop)
    await ending
    yield 0.0
    hands.fleet.nats.start()
    await started(hands.fleet.workers["w1"])


@fault(kills=("w1",), drains=True)
async def nats_stopped_worker_next(hands: Hands) -> AsyncGenerator[float, None]:
    """NATS stopped (SIGTERM), then one worker: nobody can continue what is held, and it ends all the same."""
    await asyncio.to_thread(hands.fleet.nats.stop)
    await stopped(hands, hands.fleet.workers["w1"])
    yield 0.0
    hands.fleet.nats.start()
    await started(hands.fleet.workers["w1"])


@fault()
async def leader_stopped(hands: Hands) -> AsyncGenerator[float, None]:
    """The leading controller stopped (SIGTERM): it gives its lease back; it is started again 3 s later."""
    leader = await hands.leader()
    await leader.end(LEADER_END_S)
    yield 3.0
    leader.start()


@fault(kills=("w1", "w2"), drains=True)
async def all_stopped(hands: Hands) -> AsyncGenerator[float, None]:
    """Everything stopped (SIGTERM), controllers first, then workers, then NATS; then started, NATS last."""
    fleet = hands.fleet
    for leader in fleet.leaders.values():
        await leader.end(LEADER_END_S)
    await asyncio.gather(*(stopped(hands, worker) for worker in fleet.workers.values()))
    await asyncio.to_thread(fleet.nats.stop)
    yield 0.0
    for leader in fleet.leaders.values():
        leader.start()
    await asyncio.gather(*(started(worker) for worker in fleet.workers.values()))
    fleet.nats.start()


async def stopped(hands: Hands, worker: Worker) -> list[Asked]:
    """Tell a worker to end and wait for it; the requests that it had, each with every token that was asked for."""
    asked = await _held(hands, worker)
    await worker.end(END_S)
    async with asyncio.timeout(END_S):
        while any(one in hands.load.live for one in asked):  # noqa: ASYNC110 - whoever ends need not say so
            await asyncio.sleep(0.05)
    bad = [f"{one.verdict} {one.error}" for one in asked if one.verdict != "ok"]
    assert not bad, f"{len(bad)} of {len(asked)} requests under way at {worker.name}'s SIGTERM: {bad[0]}"
    return asked


async def _held(hands: Hands, worker: Worker) -> list[Asked]:
    """Requests of a worker, of which some are held until somebody continues them, where NATS is there to say so."""
    async with asyncio.timeout(END_S):
        while len(asked := _under_way(hands, worker)) < 4:  # noqa: ASYNC110 - more than it has slots
            await asyncio.sleep(0.05)
    names = tuple(one.stream.request for one in asked[:2])
    with suppress(ControlError):
        preempt = Preempt(id=str(ULID()), targets=Targets(requests=names))
        await hands.fleet.cox.command(worker.name, "preempt", preempt, timeout_s=PATIENCE_S)
    return _under_way(hands, worker)


def _under_way(hands: Hands, worker: Worker) -> list[Asked]:
    """Whose clients have the head of an answer, and not its end; vLLM's server sends it before its engine knows."""
    before = time.monotonic() - ARRIVED_S
    live = [one for one in hands.load.live if one.worker == worker.name and one.stream.request]
    return [one for one in live if one.began < before]


async def started(worker: Worker) -> None:
    """Start it again, and wait until it serves."""
    worker.start()
    await worker.up()
