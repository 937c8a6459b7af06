"""An operator who never rests: holds, continues and reorders whatever runs, over NATS, whether or not it is there."""

import asyncio
import random
import time
from contextlib import suppress
from typing import Any

from ulid import ULID

from coxswain.control.errors import ControlError
from coxswain.schemas.commands import COMMANDS, Reply, Targets
from coxswain.schemas.errors import RefusedError
from tests.faults.fleet import Fleet
from tests.faults.load import Load

EVERY_S = 0.15
PATIENCE_S = 0.5
LEASES_S = (0.2, 0.5, 1.0)


class Operator:
    """Commands to random live requests, one after the other.

    Args:
        fleet: whom to command.
        load: whose requests.
        seed: of the choices.
    """

    def __init__(self, fleet: Fleet, load: Load, seed: int = 0) -> None:
        self.applied = 0
        self.unanswered = 0
        self.refused: dict[int, int] = {}
        """By code."""
        self._fleet = fleet
        self._load = load
        self._dice = random.Random(seed)
        self._task = asyncio.create_task(self._work())

    async def close(self) -> None:
        """Rest."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def say(self, worker: str, verb: str, targets: Targets, **fields: Any) -> Reply | None:
        """Send one command; None if nobody answered."""
        command = COMMANDS[verb](id=str(ULID()), targets=targets, **fields)
        try:
            (reply,) = await self._fleet.cox.command(worker, verb, command, timeout_s=PATIENCE_S)
        except (ControlError, RefusedError):
            return None
        return reply

    async def effective(self) -> float:
        """Wait until every worker has applied a command; the monotonic time when the last did."""
        for worker in self._fleet.workers:
            while True:
                reply = await self.say(worker, "prioritize", Targets(tenants=("nobody",)), priority=0)
                if reply is not None and reply.outcome == "applied":
                    break
                await asyncio.sleep(0.05)
        return time.monotonic()

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            named = [one for one in self._load.live if one.stream.request]
            if not named:
                continue
            one = self._dice.choice(named)
            verb = self._dice.choice(["preempt", "preempt", "continue", "prioritize"])
            fields: dict[str, Any] = {}
            if verb == "preempt":
                fields = {"lease_s": self._dice.choice(LEASES_S), "kv": self._dice.choice(["keep", "drop"])}
            elif verb == "prioritize":
                fields = {"priority": self._dice.randrange(-3, 4)}
            # Refused because it ended meanwhile, or not answered: that is what faults are for.
            reply = None
            with suppress(OSError):
                reply = await self.say(one.worker, verb, Targets(requests=(one.stream.request,)), **fields)
            if reply is None:
                self.unanswered += 1
            elif reply.code is None:
                self.applied += 1
            else:
                self.refused[reply.code] = self.refused.get(reply.code, 0) + 1
