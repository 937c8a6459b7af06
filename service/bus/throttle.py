"""How often one kind of line may be logged.

Pure: the clock's reading is passed in. Called wherever a peer could make us log without end.
"""


class Throttle:
    """Lets each key through at most once per `period_s`, and counts what it held back."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._keys: dict[str, tuple[float, int]] = {}

    def allow(self, key: str, now: float) -> int | None:
        """How many were held back since the last time, or None if this one is held back too."""
        if len(self._keys) > 256 and key not in self._keys:
            self._keys.clear()  # a peer invents keys: forget, rather than grow
        last, held = self._keys.get(key, (None, 0))
        if last is not None and now - last < self._period_s:
            self._keys[key] = (last, held + 1)
            return None
        self._keys[key] = (now, 0)
        return held
