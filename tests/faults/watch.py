"""What the bus says: every status frame as it comes, and the event log when it is asked for."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from coxswain.control.errors import UnreachableError
from coxswain.schemas import events as ev
from coxswain.schemas.status import Frame, decode_frame
from tests.faults.fleet import Fleet

READABLE_S = 60.0
OLD_S = 120.0
"""Nobody here waits for so long: a row that says so went by a clock that jumped."""


@dataclass
class Seen:
    """What was heard of one worker."""

    frame: Frame
    full_at: float = 0.0
    """When the last full frame came (monotonic s)."""
    totals: dict[str, int] = field(default_factory=dict)
    """Output tokens per tenant, of this incarnation."""


class Watch:
    """A subscription to all status; use `begin` and `close`.

    Args:
        fleet: what to watch.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.seen: dict[str, Seen] = {}
        self.problems: list[str] = []
        """What no frame may say: totals that shrink."""
        self.leader_age_s = 0.0
        """The oldest leader that any frame told of, since it was last set to 0."""
        self._fleet = fleet

    async def begin(self) -> None:
        """Listen."""
        self._subscription = await self._fleet.cox.nc.subscribe(
            self._fleet.cox.subjects.status_all, cb=self._heard
        )

    async def _heard(self, message: Any) -> None:
        frame = decode_frame(message.data)
        seen = self.seen.get(frame.worker)
        if seen is None or frame.incarnation > seen.frame.incarnation:
            seen = self.seen[frame.worker] = Seen(frame)
        elif frame.incarnation < seen.frame.incarnation or frame.seq < seen.frame.seq:
            return  # late, over a connection that was given up
        seen.frame = frame
        if frame.full:
            seen.full_at = time.monotonic()
        self.leader_age_s = max(self.leader_age_s, frame.leader.age_s or 0.0)
        for row in frame.tenants:
            if row.output_tokens_total < seen.totals.get(row.tenant, 0):
                self.problems.append(f"{frame.worker}: output tokens of {row.tenant} shrink")
            seen.totals[row.tenant] = row.output_tokens_total
            if row.oldest_queued_s > OLD_S:
                self.problems.append(
                    f"{frame.worker}: {row.tenant} is said to wait for {row.oldest_queued_s:.0f} s"
                )

    async def full(self, after: float) -> float:
        """Wait for a full frame of every worker; when the last came."""
        while True:
            times = [seen.full_at for seen in self.seen.values()]
            if len(times) == len(self._fleet.workers) and min(times) > after:
                return max(times)
            await asyncio.sleep(0.01)

    async def in_force(self, config: str) -> float:
        """Wait until every worker says that it has these tables; when the last did."""
        while {seen.frame.config for seen in self.seen.values()} != {config}:  # noqa: ASYNC110 - as `full`
            await asyncio.sleep(0.01)
        return time.monotonic()

    async def log(self, start: float | None) -> "Log":
        """The event log, from a Unix time on (None: all of it), once JetStream has recovered."""
        async with asyncio.timeout(READABLE_S):
            while True:
                log = Log()
                try:
                    async for event in self._fleet.cox.events(
                        start="all" if start is None else start, follow=False
                    ):
                        assert isinstance(event, ev.Event), event
                        log.add(event)
                except UnreachableError:
                    await asyncio.sleep(0.2)
                else:
                    return log


class Log:
    """The stored events of one round."""

    def __init__(self) -> None:
        self.events: list[ev.Event] = []
        self.finished: dict[str, list[ev.Finished]] = {}
        """By request."""
        self.seqs: dict[str, list[int]] = {}
        """By incarnation."""

    def add(self, event: ev.Event) -> None:
        """Take the next."""
        self.events.append(event)
        self.seqs.setdefault(event.incarnation, []).append(event.seq)
        if isinstance(event, ev.Finished) and event.request:
            self.finished.setdefault(event.request, []).append(event)

    def kinds(self) -> Counter[str]:
        """How many of each kind."""
        return Counter(type(event).__struct_config__.tag for event in self.events)
