"""The table of NATS permissions in docs/protocol.md: with it, and nothing more, each role can do its work."""

import asyncio
import re
from collections.abc import Iterator
from contextlib import aclosing, suppress
from pathlib import Path

import nats.errors
import pytest

from coxswain.control.client import Client
from coxswain.control.daemon import Controller
from coxswain.control.errors import NoAnswerError
from coxswain.control.policies.vtc import Vtc
from coxswain.control.tables import init
from coxswain.schemas.commands import Abort, Targets
from coxswain.schemas.connection import Connection
from coxswain.schemas.policy import TenantPolicy
from tests.support.nats import NatsServer
from tests.support.steered import engine_id, eventually, public_id, steered_rig

pytestmark = [pytest.mark.nats, pytest.mark.vllm]

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "protocol.md"
FLEET = "main"
VIOLATION = " Violation - "
"""In the server's log: a publish or subscription was refused."""


def documented() -> dict[str, tuple[list[str], list[str]]]:
    """Role to the subjects that it may publish and subscribe."""
    section = PAGE.read_text().partition("## NATS permissions")[2]
    rows = re.findall(r"^\| ([a-z]+)[^|]*\| ([^|]*) \| ([^|]*) \|$", section, re.MULTILINE)
    return {role: (re.findall("`(.+?)`", may), re.findall("`(.+?)`", sees)) for role, may, sees in rows}


def settings() -> str:
    """The table as users of a nats-server, one per role, with the role's name as password."""
    users = []
    for role, (publish, subscribe) in documented().items():
        answers = 'allow_responses: {max: 1000, expires: "1m"}' if role == "worker" else ""
        allowed = ", ".join(f'"{subject}"' for subject in publish)
        seen = ", ".join(f'"{subject}"' for subject in [*subscribe, "_INBOX.>"])
        deny = "" if publish else ', deny: ">"'
        users.append(
            f"{{user: {role}, password: {role}, permissions: {{"
            f"publish: {{allow: [{allowed}]{deny}}}, subscribe: {{allow: [{seen}]}}, {answers}}}}}",
        )
    return "authorization { users: [\n" + "\n".join(users) + "\n] }"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    """A server that knows the four roles."""
    server = NatsServer(tmp_path, settings()).start()
    yield server
    server.kill()


def at(server: NatsServer, role: str) -> Connection:
    """A connection as this role."""
    return Connection(urls=(server.url.replace("//", f"//{role}:{role}@"),), fleet=FLEET)


def test_the_table_has_every_role() -> None:
    """The page is read as it was meant."""
    assert documented().keys() == {"worker", "controller", "operator", "dashboard"}


async def test_every_role_can_do_its_work(server: NatsServer) -> None:
    """Tables reach the worker, a hold is applied, events are stored and seen; the server refuses nothing."""
    async with await Client.connect(at(server, "operator")) as operator:
        await init(operator.js, operator.subjects)
        await operator.tenants.put("acme", TenantPolicy(weight=2.0))
        controller = Controller(at(server, "controller"), Vtc(Vtc.Params()))
        leading = asyncio.create_task(controller.run())
        try:
            with steered_rig(at(server, "worker").urls[0], env={"COX_FLEET": FLEET}) as rig:
                core = rig.scheduler.core
                await eventually(lambda: core.tenants.table.get("acme"), 15)
                public = public_id("acme")
                rig.submit(engine_id(public), tokens=50)
                targets = Targets(requests=(public,))
                await eventually(lambda: core.roster.families.get(public))
                await operator.command("w1", "abort", Abort(id="a1", targets=targets))
                async with await Client.connect(at(server, "dashboard")) as dashboard:
                    assert (await anext(dashboard.frames())).worker == "w1"
                    (frame,) = await operator.query("w1", "status")
                    assert frame.tenants
                kinds = []
                async with asyncio.timeout(10), aclosing(operator.events(start="all", tenant="acme")) as log:
                    async for event in log:
                        kinds.append(event.__struct_config__.tag)
                        if kinds[-1] == "finished":
                            break
                assert kinds[0] == "queued"
        finally:
            controller.stopping.set()
            with suppress(asyncio.CancelledError):
                await leading
    assert VIOLATION not in server.log.read_text()


async def test_a_dashboard_cannot_command(server: NatsServer) -> None:
    """What the table does not give, the server refuses: no command of a dashboard reaches anybody."""
    async with await Client.connect(at(server, "dashboard")) as dashboard:
        with pytest.raises((NoAnswerError, nats.errors.Error)):
            await dashboard.command("w1", "abort", Abort(id="a1", targets=Targets(all=True)), timeout_s=0.5)
    assert VIOLATION in server.log.read_text()
