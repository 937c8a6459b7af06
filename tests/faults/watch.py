"""What the bus says: every status frame as it comes, and the event log when it is asked for."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from coxswain.schemas import events as ev
from coxswain.schemas.status import Frame, decode_frame
from tests.faults.fleet import Fleet

LED_S = 1.5
"""A leader that was heard so lately leads: it beats twice a second."""


@dataclass
class Seen:
    """What was heard of one worker."""

    frame: Frame
    full_at: float = 0.0
    """When the last full frame came (monotonic s)."""
    led_at: float = 0.0
    """When a frame last said that a leader leads."""
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
        now = time.monotonic()
        if frame.full:
            seen.full_at = now
        if frame.leader.epoch is not None and (frame.leader.age_s or 0.0) < LED_S:
            seen.led_at = now
        for row in frame.tenants:
            if row.output_tokens_total < seen.totals.get(row.tenant, 0):
                self.problems.append(f"{frame.worker}: output tokens of {row.tenant} shrink")
            seen.totals[row.tenant] = row.output_tokens_total

    async def full(self, after: float) -> float:
        """Wait for a full frame of every worker; when the last came."""
        return await self._until("full_at", after)

    async def led(self, after: float) -> float:
        """Wait until every worker says that it is led; when the last did."""
        return await self._until("led_at", after)

    async def _until(self, what: str, after: float) -> float:
        while True:
            times = [getattr(seen, what) for seen in self.seen.values()]
            if len(times) == len(self._fleet.workers) and min(times) > after:
                return float(max(times))
            await asyncio.sleep(0.01)

    async def log(self, start: float | None) -> "Log":
        """The event log, from a Unix time on (None: all of it)."""
        log = Log()
        async for event in self._fleet.cox.events(start="all" if start is None else start, follow=False):
            assert isinstance(event, ev.Event), event
            log.add(event)
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
