"""Controllers as real processes whose policy, somebody else's package, raises: who leads, and what still works."""

import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from coxswain.control.client import Client
from coxswain.control.tables import init
from coxswain.schemas.policy import TenantPolicy
from tests.support.leaders import Leaders
from tests.support.nats import NatsServer
from tests.support.waiting import eventually
from tests.support.working import Working, connection, working

pytestmark = pytest.mark.nats

MODULE = '''
import os
from pathlib import Path
from coxswain.control.policies.fcfs import Fcfs

class Moody(Fcfs):
    """Raises while its file is there."""
    name = "moody"
    def decide(self, now):
        if Path(os.environ["MOODY"]).exists():
            raise RuntimeError("in a mood")
        return super().decide(now)
'''


@pytest.fixture
async def client(nats_server: NatsServer) -> AsyncIterator[Client]:
    """A client of a fleet that was set up."""
    async with await Client.connect(connection(nats_server)) as client:
        await init(client.js, client.subjects)
        yield client


class Crew(Leaders):
    """Controllers with the policy `moody`, each in a process of its own."""

    def __init__(self, server: NatsServer, folder: Path) -> None:
        super().__init__(server, folder, "moody")
        (folder / "moody.py").write_text(MODULE)
        info = folder / "moody-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moody\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[coxswain.policies]\nmoody = moody:Moody\n")

    def mood(self, name: str) -> Path:
        """The file that makes it raise."""
        return self.folder / f"{name}.mood"

    def join(self, name: str) -> None:
        """Start one that finds its policy."""
        path = os.pathsep.join([str(self.folder), *sys.path])
        self.start(name, env={"PYTHONPATH": path, "MOODY": str(self.mood(name))})

    def said(self, name: str, what: str) -> Callable[[], bool]:
        """Whether its log has it."""
        return lambda: what in self.log(name)


@pytest.fixture
def crew(nats_server: NatsServer, tmp_path: Path) -> Iterator[Crew]:
    """Processes that end with the test."""
    made = Crew(nats_server, tmp_path)
    yield made
    made.stop()


def configured(worker: Working, tenant: str) -> bool:
    """Whether the worker took a table with a row for the tenant."""
    taken = [each.command for each in worker.told if each.accepted and each.verb == "configure"]
    return any(tenant in command.tenants for command in taken)


async def test_a_policy_that_raises_ends_no_controller(
    nats_server: NatsServer, client: Client, crew: Crew
) -> None:
    """A standby takes over; with none that works, whoever leads still brings tables out; and it mends."""
    async with working(nats_server) as worker:
        crew.join("one")
        await eventually(lambda: worker.leader == "one")
        crew.join("two")
        await eventually(crew.said("two", "nats.connected"))
        crew.mood("one").touch()
        await eventually(lambda: worker.leader == "two")
        assert "RuntimeError: in a mood" in crew.log("one")

        crew.mood("two").touch()
        await eventually(lambda: worker.leader == "one")
        await client.tenants.put("acme", TenantPolicy(weight=2.0))
        await eventually(lambda: configured(worker, "acme"))
        assert worker.leader == "one"

        crew.mood("one").unlink()
        await eventually(crew.said("one", "policy.recovered"))
        assert all(process.poll() is None for process in crew.processes.values())
        # Each failure is in the log once, however many steps it lasts.
        assert crew.log("two").count("policy.failed") == 1
        assert "policy.recovered" not in crew.log("two"), "it stands by, and was not asked again"
