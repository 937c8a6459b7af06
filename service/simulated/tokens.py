"""What a request says: a token that depends on its prompt and the position alone.

Pure. Called by `runner` and `device`. A disturbed run (held, dropped, recomputed, in any batch) must give the
same tokens as an undisturbed one; sampling parameters are not looked at, and two requests with the same
prompt say the same. Stable across processes and machines.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

_MASK: Final = 2**64 - 1


def seed_of(prompt: Sequence[int]) -> int:
    """64 bits that stand for a prompt."""
    return int.from_bytes(blake2b(array("q", prompt).tobytes(), digest_size=8).digest(), "little")


def draw(seed: int, position: int) -> int:
    """64 well-mixed bits for one position of one request (splitmix64's finaliser, Steele et al., OOPSLA'14)."""
    bits = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    return bits ^ (bits >> 31)


class Vocabulary:
    """The tokens that a simulated model may say.

    Args:
        size: how many ids there are.
        never: ids that it does not say by itself: end of sequence, so that `max_tokens` decides the length.
    """

    def __init__(self, size: int, never: frozenset[int] = frozenset()) -> None:
        # The upper half: byte-level vocabularies begin with single bytes and special tokens, which make no text.
        self._first = size // 2
        self._count = size - self._first
        self._never = never
        if self._never.issuperset(range(self._first, size)):
            raise ValueError(f"a vocabulary of {size} tokens leaves none to say beside {sorted(never)}")

    def token(self, seed: int, position: int) -> int:
        """The token at a position, counted from 0 at the prompt's first token."""
        place = draw(seed, position) % self._count
        while self._first + place in self._never:
            place = (place + 1) % self._count
        return self._first + place

    def draft(self, seed: int, position: int) -> int:
        """What a drafter guesses for a position: right three times out of four."""
        right = draw(~seed & _MASK, position) % 4
        return self.token(seed, position) if right else self._first + draw(seed, position + 1) % self._count
