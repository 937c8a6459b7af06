"""Put the parts of split frames together. Pure; called by `client` and `fleet`."""

from collections.abc import Iterable

import msgspec

from coxswain.schemas.status import Frame


class Assembler:
    """Collects the parts of one worker's full frame: the newest only, so memory is bounded by one frame."""

    def __init__(self) -> None:
        self._key: tuple[str, int] | None = None
        self._parts: dict[int, Frame] = {}

    def add(self, frame: Frame) -> Frame | None:
        """The whole frame once its last missing part is in, else None. Repeated parts change nothing."""
        if frame.parts <= 1:
            return frame
        key = (frame.incarnation, frame.seq)
        if key != self._key:
            if self._key and self._key[0] == frame.incarnation and frame.seq < self._key[1]:
                return None
            self._key, self._parts = key, {}
        self._parts[frame.part] = frame
        if len(self._parts) < frame.parts:
            return None
        ordered = [self._parts[part] for part in sorted(self._parts)]
        self._key, self._parts = None, {}
        return msgspec.structs.replace(
            ordered[0],
            part=0,
            parts=1,
            tenants=tuple(row for part in ordered for row in part.tenants),
            classes=tuple(row for part in ordered for row in part.classes),
            requests=tuple(row for part in ordered for row in part.requests),
            gone=tuple(row for part in ordered for row in part.gone),
        )


def join(frames: Iterable[Frame]) -> dict[str, Frame]:
    """Whole frames by worker, from parts in any order; a frame that lacks a part is left out."""
    assemblers: dict[str, Assembler] = {}
    whole: dict[str, Frame] = {}
    for frame in frames:
        done = assemblers.setdefault(frame.worker, Assembler()).add(frame)
        if done is not None:
            whole[frame.worker] = done
    return whole
