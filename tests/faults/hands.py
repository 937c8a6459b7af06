"""What a fault is, the list of all, and what they can reach. The faults themselves: `faults`."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Final, NamedTuple

from coxswain.control.errors import ControlError
from coxswain.control.lease import KEY
from coxswain.schemas.policy import TenantPolicy, digest
from tests.faults.fleet import Fleet, Leader
from tests.faults.load import Load
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

    async def configured(self) -> float:
        """Change the tenants' table, and wait until a controller has told every worker; when the last had it."""
        row = TenantPolicy(weight=1.0 + random.random())
        while True:
            with suppress(ControlError, TimeoutError):  # a cluster that elects answers nothing
                async with asyncio.timeout(2.0):
                    await self.fleet.cox.tenants.put("nobody", row)
                    break
            await asyncio.sleep(0.1)
        return await self.watch.in_force(digest({}, {"nobody": row}))


Deed = Callable[[Hands], AsyncGenerator[float, None]]


class Fault(NamedTuple):
    """One fault and what it may cost."""

    name: str
    do: Deed
    short: bool
    """Whether it is in the short form."""
    kills: frozenset[str]
    """Workers whose requests may fail."""
    forgets: bool
    """Whether the event log loses what it had, and may be away for so long that events are dropped."""
    freezes_s: float
    """For how long the engine cannot end a lease."""
    drains: bool
    """Whether those workers are told to end, rather than killed."""
    cluster: bool
    """Whether it is one of a cluster of NATS servers."""

    @property
    def what(self) -> str:
        """In words."""
        return (self.do.__doc__ or "").split("\n")[0].rstrip(".")


FAULTS: Final[dict[str, Fault]] = {}


def fault(
    *,
    short: bool = False,
    kills: tuple[str, ...] = (),
    forgets: bool = False,
    freezes_s: float = 0.0,
    drains: bool = False,
    cluster: bool = False,
) -> Callable[[Deed], Deed]:
    """Add a function to the list of faults, under its name."""

    def add(do: Deed) -> Deed:
        name = do.__name__.replace("_", "-")
        FAULTS[name] = Fault(name, do, short, frozenset(kills), forgets, freezes_s, drains, cluster)
        return do

    return add
