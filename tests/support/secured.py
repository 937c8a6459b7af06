"""A real nats-server that asks everybody who they are: the users that `cox init --auth` makes, over TLS if wanted."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coxswain.common.connection import Connection
from coxswain.control import auth
from coxswain.control.client import Client
from coxswain.control.tables import init
from coxswain.schemas.subjects import Subjects
from tests.support.nats import NatsServer

FLEET = "main"
USERS = ("admin", "controller", "operator", "viewer", "edge", "worker:w1", "worker:w2")


class Secured:
    """A running server and its users.

    Args:
        folder: for everything.
        settings: more of the server's configuration.
        users: as `cox init --auth` takes them.
    """

    def __init__(self, folder: Path, settings: str = "", users: tuple[str, ...] = USERS) -> None:
        self.folder = folder / "auth"
        self.made = auth.write(self.folder, FLEET, [auth.user(text) for text in users], [])
        self.subjects = Subjects(FLEET)
        self.nats = NatsServer(folder, f'{settings}\ninclude "auth/{auth.CONFIG}"')

    def seed(self, label: str) -> str:
        """Path of a user's seed."""
        return str(self.folder / auth.SEEDS / f"{label}.nk")

    def at(self, label: str, **fields: str) -> Connection:
        """How a user connects."""
        return Connection(urls=(self.nats.url,), fleet=FLEET, nkey=self.seed(label), **fields)

    def env(self, label: str) -> dict[str, str]:
        """The same as environment variables."""
        return {"COX_NATS_URL": self.nats.url, "COX_FLEET": FLEET, "COX_NATS_NKEY": self.seed(label)}

    async def init(self) -> None:
        """`cox init`, as the admin."""
        async with await Client.connect(self.at("admin")) as admin:
            await init(admin.js, admin.subjects)


@contextmanager
def secured(folder: Path, settings: str = "", users: tuple[str, ...] = USERS) -> Iterator[Secured]:
    """Run one, with the fleet's stream and buckets made."""
    server = Secured(folder, settings, users)
    server.nats.start()
    try:
        asyncio.run(server.init())
        yield server
    finally:
        server.nats.kill()
