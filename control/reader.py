"""Status payloads in, frames out, with no more of each read than is news. Pure; called by `daemon` as they come.

A full frame lists every tenant that its worker ever served, and each worker sends one every second, or every 30 if it
is dear, so that losses are repaired. Whoever lost nothing knows its rows already from the deltas before it, as its
`revision` says: then its head is read alone. Of large fleets that is half of all rows. Most rows of a delta say that a
tenant was served, which its `charged` says in a tenth of the bytes: whoever keeps accounts reads the others alone.
"""

from collections.abc import Callable
from typing import Final
from zlib import crc32

import msgspec
from msgspec.structs import replace

from coxswain.control.fleet import Fleet
from coxswain.schemas.commands import encode
from coxswain.schemas.names import DEFAULT
from coxswain.schemas.policy import Count
from coxswain.schemas.status import ONE, ZERO, Frame, Number, Total, decode_frame, decode_glance

MAX_UNREAD: Final = 599
"""Full frames in a row of which only the head is read. The next is read whole, so that no mistake lasts: after ten
minutes, or after hours of a worker with so many tenants that its full frames come seldom.

Much more often, and it would be what the slowest turns of a large fleet are made of."""
MAX_INCARNATIONS: Final = 4_096
"""Of which it is remembered what was read; beyond, all begin anew."""
_HEAD_BYTES: Final = 512
"""Within these a frame says whether it is full: names have 64 characters at most."""
_TENANTS: Final = b',"tenants":['
"""Where the rows of a frame begin, which workers write last."""


class TenantSeen(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """As much of a `TenantStatus` as `Accounts` look at: a tenth of the time that reading takes is for the rest."""

    tenant: str
    class_: str = msgspec.field(name="class", default=DEFAULT)
    queued: Count = 0
    running: Count = 0
    held: Count = 0
    base: Number = ZERO
    charged: Number = ZERO
    lift: Number = ZERO
    weight: Number = ONE
    uncached_input_tokens_total: Total = 0
    cached_input_tokens_total: Total = 0
    max_running: Count | None = None
    max_queued: Count | None = None
    expected_output: Number = ZERO


class FrameSeen(Frame, frozen=True, kw_only=True):
    """A frame for a fleet that keeps accounts."""

    tenants: tuple[TenantSeen, ...] = ()  # type: ignore[assignment]  # such a fleet looks at nothing else of them


_decode_seen = msgspec.json.Decoder(FrameSeen).decode
_decode_rows = msgspec.json.Decoder(tuple[TenantSeen, ...]).decode


class ImpostorError(msgspec.ValidationError):
    """A frame that came on another worker's subject than its own."""


class _Heard:
    """What was read of one incarnation."""

    __slots__ = ("parts", "revision", "seq", "unbroken", "unread", "wanted")

    def __init__(self, incarnation: str) -> None:
        self.seq = -1
        self.parts: set[int] = set()
        self.wanted = 0
        """Parts that the frame `seq` has."""
        self.revision = 0
        self.unbroken = False
        """Whether a full frame was read whole, and every delta up to `revision` since."""
        self.unread = crc32(incarnation.encode()) % MAX_UNREAD
        """Workers begin at different places, so that a fleet's full frames are not all read in the same second."""

    def note(self, frame: Frame) -> None:
        """Another frame, or part of one, was read."""
        if frame.seq < self.seq:
            return
        if frame.seq > self.seq:
            if not frame.full:
                whole = len(self.parts) == self.wanted
                # A heartbeat between full frames has no revision: it says nothing of what changed.
                follows = frame.revision in (0, self.revision + 1)
                self.unbroken = self.unbroken and whole and follows
                self.revision = frame.revision or self.revision
            self.seq, self.wanted, self.parts = frame.seq, frame.parts, set()
        self.parts.add(frame.part)
        if frame.full and len(self.parts) == self.wanted:
            self.unbroken, self.revision = frame.revision > 0, frame.revision
            self.unread %= MAX_UNREAD

    @property
    def whole(self) -> bool:
        """Whether all was read up to `revision`."""
        return self.unbroken and len(self.parts) == self.wanted


class Reader:
    """Reads the status of all workers.

    Args:
        fleet: into which all that is read is merged, before more is. If it keeps accounts only, frames come without
            single requests, and rows with no more than an account is made of.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._decode: Callable[[bytes], Frame] = decode_frame if fleet.rows else _glance
        self._heard: dict[tuple[str, str], _Heard] = {}

    def read(self, worker: str, payload: bytes) -> Frame:
        """The frame with the rows that are news, or with more; a full one with nothing new as a delta without rows.

        Args:
            worker: whose it is, by its subject: permissions are given on subjects, nobody speaks for another worker.
            payload: as it came.

        Raises:
            msgspec.MsgspecError: it is no frame.
            ImpostorError: it claims to be of another worker.
        """
        if (news := self._news(worker, payload)) is not None:
            return news
        frame = self._decode(payload)
        if frame.worker != worker:
            raise ImpostorError(f"it claims to be of worker {frame.worker[:64]!r}")
        key, view = (worker, frame.incarnation), self._fleet.workers.get(worker)
        # What was read while another incarnation had the turn was not merged, so it is not known.
        if key not in self._heard or view is None or view.incarnation != frame.incarnation:
            if len(self._heard) >= MAX_INCARNATIONS:
                self._heard.clear()
            self._heard[key] = _Heard(frame.incarnation)
        self._heard[key].note(frame)
        return frame

    def _news(self, worker: str, payload: bytes) -> Frame | None:
        """A frame as a delta with the rows that are news, if it tells which and all before it is known; else None."""
        view = self._fleet.workers.get(worker)
        # Of an incarnation that the fleet would not have, or not yet, everything may have been read in vain.
        if view is None or not view.complete:
            return None
        heard = self._heard.get((worker, view.incarnation))
        if heard is None or not heard.whole:
            return None
        # Where rows are kept, all of a delta are news.
        if self._fleet.rows and payload.find(b'"full":true', 0, _HEAD_BYTES) < 0:
            return None
        try:
            end = payload.index(_TENANTS)
            head = decode_frame(payload[:end] + b"}")
            if head.worker != worker or head.incarnation != view.incarnation:
                return None
            if head.full:
                if head.revision == heard.revision and heard.unread < MAX_UNREAD:
                    heard.unread += head.part + 1 == head.parts
                    return replace(head, full=False)
            elif head.charged and head.revision == heard.revision + 1:
                rows = _rows(payload, end + len(_TENANTS), next(iter(head.charged)))
                heard.note(head)
                return replace(head, tenants=rows)
        except (ValueError, msgspec.MsgspecError):
            pass  # somebody else's order of fields, or of rows
        return None


def _glance(payload: bytes) -> Frame:
    return decode_glance(payload, _decode_seen)


def _rows(payload: bytes, begin: int, before: str) -> tuple[TenantSeen, ...]:
    """The rows that come before a tenant's, which is in the payload as no name or text can be."""
    end = payload.index(b'{"tenant":' + encode(before), begin)
    return _decode_rows(b"[" + payload[begin : end - 1] + b"]") if end > begin else ()
