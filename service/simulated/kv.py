"""What the KV cache holds, without a model: for every cell, which prefix its content was computed from.

Pure. Called by `checker`. The KV of a position depends on all tokens up to it, so a cell's content is a
chain over them: equal content means that a request may read the cell as its own, whoever wrote it (that is
what makes prefix caching right), and anything else shows.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

EMPTY = None


class Bad(NamedTuple):
    """The first position whose cell holds something else."""

    position: int
    block: int
    empty: bool


def extend(chain: list[int], tokens: Sequence[int], end: int, salt: int) -> None:
    """Grow `chain` to the content of positions below `end` of these tokens; `salt` stands for the adapter."""
    content = chain[-1] if chain else salt
    for token in tokens[len(chain) : end]:
        content = hash((content, token))
        chain.append(content)


class KvContent:
    """Blocks of cells.

    Args:
        block_size: tokens per block.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._cells: dict[int, list[int | None]] = {}

    def write(self, blocks: Sequence[int], start: int, chain: Sequence[int], end: int) -> set[int]:
        """Write the content of positions from `start` below `end` through a block table; the blocks touched."""
        size = self.block_size
        touched = set()
        for position in range(start, end):
            block = blocks[position // size]
            if block not in self._cells:
                self._cells[block] = [EMPTY] * size
            self._cells[block][position % size] = chain[position]
            touched.add(block)
        return touched

    def read(self, blocks: Sequence[int], chain: Sequence[int], end: int) -> Bad | None:
        """Compare positions below `end` with what they should hold; the first that differs."""
        size = self.block_size
        for index in range(-(-end // size)):
            first, last = index * size, min(end, (index + 1) * size)
            cells = self._cells.get(blocks[index], [EMPTY] * size)
            if cells[: last - first] != chain[first:last]:
                place = next(i for i in range(last - first) if cells[i] != chain[first + i])
                return Bad(first + place, blocks[index], cells[place] is EMPTY)
        return None

    def zero(self, blocks: Iterable[int]) -> None:
        """Forget what these blocks hold."""
        for block in blocks:
            self._cells.pop(block, None)

    def copy(self, source: int, target: int) -> None:
        """Copy one block to another."""
        self._cells[target] = self.cells(source)

    def cells(self, block: int) -> list[int | None]:
        """A copy of what a block holds."""
        return list(self._cells.get(block, [EMPTY] * self.block_size))

    def fill(self, block: int, cells: Sequence[int | None]) -> None:
        """Put into a block what another held."""
        self._cells[block] = list(cells)

    def clear(self) -> None:
        """Forget everything, as a device does that slept."""
        self._cells.clear()
