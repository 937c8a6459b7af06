"""Every verb, refusal and fault, on the real scheduler over a real NATS server, without a model."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from typing import Any

import msgspec
import pytest

from bench.rig import Rig
from coxswain.common.connection import Connection
from coxswain.control.client import Client
from coxswain.control.tables import init
from coxswain.schemas.commands import Reply, Targets, decode_reply
from coxswain.schemas.errors import CODE_HEADER, ERROR_HEADER
from coxswain.schemas.policy import ClassPolicy, Lead, Prices, TenantPolicy, TenantRank
from coxswain.schemas.status import Frame, QueueQuery, RequestQuery
from coxswain.schemas.subjects import CONTROLLER
from tests.support.nats import NatsServer
from tests.support.steered import FLEET, UNHURRIED_S, WORKER, Steer, engine_id, public_id, steer, steered_rig
from tests.support.waiting import eventually

pytestmark = [pytest.mark.nats, pytest.mark.vllm]


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


async def started(rig: Rig, tenant: str = "acme", **fields: Any) -> tuple[str, str]:
    """Submit a request and wait for its first token; its public and its engine's id."""
    public = public_id(tenant)
    name = engine_id(public)
    rig.step_s = UNHURRIED_S
    rig.submit(name, **{"tokens": 400, **fields})
    await eventually(lambda: rig.outputs.get(name))
    return public, name


async def ended_well(rig: Rig, name: str, tokens: int = 400) -> None:
    """The request ends, soon now, with exactly the tokens of an undisturbed run."""
    rig.step_s = 0.0
    await eventually(lambda: name in rig.finished)
    assert rig.outputs[name] == rig.expected(name, tokens)


async def landed(rig: Rig) -> None:
    """What was in flight has arrived: at most two steps, and the engine's loop has come round more often."""
    for _ in range(4):
        round_: Future[None] = Future()
        rig.call(lambda round_=round_: round_.set_result(None))
        await asyncio.wrap_future(round_)


async def still(rig: Rig, name: str, for_s: float = 0.1) -> None:
    """The request has not ended, and gets no token for a while, once what was in flight has arrived."""
    await landed(rig)
    before = len(rig.outputs.get(name, []))
    await asyncio.sleep(for_s)
    assert len(rig.outputs.get(name, [])) == before
    assert name not in rig.finished


async def status(cox: Steer) -> Frame:
    """The worker's status, whole, now."""
    (frame,) = await cox.client.query(WORKER, "status")
    return frame


async def lead(cox: Steer, epoch: tuple[float, int] = (1.0, 1)) -> None:
    """Be the leader of this epoch, once."""
    beat = Lead(epoch=epoch, controller="test", policy="test", at=time.time())
    await cox.client.nc.publish(cox.client.subjects.lead, msgspec.json.encode(beat))
    await cox.client.nc.flush()


def by_controller(epoch: tuple[float, int] = (1.0, 1), **fields: Any) -> dict[str, Any]:
    """What a controller's command needs beside its own fields."""
    return {"role": CONTROLLER, "epoch": epoch, "expires_at": time.time() + 5, **fields}


class TestHold:
    """`preempt` and `continue`."""

    async def test_keep(self, rig: Rig, cox: Steer) -> None:
        """A kept request stands still while others run, then goes on without computing anything twice."""
        public, name = await started(rig)
        _, other = await started(rig)
        reply = await cox("preempt", public)
        assert (reply.outcome, reply.counts) == ("applied", {"applied": 1})
        await still(rig, name)
        frame = await status(cox)
        assert (frame.held, frame.running, frame.slots.held) == (1, 1, 1)
        assert frame.kv_blocks.held > 0
        assert (await cox("continue", public)).outcome == "applied"
        await ended_well(rig, name)
        await ended_well(rig, other)
        assert rig.computed[name] == 16 + 400 - 1
        assert (await status(cox)).recomputed_tokens_total == 0

    async def test_drop(self, rig: Rig, cox: Steer) -> None:
        """A dropped request frees its blocks and recomputes on continue; its tokens are the same."""
        public, name = await started(rig)
        await cox("preempt", public, kv="drop")
        await still(rig, name)
        frame = await status(cox)
        assert (frame.held, frame.kv_blocks.used, frame.requests[0].kv) == (1, 0, "dropped")
        await cox("continue", public)
        await ended_well(rig, name)
        recomputed = (await status(cox)).recomputed_tokens_total
        assert recomputed > 0
        assert rig.computed[name] == 16 + 400 - 1 + recomputed

    async def test_keep_then_drop(self, rig: Rig, cox: Steer) -> None:
        """A repeated hold may move from keep to drop, and never back."""
        public, name = await started(rig)
        await cox("preempt", public)
        await still(rig, name)
        await cox("preempt", public, kv="drop")
        assert (await status(cox)).requests[0].kv == "dropped"
        assert (await cox("preempt", public, kv="keep")).counts == {"unchanged": 1}
        assert (await status(cox)).requests[0].kv == "dropped"
        await cox("continue", public)
        await ended_well(rig, name)

    async def test_queued(self, rig: Rig, cox: Steer) -> None:
        """A queued request that is held is not admitted, though slots become free, until it is continued."""
        for _ in range(8):
            await started(rig)
        public = public_id("acme")
        name = engine_id(public)
        rig.submit(name, tokens=5)
        reply = await cox("preempt", public)
        assert reply.outcome == "applied"
        rig.step_s = 0.0
        await eventually(lambda: len(rig.finished) == 8)
        await asyncio.sleep(0.05)
        assert name not in rig.outputs
        await cox("continue", public)
        await ended_well(rig, name, 5)

    async def test_prefill(self, rig: Rig, cox: Steer) -> None:
        """A request that is held in the middle of a chunked prefill goes on where it was."""
        rig.step_s = 0.5
        public = public_id("acme")
        name = engine_id(public)
        rig.submit(name, prompt=1_000, tokens=20)
        await eventually(lambda: name in rig.computed)
        await cox("preempt", public)
        await landed(rig)
        assert name not in rig.outputs
        assert 0 < rig.computed[name] < 1_000
        await cox("continue", public)
        await ended_well(rig, name, 20)
        assert rig.computed[name] == 1_000 + 20 - 1

    async def test_lease(self, rig: Rig, cox: Steer) -> None:
        """A hold with a lease ends by itself, also when the engine sleeps, and no sooner."""
        public, name = await started(rig)
        began = time.monotonic()
        await cox("preempt", public, lease_s=1.0)
        await landed(rig)
        before = len(rig.outputs[name])
        await eventually(lambda: len(rig.outputs[name]) > before)
        assert time.monotonic() - began >= 1.0
        await ended_well(rig, name)

    async def test_lease_replaced(self, rig: Rig, cox: Steer) -> None:
        """A repeated hold of the same role replaces the lease."""
        public, name = await started(rig)
        await cox("preempt", public, lease_s=0.2)
        await cox("preempt", public, lease_s=30)
        await asyncio.sleep(0.4)
        await still(rig, name, 0.05)
        await cox("continue", public)
        await ended_well(rig, name)

    async def test_roles(self, rig: Rig, cox: Steer) -> None:
        """A request runs when no role holds it; an operator's continue ends every hold."""
        public, name = await started(rig)
        await lead(cox)
        await cox("preempt", public)
        await cox("preempt", public, **by_controller(lease_s=30))
        reply = await cox("continue", public, **by_controller())
        assert reply.results[0].detail == "still held by operator"
        await still(rig, name)
        await cox("preempt", public, **by_controller(lease_s=30))
        assert set((await status(cox)).requests[0].held_by) == {"operator", "controller"}
        await cox("continue", public)
        await ended_well(rig, name)

    async def test_controller_cannot_end_an_operators_hold(self, rig: Rig, cox: Steer) -> None:
        """A controller's continue changes nothing on a request that only an operator holds."""
        public, name = await started(rig)
        await lead(cox)
        await cox("preempt", public)
        assert (await cox("continue", public, **by_controller())).counts == {"unchanged": 1}
        await still(rig, name)

    async def test_failover(self, nats_server: NatsServer) -> None:
        """A controller's hold ends when the leader falls silent; an operator's does not."""
        env = {"COX_LEADER_LEASE_S": "3"}
        with steered_rig(nats_server.url, env=env) as rig:
            await eventually(lambda: rig.scheduler.port.connected)
            async with steer(nats_server.url) as cox:
                public, name = await started(rig)
                mine, held = await started(rig)
                await lead(cox)
                await cox("preempt", public, **by_controller(lease_s=60))
                await cox("preempt", mine)
                await still(rig, name, 0.2)
                await ended_well(rig, name)
                await still(rig, held)

    async def test_finishing_with_tokens_in_flight(self, rig: Rig, cox: Steer) -> None:
        """A request whose last token was in flight when it was held ends; nothing leaks."""
        for tokens in range(2, 30):
            public = public_id("acme")
            name = engine_id(public)
            rig.submit(name, tokens=tokens)
            await eventually(lambda name=name: rig.outputs.get(name))
            reply = await cox("preempt", public)
            if reply.outcome == "applied":
                await cox("continue", public)
            await ended_well(rig, name, tokens)
        frame = await status(cox)
        assert (frame.held, frame.running, frame.kv_blocks.used) == (0, 0, 0)

    async def test_family(self, rig: Rig, cox: Steer) -> None:
        """A command covers all children of a request, by the public id or the body's id; status is per child."""
        public = public_id("acme")
        names = [f"{i}_{engine_id(public)}" for i in range(3)]
        for name in names:
            rig.submit(name, tokens=400)
        await eventually(lambda: all(rig.outputs.get(name) for name in names))
        reply = await cox("preempt", f"cmpl-{public}")
        assert reply.counts == {"applied": 3}
        rows = (await status(cox)).requests
        assert sorted((row.child, row.state) for row in rows) == [(0, "held"), (1, "held"), (2, "held")]
        assert {row.request for row in rows} == {public}
        await cox("continue", public)
        for name in names:
            await ended_well(rig, name)


class TestAbort:
    """`abort`."""

    @pytest.mark.parametrize("held", [None, "keep", "drop"])
    async def test_abort(self, rig: Rig, cox: Steer, held: str | None) -> None:
        """An aborted request ends at once for its client, held or not, and leaves no block or slot behind."""
        public, name = await started(rig)
        if held:
            await cox("preempt", public, kv=held)
        assert (await cox("abort", public, reason="test")).outcome == "applied"
        await eventually(lambda: rig.aborts_sent == [name])
        frame = await status(cox)
        assert (frame.held, frame.running, frame.kv_blocks.used) == (0, 0, 0)
        assert (frame.slots.active, frame.slots.total) == (8, 8)
        assert (await cox("abort", public)).code == 404


class TestPriority:
    """`prioritize`, `configure` and `rank`."""

    async def test_front_of_the_queue(self, rig: Rig, cox: Steer) -> None:
        """In a `priority` class the last of the queue is moved to the front while it waits, and runs next."""
        await cox("configure", classes={"default": ClassPolicy(order="priority")})
        running = [(await started(rig))[1] for _ in range(8)]
        waiting = [public_id("acme") for _ in range(6)]
        names = [engine_id(public) for public in waiting]
        for name in names:
            rig.submit(name, tokens=50)
        last = waiting[-1]

        async def position() -> int | None:
            (report,) = await cox.client.query(WORKER, "request", RequestQuery(request=last))
            return report.children[0].status.position

        assert await position() == 5
        assert (await cox("prioritize", last, priority=-1)).counts == {"applied": 1}
        assert await position() == 0
        (page,) = await cox.client.query(WORKER, "queue", QueueQuery(limit=2))
        assert ([row.request for row in page.requests], page.next, page.total) == ([last, waiting[0]], "2", 6)
        for name in running:
            await ended_well(rig, name)
        await eventually(lambda: rig.finished.keys() >= set(names))
        assert next(name for name in rig.finished if name in names) == names[-1]

    async def test_class(self, rig: Rig, cox: Steer) -> None:
        """A class with a lower position runs first; a request may be moved between classes."""
        await cox("configure", classes={"urgent": ClassPolicy(position=-1), "batch": ClassPolicy(position=5)})
        for _ in range(8):
            await started(rig)
        first, second = public_id("acme"), public_id("acme")
        for public in (first, second):
            rig.submit(engine_id(public), tokens=5)
        assert (await cox("prioritize", second, class_="urgent")).outcome == "applied"
        (page,) = await cox.client.query(WORKER, "queue")
        assert [(row.request, row.class_) for row in page.requests] == [
            (second, "urgent"),
            (first, "default"),
        ]
        assert (await cox("prioritize", second, class_="nowhere")).code == 404

    async def test_fair_order(self, rig: Rig) -> None:
        """Between backlogged tenants of equal weight service is shared, however unequal their backlogs."""
        seen: Future[tuple[float, float, int]] = Future()

        def share() -> None:
            """On the engine's thread, so that nothing is served between the last output and the reading."""
            for tenant, count in (("flood", 60), ("small", 20)):
                for index in range(count):
                    rig.add(engine_id(public_id(tenant)), prompt=32, tokens=20, seed=index)
            accounts = rig.scheduler.core.tenants.accounts
            while accounts["small"].finished < 20 and rig.scheduler.has_requests():
                rig.step()
            seen.set_result(
                (accounts["flood"].charged, accounts["small"].charged, accounts["flood"].finished)
            )

        rig.call(share)
        flood, small, finished = await asyncio.wait_for(asyncio.wrap_future(seen), 30)
        # Theorem 4.4 of VTC: at most 2U apart, here 8 slots of one request's 32 + 2 × 20 for either.
        assert abs(flood - small) <= 2 * 8 * 72
        assert finished < 60

    async def test_rank(self, rig: Rig, cox: Steer) -> None:
        """A rank sets bases, weights and prices of one incarnation; virtual time is base + charged + lift."""
        await started(rig, "acme")
        incarnation = rig.scheduler.incarnation
        rank = {"acme": TenantRank(base=-500.0, weight=2.0), "unknown": TenantRank(base=7.0)}
        reply = await cox("rank", incarnation=incarnation, tenants=rank, prices=Prices(output=3.0))
        assert reply.outcome == "applied"
        tenant = (await status(cox)).tenants[0]
        assert (tenant.tenant, tenant.base, tenant.weight) == ("acme", -500.0, 2.0)
        assert tenant.virtual_time == pytest.approx(tenant.base + tenant.charged + tenant.lift)
        assert (await cox("rank", incarnation="01HZXW5N6C3V9Q8R7T2K4M1ABC")).code == 409

    async def test_configure(self, rig: Rig, cox: Steer) -> None:
        """Tables are replaced whole and echoed whole."""
        classes = {"urgent": ClassPolicy(position=-1, slo_s=2.0, cut_in="slots")}
        tenants = {"acme": TenantPolicy(weight=3.0, class_="urgent", max_queued=4)}
        reply = await cox("configure", classes=classes, tenants=tenants)
        assert reply.outcome == "applied"
        assert reply.ignored == ()
        (config,) = await cox.client.query(WORKER, "config")
        assert config.classes["urgent"] == classes["urgent"]
        assert config.tenants == tenants
        public, _ = await started(rig)
        row = (await status(cox)).requests[0]
        assert (row.request, row.class_) == (public, "urgent")
        assert row.deadline_s == pytest.approx(row.arrived_at + 2.0)
        assert (await status(cox)).config == config.digest

    async def test_priority_is_clamped(self, rig: Rig, cox: Steer) -> None:
        """A tenant cannot arrive with a priority outside its range, whatever the edge let through."""
        await cox("configure", tenants={"acme": TenantPolicy(priority_min=0, priority_max=5)})
        await started(rig, priority=-100)
        assert (await status(cox)).requests[0].priority == 0

    async def test_class_is_bounded(self, rig: Rig, cox: Steer) -> None:
        """A tenant gets a class that it asks for only if its row allows it."""
        await cox(
            "configure",
            classes={"urgent": ClassPolicy(position=-1), "batch": ClassPolicy(position=1)},
            tenants={
                "acme": TenantPolicy(class_="batch", classes=("urgent",)),
                "other-one": TenantPolicy(class_="batch"),
            },
        )
        rows = {}
        for tenant in ("acme", "other-one"):
            public = public_id(tenant, "urgent")
            rig.submit(engine_id(public), tokens=300)
            rows[tenant] = public
        await eventually(lambda: len(rig.outputs) == 2)
        seen = {row.request: row.class_ for row in (await status(cox)).requests}
        assert (seen[rows["acme"]], seen[rows["other-one"]]) == ("urgent", "batch")

    async def test_forged_identity(self, rig: Rig, cox: Steer) -> None:
        """An id that is not signed with the key is tenant `default`, whatever it says."""
        forged = public_id("victim")[:-1] + "z"
        rig.submit(f"chatcmpl-{forged}-00000000", tokens=200)
        await eventually(lambda: rig.outputs)
        assert (await status(cox)).requests[0].tenant == "default"


class TestRefusals:
    """Every code of the contract, from the real worker; a refusal changes nothing."""

    async def raw(
        self, cox: Steer, verb: str, payload: bytes, role: str = "operator"
    ) -> tuple[Reply, dict[str, str]]:
        """Send any bytes; the reply and its headers."""
        message = await cox.client.nc.request(
            cox.client.subjects.command(role, WORKER, verb), payload, timeout=5
        )
        return decode_reply(message.data), message.headers or {}

    @pytest.mark.parametrize(
        ("verb", "payload", "code"),
        [
            ("preempt", b"{", 400),
            ("preempt", b'{"id": "x", "targets": {"requests": "r"}}', 400),
            ("preempt", b'{"id": "x", "targets": {}}', 400),
            ("preempt", b"", 400),
            ("dance", b"{}", 400),
            ("prioritize", b'{"id": "x", "targets": {"all": true}, "priority": 4294967296}', 400),
            ("prioritize", b'{"id": "x", "targets": {"all": true}}', 400),
            ("limit", b'{"id": "x", "targets": {"all": true}, "max_running": 1}', 400),
            ("limit", b'{"id": "x", "targets": {"classes": ["nowhere"]}, "max_running": 1}', 404),
            ("drain", b'{"id": "x"}', 400),
            ("preempt", b'{"id": "x", "targets": {"requests": ["nobody"]}}', 404),
            ("preempt", b'{"id": "x", "targets": {"classes": ["nowhere"]}}', 404),
            ("preempt", b'{"id": "x", "targets": {"all": true}, "expires_at": 1}', 410),
        ],
    )
    async def test_codes(self, rig: Rig, cox: Steer, verb: str, payload: bytes, code: int) -> None:
        """Each wrong command gets its code in the body and in the header, and the request runs on."""
        _, name = await started(rig)
        reply, headers = await self.raw(cox, verb, payload)
        assert (reply.outcome, reply.code) == ("rejected", code)
        assert headers[CODE_HEADER] == str(code)
        assert headers[ERROR_HEADER]
        await ended_well(rig, name)

    async def test_role(self, rig: Rig, cox: Steer) -> None:
        """A role that nobody has may not command."""
        reply, _ = await self.raw(cox, "abort", b'{"id": "x", "targets": {"all": true}}', role="viewer")
        assert reply.code == 403

    async def test_too_many_targets(self, rig: Rig, cox: Steer) -> None:
        """10,000 targets are answered; one more is refused."""
        names = tuple(f"r{i}" for i in range(10_000))
        public, name = await started(rig)
        reply = await cox("preempt", *names[1:], public)
        assert (reply.outcome, reply.counts) == ("partial", {"not_found": 9_999, "applied": 1})
        # With a step in flight the held one is a result too: it says how many tokens still come.
        assert (len(reply.results), reply.results_omitted) == (1_000, 8_999 + rig.depth - 1)
        assert (await cox("continue", *names, public)).code == 413
        await still(rig, name)

    async def test_controller_before_any_leader(self, rig: Rig, cox: Steer) -> None:
        """A worker that has heard no leader takes no controller's command."""
        public, name = await started(rig)
        reply = await cox("preempt", public, **by_controller(lease_s=5))
        assert reply.code == 409
        await ended_well(rig, name)

    async def test_stale_epoch(self, rig: Rig, cox: Steer) -> None:
        """A controller of an older epoch is refused; a newer one inherits its holds."""
        public, name = await started(rig)
        await lead(cox, (1.0, 7))
        assert (await cox("preempt", public, **by_controller((1.0, 7), lease_s=60))).outcome == "applied"
        await lead(cox, (1.0, 9))
        assert (await cox("continue", public, **by_controller((1.0, 7)))).code == 409
        await still(rig, name)
        assert (await cox("continue", public, **by_controller((1.0, 9)))).outcome == "applied"
        await ended_well(rig, name)

    async def test_not_possible(self, rig: Rig, cox: Steer) -> None:
        """A request that cannot be held now says why, and is left alone."""
        public, name = await started(rig)
        rig.call(lambda: setattr(rig.scheduler.requests[name], "resumable", True))
        reply = await cox("preempt", public)
        assert (reply.code, "streaming session" in (reply.error or "")) == (422, True)
        rig.call(lambda: setattr(rig.scheduler.requests[name], "resumable", False))
        await ended_well(rig, name)

    async def test_duplicate(self, rig: Rig, cox: Steer) -> None:
        """The same id is applied once and answered again with the same reply."""
        public, name = await started(rig)
        first = await cox("preempt", public, id="once")
        await cox("continue", public)
        assert await cox("preempt", public, id="once") == first
        await ended_well(rig, name)

    async def test_unknown_fields(self, rig: Rig, cox: Steer) -> None:
        """Fields that nobody knows are accepted and named, so that a typo is seen."""
        public, _ = await started(rig)
        payload = msgspec.json.encode({"id": "x", "targets": {"requests": [public]}, "lease": 5})
        reply, _ = await self.raw(cox, "preempt", payload)
        assert (reply.outcome, reply.ignored) == ("applied", ("lease",))

    async def test_before_any_request(self, rig: Rig, cox: Steer) -> None:
        """Commands to an empty engine are answered, without a step and at once."""
        assert (await cox("preempt", targets=Targets(all=True))).outcome == "applied"
        assert (await cox("preempt", targets=Targets(tenants=("nobody",)))).outcome == "applied"
        assert (await cox("continue", "nothing")).code == 404
        assert rig.scheduler.current_step == 0


class TestFaults:
    """NATS lost, floods, readers that do not read."""

    async def test_nats_restarted(self, rig: Rig, cox: Steer, nats_server: NatsServer) -> None:
        """With NATS gone requests are served on; when it is back commands work, and none is applied late."""
        _, name = await started(rig)
        nats_server.kill()
        await ended_well(rig, name)
        _, other = await started(rig, tokens=1_000)
        nats_server.start()
        await eventually(lambda: rig.scheduler.port.connected)
        async with steer(nats_server.url) as again:
            assert (await again("preempt", targets=Targets(all=True))).counts == {"applied": 1}
            await still(rig, other)
            assert (await again("continue", targets=Targets(all=True))).counts == {"applied": 1}
        await ended_well(rig, other, 1_000)

    async def test_no_nats_at_start(self, nats_server: NatsServer) -> None:
        """Without NATS at start the engine serves; when NATS comes, it is steered."""
        nats_server.kill()
        with steered_rig(nats_server.url) as rig:
            _, name = await started(rig)
            await ended_well(rig, name)
            nats_server.start()
            await eventually(lambda: rig.scheduler.port.connected)
            async with steer(nats_server.url) as cox:
                assert (await cox("preempt", "nobody")).code == 404

    async def test_flood(self, rig: Rig, cox: Steer) -> None:
        """A flood of commands and garbage is answered or refused, and the engine serves on."""
        _, name = await started(rig)
        subject = cox.client.subjects.command("operator", WORKER, "prioritize")
        good = b'{"id": "%d", "targets": {"all": true}, "priority": %d}'
        for index in range(5_000):
            await cox.client.nc.publish(subject, b"\xff{" if index % 2 else good % (index, index % 100))
        await cox.client.nc.flush()
        await ended_well(rig, name)
        assert (await cox("preempt", "nobody")).code == 404

    async def test_slow_consumer(self, rig: Rig, cox: Steer, nats_server: NatsServer) -> None:
        """A subscriber of status that never reads costs the engine nothing."""
        sleeper = await Client.connect(Connection(urls=(nats_server.url,), fleet=FLEET))

        async def never(_: object) -> None:
            await asyncio.sleep(60)

        await sleeper.nc.subscribe(sleeper.subjects.status_all, cb=never, pending_msgs_limit=1)
        _, name = await started(rig, tokens=1_000)
        await ended_well(rig, name, 1_000)
        await sleeper.nc.close()

    async def test_a_fault_of_ours(self, rig: Rig, cox: Steer, monkeypatch: pytest.MonkeyPatch) -> None:
        """A command that this worker breaks on is answered 422; requests and later commands go on."""
        public, name = await started(rig)

        def broken(*_: object) -> None:
            raise KeyError("a bug")

        with monkeypatch.context() as patch:
            patch.setattr(rig.scheduler.core.holds, "hold", broken)
            assert (await cox("preempt", public)).code == 422
        assert (await cox("preempt", public)).outcome == "applied"
        await still(rig, name)
        await cox("continue", public)
        await ended_well(rig, name)


class TestStream:
    """What a worker publishes."""

    async def test_events(self, rig: Rig, cox: Steer) -> None:
        """A request's life is in the event log, in order, without a gap, and adds up."""
        await init(cox.client.js, cox.client.subjects)
        public, name = await started(rig)
        await cox("preempt", public)
        await cox("continue", public)
        await ended_well(rig, name)
        kinds: list[str] = []
        seqs: list[int] = []
        async with asyncio.timeout(10):
            async for event in cox.client.events(start="all"):
                assert not isinstance(event, dict)
                seqs.append(event.seq)
                if event.request == public:
                    kinds.append(event.__struct_config__.tag)
                    if kinds[-1] == "finished":
                        break
        assert kinds == ["queued", "admitted", "first_token", "held", "continued", "finished"]
        assert seqs == sorted(set(seqs))
        assert (event.output_tokens, event.uncached_input_tokens, event.recomputed_tokens) == (400, 16, 0)

    async def test_status_is_level(self, rig: Rig, cox: Steer) -> None:
        """Frames come while things change; an idle engine repeats a full one each second, without a step."""
        _, name = await started(rig)
        frames: list[Frame] = []

        async def watch() -> None:
            async for frame in cox.client.frames():
                frames.append(frame)  # noqa: PERF401 - seen while it grows

        task = asyncio.create_task(watch())
        await eventually(lambda: len(frames) > 8)
        await ended_well(rig, name)
        await asyncio.sleep(0.3)
        idle_from, step = len(frames), rig.scheduler.current_step
        await asyncio.sleep(2.2)
        task.cancel()
        busy = frames[:idle_from]
        assert len(busy) > 8
        assert any(not frame.full for frame in busy)
        assert [frame.seq for frame in frames] == list(range(frames[0].seq, frames[0].seq + len(frames)))
        assert 1 <= len(frames) - idle_from <= 4
        assert all(frame.full for frame in frames[idle_from:])
        assert rig.scheduler.current_step == step
        last = frames[-1].tenants[0]
        assert (last.output_tokens_total, last.uncached_input_tokens_total, last.finished_total) == (
            400,
            16,
            1,
        )
