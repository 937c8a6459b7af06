"""A fleet's status frames in a file: recorded as they come, read again at any place. Called by `cox top`.

JSON lines: first `{"cox_recording": 1, "fleet": …, "at": …}`, then `{"at": …, "frame": {…}}` for every frame, in the
order in which they came; `at` is when (Unix s). Frames are as on the wire (docs/protocol.md), so any JSON tool reads
a recording.
"""

from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from coxswain.control.errors import ControlError
from coxswain.schemas.errors import UNREADABLE
from coxswain.schemas.status import Frame

VERSION: Final = 1
MAX_BYTES: Final = 4 << 30
"""A recording ends here: whoever forgot it keeps a disk that is not full."""
LEAD_IN_S: Final = 2.0
"""From so long before a place the frames are read at least, to know how all was there: full ones come every second."""
MAX_LEAD_IN_S: Final = 32.0
"""And at most: where they cost much, every 30 s."""


class RecordingError(ControlError):
    """A file is no recording, or cannot be written."""


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The first line."""

    cox_recording: int
    fleet: str
    at: float


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """Every other line."""

    at: float
    frame: Frame


class _FrameHead(msgspec.Struct):
    worker: str
    full: bool


class _LineHead(msgspec.Struct):
    at: float
    frame: _FrameHead


_encode: Final = msgspec.json.Encoder().encode
_decode_head: Final = msgspec.json.Decoder(Head).decode
_decode_line: Final = msgspec.json.Decoder(Line).decode
_decode_line_head: Final = msgspec.json.Decoder(_LineHead).decode


class Recorder:
    """Writes a recording; a context.

    Args:
        path: a file that does not exist yet.
        fleet: whose frames.
        now: Unix s.

    Raises:
        RecordingError: if the file exists or cannot be made.
    """

    def __init__(self, path: Path, fleet: str, now: float) -> None:
        try:
            self._file = path.open("xb")
        except FileExistsError:
            raise RecordingError(
                f"{path} exists: a recording is never written over; name another file"
            ) from None
        except OSError as error:
            raise RecordingError(f"{path} cannot be written: {error.strerror or error}") from error
        self.path = path
        self.frames = 0
        self.full = False
        """Whether `MAX_BYTES` are written: then frames are passed over."""
        self._bytes = 0
        self._put(Head(cox_recording=VERSION, fleet=fleet, at=now))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, frame: Frame, at: float) -> None:
        """Add a frame that came at `at`.

        Raises:
            RecordingError: if the disk does not take it.
        """
        if self._bytes >= MAX_BYTES:
            self.full = True
            return
        self._put(Line(at=at, frame=frame))
        self.frames += 1

    def _put(self, line: msgspec.Struct) -> None:
        try:
            self._bytes += self._file.write(_encode(line) + b"\n")
            self._file.flush()
        except OSError as error:
            raise RecordingError(f"{self.path} cannot be written: {error.strerror or error}") from error


class Recording:
    """A recording, and a place in it: everything before the place was read. A context.

    Raises:
        RecordingError: if the file cannot be read, is none, is of a later version, or has no frame in it.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise RecordingError(f"{path} cannot be read: {error.strerror or error}") from error
        self._times: list[float] = []
        self._offsets: list[int] = []
        self._place = 0
        self._lead_in_s = LEAD_IN_S
        try:
            self.fleet = self._head().fleet
            self._index()
        except RecordingError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def start(self) -> float:
        """When the first frame came (Unix s)."""
        return self._times[0]

    @property
    def end(self) -> float:
        """When the last frame came (Unix s)."""
        return self._times[-1]

    def read(self, until: float) -> Iterator[tuple[float, Frame]]:
        """The next frames that came no later than `until`, each with when it came; unreadable ones are passed over."""
        while self._place < len(self._times) and self._times[self._place] <= until:
            self._file.seek(self._offsets[self._place])
            self._place += 1
            try:
                line = _decode_line(self._file.readline())
            except UNREADABLE:
                continue
            yield line.at, line.frame

    def seek(self, at: float) -> None:
        """Go to a place so far before `at` that what is read from there tells all that was known at `at`."""
        self._place = bisect_right(self._times, at - self._lead_in_s)

    def _head(self) -> Head:
        try:
            head = _decode_head(self._file.readline())
        except UNREADABLE as error:
            raise RecordingError(f"{self._file.name} is no recording of `cox top --record`") from error
        if head.cox_recording > VERSION:
            raise RecordingError(f"{self._file.name} is of a later version of cox: update this one")
        return head

    def _index(self) -> None:
        offset = self._file.tell()
        full_at: dict[str, float] = {}
        """When each worker's last full frame came."""
        for line in self._file:
            try:
                head = _decode_line_head(line)
            except UNREADABLE:  # the last line of a recording that was cut off, as a rule
                offset += len(line)
                continue
            # A clock that was set back must not hide what follows.
            at = max(head.at, self._times[-1] if self._times else head.at)
            self._times.append(at)
            self._offsets.append(offset)
            offset += len(line)
            if head.frame.full:
                apart_s = at - full_at.get(head.frame.worker, at)
                self._lead_in_s = max(self._lead_in_s, min(apart_s + LEAD_IN_S, MAX_LEAD_IN_S))
                full_at[head.frame.worker] = at
        if not self._times:
            raise RecordingError(f"{self._file.name} has no frame in it")
