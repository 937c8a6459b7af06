"""A fault of its own: what nats-server passes on and nats-py cannot read."""

import asyncio
from collections.abc import AsyncGenerator

from tests.faults.hands import Hands, fault
from tests.support.any_bytes import LINES, send


@fault()
async def bytes_unreadable(hands: Hands) -> AsyncGenerator[float, None]:
    """Messages that nats-py cannot read, eleven kinds to everybody, each second for 8 s."""
    own = hands.fleet.cox.subjects
    for _ in range(8):
        for subject in (
            own.query("all", "status"),
            own.command("operator", "all", "drain"),
            own.status("w1"),
        ):
            for line in LINES.values():
                await send(hands.fleet.cox.nc, line % subject.encode())
        await asyncio.sleep(1.0)
    assert hands.watch.leader_age_s < 5.0, "a worker heard its leader no more"
    yield 0.0
