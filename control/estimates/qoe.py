"""Quality of experience of a token stream, as Andes has it (arXiv 2404.16283). Pure; called by policies and tests.

A user expects the first token `ttft_s` after asking and reads `speed` tokens per second from then on; nobody reads
what is not there yet. Quality is the area under what was read ÷ the area under what would have been, both until the
last token is read or expected: 1 for a stream that never kept its user waiting, towards 0 the later it comes.
"""

from collections.abc import Iterable


class Reader:
    """One user, followed as tokens come. Times in seconds since the request arrived; tokens as real numbers.

    Args:
        ttft_s: when the first token is expected.
        speed: tokens per second that the user reads.
    """

    __slots__ = ("at", "delivered", "expected_area", "read", "read_area", "speed", "ttft_s")

    def __init__(self, ttft_s: float, speed: float) -> None:
        self.ttft_s = ttft_s
        self.speed = speed
        self.at = 0.0
        self.delivered = 0.0
        self.read = 0.0
        self.read_area = 0.0
        """Token-seconds."""
        self.expected_area = 0.0

    def look(self, at: float, delivered: float) -> None:
        """Time has come to `at`, and so many tokens have: they count as there from now on."""
        took = max(0.0, at - self.at)
        reading = min(took, self.buffered_s)
        gained = self.speed * reading
        self.read_area += self.read * took + gained * (took - reading / 2.0)
        self.expected_area += self._expected_between(self.at, at)
        self.read += gained
        self.at += took
        self.delivered = max(self.delivered, delivered)

    @property
    def buffered_s(self) -> float:
        """How long the user can read on without another token."""
        return max(0.0, self.delivered - self.read) / self.speed

    def gain(self, horizon_s: float) -> float:
        """How much quality is lost within the horizon if nothing comes in it and not if it is served at once."""
        starving = max(0.0, horizon_s - self.buffered_s)
        lost = self.speed * starving**2 / 2.0
        area = self.expected_area + self._expected_between(self.at, self.at + horizon_s)
        return lost / max(area, self.speed * horizon_s**2 / 2.0)

    def _expected_between(self, begin: float, end: float) -> float:
        return self.speed / 2.0 * (max(0.0, end - self.ttft_s) ** 2 - max(0.0, begin - self.ttft_s) ** 2)


def quality(tokens_at: Iterable[float], *, ttft_s: float, speed: float) -> float:
    """The quality of a whole stream, 0 to 1.

    Args:
        tokens_at: when each token came, in seconds since the request arrived.
        ttft_s: when the first is expected; the i-th (from 0) is at ttft_s + i / speed.
        speed: tokens per second.

    Returns:
        Area read ÷ area expected, both until the later of the last token's reading and its expected time.
    """
    times = list(tokens_at)
    if not times:
        return 1.0
    read = 0.0
    reads: list[float] = []
    for place, at in enumerate(times):
        read = at if not place else max(at, read + 1.0 / speed)
        reads.append(max(read, ttft_s + place / speed))
    end = max(reads[-1], ttft_s + (len(times) - 1) / speed) + 1.0 / speed
    actual = sum(end - at for at in reads)
    expected = sum(end - (ttft_s + place / speed) for place in range(len(times)))
    return actual / expected
