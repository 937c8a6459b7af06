"""One fault from its begin to its verdict, and the rig that all of them share."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec

from coxswain.schemas.status import Frame
from tests.faults import checks
from tests.faults.fleet import Fleet, running
from tests.faults.hands import Fault, Hands
from tests.faults.load import Load
from tests.faults.steering import Operator
from tests.faults.watch import Log, Watch

WARM_S: Final = 0.7
"""Load before the fault and after recovery."""
RECOVERY_S: Final = 90.0
LOG_S: Final = 10.0
"""Time for events that waited to be stored."""


class Verdict(msgspec.Struct, kw_only=True):
    """What became of one fault."""

    fault: str
    seconds: float
    """For how long it was there."""
    requests: int = 0
    ended: int = 0
    failed: int = 0
    """Their clients were told so."""
    left: int = 0
    """Their clients went away."""
    empty: int = 0
    """Their clients got an answer without a word: see `checks.ended`."""
    gap_s: float = 0.0
    """The longest wait of any client for a token while it was there; holds are part of it."""
    tokens_per_s: float = 0.0
    """All clients', while it was there."""
    commands: int = 0
    """An operator's, applied."""
    unanswered: int = 0
    refused: dict[int, int] = {}
    command_s: float = 0.0
    """From healing to a command applied on every worker."""
    frame_s: float = 0.0
    """… to a full status frame of every worker."""
    table_s: float = 0.0
    """… until a changed row of the tenants' table is in force on every worker: a controller commands."""
    leader_age_s: float = 0.0
    """The oldest leader that any frame told of, from its begin to recovery."""
    dropped: int = 0
    """Events that were dropped, and counted."""
    grown_mib: dict[str, int] = {}
    """By process, at rest after it against before."""
    problems: list[str] = []


class Rig:
    """A fleet under load, and what watches it. Use `rigged`.

    Args:
        fleet: that runs.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.load = Load(fleet)
        self.operator = Operator(fleet, self.load)
        self.watch = Watch(fleet)
        self.hands = Hands(fleet, self.load, self.watch)
        self._logs = checks.Logs([one.log for one in (*fleet.workers.values(), *fleet.leaders.values())])
        self.level: checks.Level | None = None
        """At rest, after the last fault."""

    async def play(self, fault: Fault) -> Verdict:
        """Do it, heal it, and look at everything."""
        before = self.level or await checks.at_rest(self.fleet)
        self.load.forget()
        operator = self.operator
        operator.applied = operator.unanswered = 0
        operator.refused = {}
        started_at = time.time() - 0.5
        self.load.go()
        await asyncio.sleep(WARM_S)
        self.watch.leader_age_s = 0.0
        problems: list[str] = []
        began, deed = time.perf_counter(), fault.do(self.hands)
        try:
            await asyncio.sleep(await anext(deed))
        except TimeoutError:
            problems.append("not steered while it was there")
        except (
            AssertionError
        ) as error:  # not quite what was wanted happened: the rest is looked at all the same
            problems.append(str(error))
        over, healing_at = time.perf_counter(), time.monotonic()
        async with asyncio.timeout(RECOVERY_S):
            async for _ in deed:
                raise AssertionError("a fault yields once")
            recovered = await asyncio.gather(
                operator.effective(), self.watch.full(healing_at), self.hands.configured()
            )
        await asyncio.sleep(WARM_S)
        await self.load.rest()
        command_s, frame_s, table_s = (round(at - healing_at, 2) for at in recovered)
        verdict = Verdict(
            fault=fault.name,
            seconds=round(over - began, 1),
            command_s=command_s,
            frame_s=frame_s,
            table_s=table_s,
            leader_age_s=round(self.watch.leader_age_s, 2),
            commands=operator.applied,
            unanswered=operator.unanswered,
            refused=operator.refused,
            problems=problems,
        )
        self._count(verdict, began, over)
        await self._judge(fault, verdict, before, started_at)
        return verdict

    def _count(self, verdict: Verdict, began: float, over: float) -> None:
        asked = self.load.asked
        ends = Counter(one.verdict for one in asked)
        verdict.requests = len(asked)
        verdict.ended, verdict.failed, verdict.left = ends["ok"], ends["failed"], ends["left"]
        verdict.empty = ends["empty"]
        gaps = [gap for one in asked for gap in one.gaps() if gap[0] > began and gap[0] - gap[1] < over]
        verdict.gap_s = round(max((length for _, length in gaps), default=0.0), 2)
        pieces = [piece for one in asked for piece in one.stream.pieces if began < piece.at < over]
        verdict.tokens_per_s = round(sum(len(piece.tokens) for piece in pieces) / (over - began), 1)

    async def _judge(self, fault: Fault, verdict: Verdict, before: checks.Level, started_at: float) -> None:
        fleet, asked = self.fleet, self.load.asked
        lives = {worker.name: worker.life for worker in fleet.workers.values()}
        after = self.level = await checks.at_rest(fleet)
        verdict.dropped = sum(
            frame.events_dropped_total - _dropped(before.frames[name], frame)
            for name, frame in after.frames.items()
        )
        complete = not (verdict.dropped or fault.forgets)
        log = await self._log(
            started_at,
            {one.stream.request for one in asked if one.life == lives[one.worker]} - {""}
            if complete
            else set(),
        )
        problems = verdict.problems
        problems += checks.ended(asked, fault.kills, drains=fault.drains)
        problems += checks.empty(after.frames)
        problems += checks.once(asked, log, lives, complete=complete)
        problems += checks.leases(log, checks.LATE_S + fault.freezes_s)
        problems += checks.totals(asked, before.frames, after.frames, log, lives, complete=complete)
        problems += checks.grown(before, after)
        problems += self._logs.faults(fault.kills)
        if verdict.dropped and not fault.forgets:
            problems.append(f"{verdict.dropped} events dropped")
        problems += self.watch.problems
        self.watch.problems.clear()
        verdict.grown_mib = {
            name: (size[0] - before.sizes[name][0]) >> 20
            for name, size in after.sizes.items()
            if name in before.sizes
        }

    async def _log(self, started_at: float, names: set[str]) -> Log:
        """The log of this round, as soon as it has the end of all of these."""
        deadline = time.monotonic() + LOG_S
        while True:
            log = await self.watch.log(started_at)
            if names <= log.finished.keys() or time.monotonic() > deadline:
                return log
            await asyncio.sleep(0.2)


def _dropped(before: Frame, after: Frame) -> int:
    return before.events_dropped_total if before.incarnation == after.incarnation else 0


@asynccontextmanager
async def rigged(folder: Path, *, cluster: bool = False) -> AsyncIterator[Rig]:
    """A fleet under load that is led, for as long as the block runs."""
    async with running(folder, cluster=cluster) as fleet:
        rig = Rig(fleet)
        try:
            await rig.watch.begin()
            async with asyncio.timeout(RECOVERY_S):
                await asyncio.gather(rig.operator.effective(), rig.hands.configured())
            yield rig
        finally:
            await rig.operator.close()
            await rig.load.close()
