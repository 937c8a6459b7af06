"""The faults: what is done to the fleet, one small function each.

A fault is an async generator: it injects, yields for how many seconds the fault stays, then heals; the first line of its
docstring says it in the tables. To add one, write it here; everything else (load, checks, recovery, table) is shared.
"""

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from typing import Final, NamedTuple

from nats.js.errors import Error as JetStreamError

from coxswain.control.lease import KEY
from tests.faults.fleet import Fleet, Leader
from tests.faults.load import STORM, Asked, Load
from tests.faults.watch import Watch


class Hands(NamedTuple):
    """What a fault can reach."""

    fleet: Fleet
    load: Load
    watch: Watch

    async def leader(self) -> Leader:
        """Who leads now."""
        bucket = await self.fleet.cox.js.key_value(self.fleet.cox.subjects.lease_bucket)
        value = (await bucket.get(KEY)).value or b""
        return next(leader for name, leader in self.fleet.leaders.items() if f'"{name}"'.encode() in value)


Deed = Callable[[Hands], AsyncIterator[float]]


class Fault(NamedTuple):
    """One fault and what it may cost."""

    name: str
    do: Deed
    short: bool
    """Whether it is in the short form."""
    kills: frozenset[str]
    """Workers whose requests may fail."""
    forgets: bool
    """Whether the event log may lose what it had."""
    freezes_s: float
    """For how long the engine cannot end a lease."""

    @property
    def what(self) -> str:
        """In words."""
        return (self.do.__doc__ or "").split("\n")[0].rstrip(".")


FAULTS: Final[dict[str, Fault]] = {}


def fault(
    *, short: bool = False, kills: tuple[str, ...] = (), forgets: bool = False, freezes_s: float = 0.0
) -> Callable[[Deed], Deed]:
    """Add a function to the list of faults, under its name."""

    def add(do: Deed) -> Deed:
        name = do.__name__.replace("_", "-")
        FAULTS[name] = Fault(name, do, short, frozenset(kills), forgets, freezes_s)
        return do

    return add


@fault(short=True)
async def nothing(hands: Hands) -> AsyncIterator[float]:
    """Nothing: what load and steering alone look like."""
    del hands
    yield 3.0


# NATS


@fault(short=True)
async def nats_killed(hands: Hands) -> AsyncIterator[float]:
    """NATS killed for 2 s, and started again with its store."""
    hands.fleet.nats.kill()
    yield 2.0
    hands.fleet.nats.start()


@fault(forgets=True)
async def nats_killed_long(hands: Hands) -> AsyncIterator[float]:
    """NATS killed for 12 s: longer than any lease of a leader."""
    hands.fleet.nats.kill()
    yield 12.0
    hands.fleet.nats.start()


@fault(short=True, forgets=True)
async def nats_store_lost(hands: Hands) -> AsyncIterator[float]:
    """NATS killed, and started again with an empty disk; `cox init` a second later."""
    hands.fleet.nats.kill()
    shutil.rmtree(hands.fleet.nats.store)
    yield 0.5
    hands.fleet.nats.start()
    await asyncio.sleep(1.0)
    await hands.fleet.init()


@fault(short=True)
async def nats_paused(hands: Hands) -> AsyncIterator[float]:
    """NATS frozen for 3 s (SIGSTOP): connections stay open, nothing answers."""
    hands.fleet.nats.pause()
    yield 3.0
    hands.fleet.nats.resume()


@fault()
async def nats_paused_long(hands: Hands) -> AsyncIterator[float]:
    """NATS frozen for 12 s: workers give the connection up."""
    hands.fleet.nats.pause()
    yield 12.0
    hands.fleet.nats.resume()
