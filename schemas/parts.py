"""Put the parts of split frames together. Pure; called by `control` and by the HTTP edge."""

from collections.abc import Iterable
from itertools import chain
from typing import Final, Generic, Protocol, TypeVar

import msgspec

from coxswain.schemas.status import MAX_PARTS, Frame

ROWS: Final = ("tenants", "classes", "requests", "gone")
"""The fields of a frame that grow, and are shared out over its parts."""


class Part(Protocol):
    """What joining needs of a frame, or of as much of one as its reader decodes."""

    @property
    def incarnation(self) -> str:
        """Which run of the worker sent it."""

    @property
    def seq(self) -> int:
        """Its number."""

    @property
    def part(self) -> int:
        """From 0."""

    @property
    def parts(self) -> int:
        """How many there are."""


P = TypeVar("P", bound=Part)
T = TypeVar("T")


class Parts(Generic[T]):
    """Collects something for each part of one worker's full frame, the newest only: memory is bounded by one frame.

    An impossible part (the third of two) is ignored.
    """

    def __init__(self) -> None:
        self._key: tuple[str, int] | None = None
        self._known: dict[int, T] = {}

    def add(self, frame: Part, what: T) -> list[T] | None:
        """What was collected, in order, once the last missing part is in, else None. Repeated parts change nothing."""
        if not 0 <= frame.part < frame.parts <= MAX_PARTS:
            return None
        if frame.parts == 1:
            return [what]
        key = (frame.incarnation, frame.seq)
        if key != self._key:
            if self._key and self._key[0] == frame.incarnation and frame.seq < self._key[1]:
                return None
            self._key, self._known = key, {}
        self._known[frame.part] = what
        if len(self._known) < frame.parts:
            return None
        ordered = [self._known[part] for part in sorted(self._known)]
        self._key, self._known = None, {}
        return ordered


class Assembler(Generic[P]):
    """Makes one frame of the parts of one worker's full frame."""

    def __init__(self) -> None:
        self._parts: Parts[P] = Parts()

    def add(self, frame: P) -> P | None:
        """The whole frame once its last missing part is in, else None."""
        ordered = self._parts.add(frame, frame)
        if ordered is None or frame.parts == 1:
            return ordered[0] if ordered else None
        rows = {
            field: tuple(chain.from_iterable(getattr(part, field) for part in ordered))
            for field in ROWS
            if hasattr(frame, field)
        }
        whole: P = msgspec.structs.replace(ordered[0], part=0, parts=1, **rows)  # type: ignore[type-var]
        return whole


def join(frames: Iterable[Frame]) -> dict[str, Frame]:
    """Whole frames by worker, from parts in any order; a frame that lacks a part is left out."""
    assemblers: dict[str, Assembler[Frame]] = {}
    whole: dict[str, Frame] = {}
    for frame in frames:
        done = assemblers.setdefault(frame.worker, Assembler()).add(frame)
        if done is not None:
            whole[frame.worker] = done
    return whole
