"""`limit`, caps in tables, borrowing, ageing and `drain`: real scheduler, real NATS server, no model."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from bench.rig import Rig
from coxswain.schemas.commands import Targets
from coxswain.schemas.policy import ClassPolicy, TenantPolicy
from coxswain.schemas.status import Frame
from tests.support.nats import NatsServer
from tests.support.steered import UNHURRIED_S, WORKER, Steer, engine_id, public_id, steer, steered_rig
from tests.support.waiting import eventually

pytestmark = [pytest.mark.nats, pytest.mark.vllm]

ACME = Targets(tenants=("acme",))
TOKENS = 300


@pytest.fixture(params=[1, 2], ids=["sync", "async"])
def rig(request: pytest.FixtureRequest, nats_server: NatsServer) -> Iterator[Rig]:
    """A steered engine with 8 slots, with and without a second step in flight."""
    with steered_rig(nats_server.url, depth=request.param, max_num_batched_tokens=128) as rig:
        yield rig


@pytest.fixture
async def cox(rig: Rig, nats_server: NatsServer) -> AsyncIterator[Steer]:
    """A client, once the worker is on the bus."""
    await eventually(lambda: rig.scheduler.port.connected)
    async with steer(nats_server.url) as cox:
        yield cox


def submit(rig: Rig, tenant: str, count: int = 1, class_: str = "", **fields: Any) -> list[str]:
    """Requests of a tenant; their names in the engine."""
    names = [engine_id(public_id(tenant, class_)) for _ in range(count)]
    rig.step_s = UNHURRIED_S
    for name in names:
        rig.submit(name, **{"tokens": TOKENS, **fields})
    return names


async def status(cox: Steer) -> Frame:
    """The worker's status, whole, now."""
    (frame,) = await cox.client.query(WORKER, "status")
    return frame


def counts(frame: Frame, tenant: str) -> tuple[int, int]:
    """How many of a tenant's requests run and wait."""
    return next((row.running, row.queued) for row in frame.tenants if row.tenant == tenant)


async def ended_well(rig: Rig, names: list[str], tokens: int = TOKENS) -> None:
    """All end, soon now, with exactly the tokens of an undisturbed run."""
    rig.step_s = 0.0
    await eventually(lambda: rig.finished.keys() >= set(names))
    assert [rig.outputs[name] for name in names] == [rig.expected(name, tokens) for name in names]


def last(rig: Rig, names: list[str]) -> int:
    """How many requests ended before the last of these did."""
    return max(list(rig.finished).index(name) for name in names)


def watch(rig: Rig, tenant: str) -> list[int]:
    """How many of a tenant's requests each step has scheduled, from now on; filled on the engine's thread."""
    seen: list[int] = []
    step = rig.step

    def watched() -> dict[str, int]:
        scheduled = step()
        records = rig.scheduler.core.roster.records
        of = [name for name in scheduled if name in records and records[name].account.name == tenant]
        seen.append(len(of))
        return scheduled

    rig.step = watched  # type: ignore[method-assign]
    return seen


async def test_no_step_runs_more_than_the_cap(rig: Rig, cox: Steer) -> None:
    """A cap is exact: not one step has more of the tenant in it, while others take the slots that it leaves."""
    seen = watch(rig, "acme")
    reply = await cox("limit", targets=ACME, max_running=2)
    assert (reply.outcome, reply.counts) == ("applied", {"applied": 1})
    capped, others = submit(rig, "acme", 6, tokens=60), submit(rig, "globex", 6, tokens=60)
    await ended_well(rig, [*others, *capped], 60)
    assert max(seen) == 2
    frame = await status(cox)
    assert [(row.max_running, row.finished_total) for row in frame.tenants if row.tenant == "acme"] == [
        (2, 6)
    ]


async def test_class_cap_from_the_table(rig: Rig, cox: Steer) -> None:
    """`configure` caps a class for all tenants together; raising it lets the waiting in."""
    tenants = {"default": TenantPolicy(class_="batch")}
    await cox("configure", classes={"batch": ClassPolicy(max_running=3)}, tenants=tenants)
    names = submit(rig, "acme", 3) + submit(rig, "globex", 3)
    await eventually(lambda: all(name in rig.scheduler.requests for name in names))
    await eventually(lambda: len(rig.scheduler.running) == 3)
    row = next(row for row in (await status(cox)).classes if row.class_ == "batch")
    assert (row.running, row.queued, row.max_running) == (3, 3, 3)
    await cox("configure", classes={"batch": ClassPolicy(max_running=5)}, tenants=tenants)
    await eventually(lambda: len(rig.scheduler.running) == 5)
    await ended_well(rig, names)


async def test_engine_sleeps_while_only_capped_requests_wait(rig: Rig, cox: Steer) -> None:
    """With nothing that may run the engine takes no step, answers, and goes on as soon as the cap is lifted."""
    await cox("limit", targets=ACME, max_running=0)
    names = submit(rig, "acme", 2, tokens=20)
    await eventually(lambda: all(name in rig.scheduler.requests for name in names))
    frame = await status(cox)
    assert counts(frame, "acme") == (0, 2)
    assert not rig.scheduler.has_unfinished_requests()
    again = await status(cox)
    assert again.step == frame.step
    await cox("limit", targets=ACME, max_running=None)
    await ended_well(rig, names, 20)


async def test_borrowed_slots(rig: Rig, cox: Steer) -> None:
    """A class that may borrow uses what nobody within caps wants; who comes is offered first from then on."""
    tenants = {"acme": TenantPolicy(class_="batch", max_running=2)}
    await cox("configure", classes={"batch": ClassPolicy(position=-1, borrow=True)}, tenants=tenants)
    names = submit(rig, "acme", 10, tokens=100)
    await eventually(lambda: len(rig.scheduler.running) == 8)
    others = submit(rig, "globex", 4, tokens=20)
    await ended_well(rig, names, 100)
    await ended_well(rig, others, 20)
    assert last(rig, others) < last(rig, names)


async def test_ageing_lets_a_worse_class_in(rig: Rig, cox: Steer) -> None:
    """Behind a flood of a better class, one of a class with a bound runs each time the bound is over."""
    await cox(
        "configure",
        classes={"gold": ClassPolicy(position=-1), "slow": ClassPolicy(position=9, ageing_s=0.1)},
        tenants={"default": TenantPolicy(classes=("gold", "slow"))},
    )
    flood = submit(rig, "acme", 60, "gold", tokens=40)
    await eventually(lambda: len(rig.scheduler.running) == 8)
    slow = submit(rig, "globex", 2, "slow", tokens=5)
    await eventually(lambda: rig.finished.keys() >= set(slow))
    await ended_well(rig, flood, 40)
    await ended_well(rig, slow, 5)
    assert last(rig, slow) < last(rig, flood)


async def test_drain(rig: Rig, cox: Steer) -> None:
    """Holds end, new ones are refused with 503, what is here runs to its end, and `drain off` restores all that."""
    (held, other) = submit(rig, "acme", 2)
    await eventually(lambda: rig.outputs.get(held) and rig.outputs.get(other))
    await cox("preempt", held)
    assert (await status(cox)).held == 1
    assert (await cox("drain", on=True)).counts == {"applied": 1}
    assert (await cox("drain", on=True)).outcome == "applied"
    frame = await status(cox)
    assert (frame.state, frame.held, frame.running) == ("draining", 0, 2)
    assert (await cox("preempt", other)).code == 503
    await ended_well(rig, [held, other])
    assert (await cox("drain", on=False)).outcome == "applied"
    assert (await status(cox)).state == "serving"
    (name,) = submit(rig, "acme")
    await eventually(lambda: rig.outputs.get(name))
    assert (await cox("preempt", name)).outcome == "applied"
