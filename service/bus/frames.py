"""How status goes out: frames numbered, stamped, split to fit, and repeated while the engine sleeps.

Pure: structs and a clock's reading in, payloads out. Called by `session.py` and `loop.py`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec
from msgspec.structs import replace

from coxswain.schemas.commands import VERBS, encode
from coxswain.schemas.errors import Code
from coxswain.schemas.names import OTHER
from coxswain.schemas.parts import ROWS
from coxswain.schemas.policy import Epoch
from coxswain.schemas.status import ClassStatus, CommandStats, Frame, TenantStatus

_SLACK: Final = 64
"""Bytes by which `seq`, `part` and `parts` may grow when they are filled in."""

LIFE: Final = 2**32
"""More frames than one bus can send; a JSON number holds two million lives exactly."""
Rows = dict[str, tuple[Any, ...]]
Queued = TypeVar("Queued", TenantStatus, ClassStatus)


class Frames:
    """The status of one incarnation on its way out.

    Commands that the bus refused itself are added to the engine's count, so that a frame counts them all.

    Args:
        life: how many buses sent this incarnation's frames before; numbers go on above theirs.
        refused: what they had refused.
        waiting: by a clock's reading, how many events wait for the log and for how long the oldest has.
    """

    def __init__(
        self,
        life: int = 0,
        refused: Mapping[str, Mapping[str, int]] | None = None,
        waiting: Callable[[float], tuple[int, float]] = lambda _now: (0, 0.0),
    ) -> None:
        self._refused = {verb: Counter(codes) for verb, codes in (refused or {}).items()}
        self._waiting = waiting
        self._seq = life * LIFE
        self._idle: tuple[Frame, float] | None = None
        self._parts = 1
        """How many the last frame had that was sent whole."""
        self._beats = 0
        """Heartbeats since then."""
        self._led: tuple[Epoch | None, float] = (None, 0.0)
        """The epoch of the last heartbeat of a leader, and when it came."""

    def outgoing(self, frame: Frame, now: float, limit: int, *, idle: bool) -> list[bytes]:
        """A frame as payloads of at most `limit` bytes; an `idle` one is kept to repeat."""
        self.remember(frame, now, idle=idle)
        return self._number(frame, now, limit)

    def remember(self, frame: Frame, now: float, *, idle: bool, known: bool = False) -> None:
        """Take note of a frame, also of one that cannot be sent: an idle one stays true until the next.

        `known`: listeners have all of it already, from deltas; otherwise it is repeated soon.
        """
        self._idle = (frame, now) if idle else None
        if not known:
            self._beats = self._parts

    def led(self, epoch: Epoch, now: float) -> None:
        """Note a leader's heartbeat: an idle engine makes no frame for one that changes nothing."""
        if self._led[0] is None or epoch >= self._led[0]:
            self._led = (epoch, now)

    def heartbeat(self, now: float, limit: int) -> list[bytes]:
        """The idle frame again, as of now; nothing while the engine is awake.

        One that takes several parts is repeated only every so many heartbeats, so that a heartbeat costs one part on
        average. Those between only say that the worker is alive, as deltas without rows and without a revision.
        """
        if self._idle is None:
            return []
        frame, since = self._idle
        passed = max(0.0, now - since)
        leader = frame.leader
        if leader.age_s is not None:
            age_s = leader.age_s + passed
            epoch, led_at = self._led
            if epoch == leader.epoch:
                age_s = min(age_s, max(0.0, now - led_at))
            leader = replace(leader, age_s=age_s)
        self._beats += 1
        if self._beats < self._parts:
            bare = replace(frame, full=False, revision=0, leader=leader, **dict.fromkeys(ROWS, ()))
            return self._number(bare, now, limit)
        # What waits while the engine sleeps is kept back by its caps, and waits on.
        tenants, classes = _aged(frame.tenants, passed), _aged(frame.classes, passed)
        return self._number(replace(frame, leader=leader, tenants=tenants, classes=classes), now, limit)

    @property
    def idle(self) -> bool:
        """Whether there is a frame to repeat."""
        return self._idle is not None

    def refuse(self, verb: str, code: Code) -> None:
        """Count a command that the bus refused; unknown verbs count as one, since strangers can invent any."""
        self._refused.setdefault(verb if verb in VERBS else OTHER, Counter())[str(int(code))] += 1

    @property
    def refused(self) -> dict[str, dict[str, int]]:
        """Commands refused by the bus, by verb and code."""
        return {verb: dict(codes) for verb, codes in self._refused.items()}

    def _number(self, frame: Frame, now: float, limit: int) -> list[bytes]:
        self._seq += 1
        payloads = split(self.stamp(frame, now), limit)
        if frame.full:
            self._parts, self._beats = len(payloads), 0
        return payloads

    def stamp(self, frame: Frame, now: float) -> Frame:
        """A frame with the last number given, and what the bus itself knows; it answers `query status` as it is."""
        events, oldest_s = self._waiting(now)
        return replace(
            frame, seq=self._seq, sent_at=now, part=0, parts=1, commands=self._count(frame.commands),
            events_waiting=events, events_waiting_s=oldest_s,
        )  # fmt: skip

    def _count(self, stats: CommandStats) -> CommandStats:
        if not self._refused:
            return stats
        rejected, outcomes = Counter(stats.rejected_total), dict(stats.outcomes_total)
        for verb, codes in self._refused.items():
            rejected += codes
            outcomes[verb] = dict(codes + Counter(outcomes.get(verb)))
        return replace(stats, rejected_total=dict(rejected), outcomes_total=outcomes)


def _aged(rows: tuple[Queued, ...], passed: float) -> tuple[Queued, ...]:
    return tuple(
        replace(row, oldest_queued_s=row.oldest_queued_s + passed) if row.queued else row for row in rows
    )


def split(frame: Frame, limit: int) -> list[bytes]:
    """A frame as payloads of at most `limit` bytes: every row in exactly one, all else in each.

    But for `charged` and `bases`, which are in none. A single row that is larger than `limit` gets a part of its own,
    over the limit: rows are never dropped.
    """
    whole = encode(frame)
    if len(whole) <= limit:
        return [whole]
    bare = replace(frame, charged={}, bases={}, **dict.fromkeys(ROWS, ()))
    shares = list(_shares(frame, limit - len(encode(bare)) - _SLACK))
    return [encode(replace(bare, part=part, parts=len(shares), **rows)) for part, rows in enumerate(shares)]


def _shares(frame: Frame, room: int) -> Iterator[Rows]:
    """Rows in order, as many at a time as fit into `room` bytes."""
    rows = [(field, row, len(encode(row)) + 1) for field in ROWS for row in getattr(frame, field)]
    share: list[tuple[str, msgspec.Struct]] = []
    used = 0
    for field, row, size in rows:
        if share and used + size > room:
            yield _gather(share)
            share, used = [], 0
        share.append((field, row))
        used += size
    yield _gather(share)


def _gather(share: Sequence[tuple[str, msgspec.Struct]]) -> Rows:
    return {field: tuple(row for name, row in share if name == field) for field in ROWS}
