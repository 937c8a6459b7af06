"""How often one kind of line may be logged. Called wherever a peer could make us log without end."""

import time
from collections.abc import Callable, Hashable


class Throttle:
    """Lets each thing through at most once per `period_s`, and `most` things of a kind; counts what it held back.

    What strangers can invent without end (a worker's name, a subject, the text of an error) goes into `what`, never
    into `kind`.
    """

    def __init__(
        self, period_s: float = 60.0, most: int = 20, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._period_s = period_s
        self._most = most
        self._clock = clock
        self._said: dict[str, dict[Hashable, float]] = {}
        self._held: dict[str, int] = {}

    def allow(self, kind: str, *what: Hashable) -> int | None:
        """How many of the kind were held back since one last passed, or None if this one is held back too."""
        now = self._clock()
        said = {it: at for it, at in self._said.get(kind, {}).items() if now - at < self._period_s}
        self._said[kind] = said
        if what in said or len(said) >= self._most:
            self._held[kind] = self._held.get(kind, 0) + 1
            return None
        said[what] = now
        return self._held.pop(kind, 0)
