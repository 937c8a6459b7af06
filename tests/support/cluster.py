"""Three real nats-servers that keep three copies of everything, as `deploy/compose.cluster.yaml` has them. For tests.

The last one reaches the others, and they it, through proxies alone: it can be cut off while its own clients stay.
"""

import asyncio
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Final, Self

from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import StreamInfo
from nats.js.errors import Error as JetStreamError

from tests.support.nats import NatsServer, free_port
from tests.support.proxy import Proxy

NODES: Final = ("n1", "n2", "n3")
WELL_S: Final = 60.0
LATELY_NS: Final = 2_000_000_000


class NatsCluster:
    """The servers by name; use it as a context, which starts and ends them.

    Args:
        directory: for their configuration, stores and logs.
        jetstream: more settings of it, such as `max_file_store: 8MB`.
    """

    def __init__(self, directory: Path, jetstream: str = "") -> None:
        self._directory = directory
        self._jetstream = jetstream
        self._stack = AsyncExitStack()
        self._proxies: list[Proxy] = []
        self.nodes: dict[str, NatsServer] = {}

    async def __aenter__(self) -> Self:
        """Start all three; until two have found each other nothing can be stored."""
        routes = [free_port() for _ in NODES]
        for port in routes:
            self._proxies.append(await self._stack.enter_async_context(Proxy(port)))
        for place, name in enumerate(NODES):
            # Who hears of a server from another is told its proxy's address.
            last = place == len(NODES) - 1
            others = ", ".join(
                f'"nats-route://127.0.0.1:{self._proxies[other].port if last else routes[other]}"'
                for other in range(len(NODES) - 1)
                if other != place
            )
            folder = self._directory / name
            folder.mkdir()
            node = self.nodes[name] = NatsServer(
                folder,
                f"server_name: {name}\n"
                f'cluster {{ name: cox, listen: "127.0.0.1:{routes[place]}"\n'
                f'  advertise: "127.0.0.1:{self._proxies[place].port}"\n'
                f"  routes: [{others}] }}",
                jetstream=self._jetstream or True,
            )
            self._stack.callback(node.kill)
            await asyncio.to_thread(node.start)
        return self

    async def __aexit__(self, *_: object) -> None:
        """End all three."""
        await self._stack.aclose()

    @property
    def url(self) -> str:
        """All addresses, as COX_NATS_URL takes them."""
        return ",".join(self.urls)

    @property
    def urls(self) -> tuple[str, ...]:
        """The address of each."""
        return tuple(node.url for node in self.nodes.values())

    async def cut_off(self) -> None:
        """Part the last node from the others."""
        for proxy in self._proxies:
            await proxy.cut()

    async def rejoin(self) -> None:
        """Let it come back."""
        for proxy in self._proxies:
            await proxy.mend()


async def leader_of(js: JetStreamContext, stream: str) -> str:
    """The name of the node that leads a stream."""
    async with asyncio.timeout(WELL_S):
        while True:
            if (info := await _info(js, stream)) and info.cluster and info.cluster.leader:
                return info.cluster.leader
            await asyncio.sleep(0.1)


async def well(js: JetStreamContext, stream: str) -> float:
    """Wait until all copies of a stream are there and up to date; how long that took (s)."""
    began = time.monotonic()
    async with asyncio.timeout(WELL_S):
        while True:
            info = await _info(js, stream)
            peers = info.cluster.replicas or [] if info and info.cluster else []
            # Until it is given up, a peer that says nothing is called current.
            there = [
                peer for peer in peers if peer.current and not peer.offline and (peer.active or 0) < LATELY_NS
            ]
            if len(there) == len(NODES) - 1:
                return time.monotonic() - began
            await asyncio.sleep(0.1)


async def _info(js: JetStreamContext, stream: str) -> StreamInfo | None:
    with suppress(NatsError, JetStreamError, TimeoutError):
        async with asyncio.timeout(2.0):
            return await js.stream_info(stream)
    return None
