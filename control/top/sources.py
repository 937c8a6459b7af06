"""Where the frames of `cox top` come from: a live fleet, perhaps recorded at the same time, or a recording.

Called by `app.py` and `cli/top.py`. Needs no textual.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Final, Protocol

from coxswain.control.view.recording import Recorder, Recording
from coxswain.schemas.status import Frame

if TYPE_CHECKING:
    from coxswain.control.client import Client

BEAT_S: Final = 0.05
"""A replay gives frames in portions of this much time."""
MAX_SPEED: Final = 1_000.0

Timed = tuple[float, Frame]
"""When a frame came (Unix s), and the frame."""


class Source(Protocol):
    """Frames, and the clock that they belong to."""

    fleet: str

    def now(self) -> float:
        """The time that the screen shows (Unix s)."""

    def frames(self) -> AsyncIterator[Timed]:
        """Frames as they come."""


class Live:
    """A fleet as it is.

    Args:
        client: connected.
        recorder: what to write frames to as well.
    """

    def __init__(self, client: "Client", recorder: Recorder | None = None) -> None:
        self.client = client
        self.recorder = recorder
        self.fleet = client.subjects.fleet

    def now(self) -> float:
        """This machine's clock."""
        return time.time()

    async def frames(self) -> AsyncIterator[Timed]:
        """Every frame of every worker, for ever."""
        async for frame in self.client.frames():
            now = time.time()
            if self.recorder is not None:
                self.recorder.write(frame, now)
            yield now, frame


class Replay:
    """A recording, played.

    Args:
        recording: open.
        speed: seconds of it per second.
    """

    def __init__(self, recording: Recording, speed: float = 1.0) -> None:
        self.recording = recording
        self.fleet = recording.fleet
        self.speed = speed
        self.paused = False
        self._now = recording.start

    def now(self) -> float:
        """How far we are (Unix s, of the recording)."""
        return self._now

    @property
    def ended(self) -> bool:
        """Whether there is nothing more."""
        return self._now >= self.recording.end

    async def frames(self) -> AsyncIterator[Timed]:
        """Frames at the times at which they came, faster or slower, for ever: after the end one may seek back."""
        before = time.monotonic()
        while True:
            for timed in self.recording.read(self._now):
                yield timed
            await asyncio.sleep(BEAT_S)
            took, before = time.monotonic() - before, time.monotonic()
            if not self.paused:
                self._now = min(self.recording.end, self._now + took * self.speed)

    def seek(self, at: float) -> Iterator[Timed]:
        """Go to a time, and give the frames that tell how all was then."""
        self._now = max(self.recording.start, min(at, self.recording.end))
        self.recording.seek(self._now)
        return self.recording.read(self._now)

    def accelerate(self, factor: float) -> None:
        """Play faster or slower."""
        self.speed = max(1 / 16, min(MAX_SPEED, self.speed * factor))
