"""Controllers as real processes on a real NATS: killed, paused, cut off, and their lease taken away."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from coxswain.control.client import Client
from coxswain.control.daemon import Controller
from coxswain.control.lease import KEY
from coxswain.control.policies.vtc import Vtc
from coxswain.control.tables import init
from coxswain.schemas.policy import TenantPolicy, digest
from tests.support.leaders import Leaders
from tests.support.nats import NatsServer
from tests.support.proxy import Proxy
from tests.support.waiting import eventually
from tests.support.working import Working, connection, working

pytestmark = pytest.mark.nats

"""Time for a takeover on a machine that has other things to do; what it takes is measured in bench/failover.py."""


@pytest.fixture
async def client(nats_server: NatsServer) -> AsyncIterator[Client]:
    """A client of a fleet that was set up."""
    async with await Client.connect(connection(nats_server)) as client:
        await init(client.js, client.subjects)
        yield client


@pytest.fixture
def leaders(nats_server: NatsServer, tmp_path: Path, client: Client) -> Iterator[Leaders]:
    """Processes that end with the test."""
    made = Leaders(nats_server, tmp_path)
    yield made
    made.stop()


@pytest.fixture
async def workers(nats_server: NatsServer) -> AsyncIterator[list[Working]]:
    """Two workers that serve two tenants who want more than there is, most of each on another worker."""
    async with AsyncExitStack() as stack:
        both = [await stack.enter_async_context(working(nats_server, name)) for name in ("w1", "w2")]
        for worker, (many, few) in zip(both, (("a", "b"), ("b", "a")), strict=True):
            worker.arrive(many, 5, 20, times=3_000)
            worker.arrive(few, 5, 20, times=1_000)
            worker.serving = True
        yield both


def served(workers: list[Working]) -> dict[str, float]:
    """What each tenant was charged by all of them."""
    return {name: sum(worker.account(name).charged for worker in workers) for name in ("a", "b")}


async def led(workers: list[Working], *names: str) -> str:
    """Wait until every worker obeys one of these, and was ranked by it; returns who it is."""

    def one() -> bool:
        heard = {worker.leader for worker in workers}
        return len(heard) == 1 and heard <= set(names)

    await eventually(one)
    await eventually(lambda: all(any(each.accepted for each in worker.told) for worker in workers))
    return workers[0].leader


async def test_a_killed_leader_is_replaced_and_fairness_goes_on(
    leaders: Leaders, workers: list[Working], client: Client
) -> None:
    """After kill -9 a standby commands with a later epoch, and what two tenants were served stays together."""
    for name in ("one", "two"):
        leaders.start(name, "preempt_gap=60")
    first = await led(workers, "one", "two")
    (other,) = {"one", "two"} - {first}
    epoch = workers[0].epoch
    assert epoch is not None
    await eventually(lambda: min(served(workers).values()) > 500)
    leaders.send(first, signal.SIGKILL)
    await eventually(lambda: all(worker.accepted(epoch) for worker in workers))
    assert {worker.leader for worker in workers} == {other}
    before = served(workers)
    await eventually(lambda: min(served(workers).values()) > min(before.values()) + 300)
    # U = wq × 4 slots × 20 tokens = 160 for each of two workers that know of each other a moment later: 2U each.
    gap = served(workers)
    assert abs(gap["a"] - gap["b"]) <= 2 * 160 * 2


async def test_of_two_that_start_at_once_one_leads(
    leaders: Leaders, workers: list[Working], client: Client
) -> None:
    """Two processes ask for the lease in the same moment: no worker ever obeys more than one of them."""
    for name in ("one", "two"):
        leaders.start(name)
    first = await led(workers, "one", "two")
    before = served(workers)
    await eventually(lambda: min(served(workers).values()) > min(before.values()) + 200)
    assert len({each.epoch for worker in workers for each in worker.told}) == 1
    assert {worker.leader for worker in workers} == {first}
    assert all(process.poll() is None for process in leaders.processes.values())


async def test_a_leader_that_slept_through_its_end_changes_nothing(
    leaders: Leaders, workers: list[Working], client: Client
) -> None:
    """A process that was stopped wakes with a stale epoch: whatever it sends is refused, and it stands by."""
    for name in ("one", "two"):
        leaders.start(name)
    first = await led(workers, "one", "two")
    epoch = workers[0].epoch
    assert epoch is not None
    leaders.send(first, signal.SIGSTOP)
    await eventually(lambda: all(worker.accepted(epoch) for worker in workers))
    woken_at = time.monotonic()
    leaders.send(first, signal.SIGCONT)
    await eventually(lambda: "lease.lost" in leaders.log(first) or "lease.given_up" in leaders.log(first))
    await asyncio.sleep(1.0)
    for worker in workers:
        late = [each for each in worker.told if each.epoch <= epoch and each.at > woken_at]
        assert not any(each.accepted for each in late)
        assert worker.leader != first
    assert leaders.processes[first].poll() is None


async def test_a_lease_bucket_that_is_deleted_and_made_again_locks_nobody_out(
    leaders: Leaders, workers: list[Working], client: Client
) -> None:
    """Revisions begin anew, the bucket's time of creation does not: the next leader's epoch is later all the same."""
    leaders.start("one")
    await led(workers, "one")
    epoch = workers[0].epoch
    assert epoch is not None
    await client.js.delete_key_value(client.subjects.lease_bucket)
    await eventually(lambda: "lease.missing" in leaders.log("one"))
    await init(client.js, client.subjects)
    await eventually(lambda: all(worker.accepted(epoch) for worker in workers))
    later = workers[0].epoch
    assert later is not None
    assert later[0] > epoch[0]
    assert later[1] <= epoch[1]
    assert (await (await client.js.key_value(client.subjects.lease_bucket)).get(KEY)).value is not None


async def test_a_worker_that_was_cut_off_is_counted_once(nats_server: NatsServer, client: Client) -> None:
    """Over a partition the worker serves on; afterwards no total is lost or doubled, and it is steered again."""
    controller = Controller(connection(nats_server), Vtc(Vtc.Params()))
    task = asyncio.create_task(controller.run())
    try:
        async with (
            Proxy(nats_server.port) as proxy,
            working(nats_server, "w1", proxy.url) as far,
            working(nats_server, "w2") as near,
        ):
            await eventually(lambda: far.told and near.told)
            # Only now: what was charged before a controller first looked is no news to it.
            for worker in (far, near):
                worker.arrive("a", 5, 20, times=3_000)
                worker.serving = True
            views = controller.core.fleet

            def counted() -> float:
                rows = (view.tenants.get("a") for view in views.workers.values())
                return sum(row.charged for row in rows if row)

            await eventually(lambda: counted() > 0)
            await proxy.cut()
            await eventually(lambda: [view.worker for view in views.live()] == ["w2"])
            far.serving = False
            far.arrive("b", 5, 20, times=10)
            await client.tenants.put("b", TenantPolicy(weight=2.0))
            await proxy.mend()
            await eventually(lambda: far.config == digest({}, {"b": TenantPolicy(weight=2.0)}), 20.0)
            near.serving = False
            await eventually(lambda: counted() == served([far, near])["a"])
            policy = controller.core.policy
            assert isinstance(policy, Vtc)
            # Frames are counted as they come, and V is brought up to date at the next step.
            await eventually(lambda: policy.virtual["a"] == pytest.approx(served([far, near])["a"]))
    finally:
        controller.stopping.set()
        await asyncio.wait_for(task, 10)


async def test_a_worker_that_comes_late_gets_everything(
    nats_server: NatsServer, leaders: Leaders, workers: list[Working], client: Client
) -> None:
    """Tables and the fleet's order reach a worker that starts long after the leader, without anybody asking."""
    await client.tenants.put("a", TenantPolicy(weight=4.0))
    leaders.start("one")
    await led(workers, "one")
    await eventually(lambda: min(served(workers).values()) > 200)
    async with working(nats_server, "w3") as late:
        await eventually(lambda: late.config == digest({}, {"a": TenantPolicy(weight=4.0)}))
        late.arrive("a", 5, 20, times=10)
        late.arrive("b", 5, 20, times=10)
        await eventually(lambda: late.account("a").base > 0 and late.account("b").base > 0)
