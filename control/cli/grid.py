"""Tables for a terminal of any width: columns in one line each, dropped or cut only when they must be.

Pure: rows in, `rich.text.Text` lines out. Plain when colours are off, because nothing but spaces is drawn.
Called by the `view_*` modules. Knows nothing of what it shows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from coxswain.control.cli.words import printable

GAP: Final = "  "

Cell = str | Text


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column.

    Attributes:
        title: its head.
        right: align right, for numbers.
        drop: when cutting is not enough, columns with the highest `drop` go first; 0 stays.
        cut: may be shortened to this many cells, with an ellipsis; 0 may not.
    """

    title: str
    right: bool = False
    drop: int = 0
    cut: int = 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """Cells in the order of the columns, and a line to show under them, never cut: it is to be copied."""

    cells: Sequence[Cell]
    below: str = ""


def grid(columns: Sequence[Column], rows: Sequence[Row], width: int) -> Text:
    """The table as one text: a head, then one or two lines per row, `width` cells wide where possible."""
    table = [[_text(cell) for cell in row.cells] for row in rows]
    sizes = _sizes(columns, table)
    shown = _shown(columns, sizes, width)
    sizes = _cut(columns, sizes, shown, width)
    head = [Text(column.title, style="bold") for column in columns]
    lines = [_line(columns, head, sizes, shown)]
    for row, cells in zip(rows, table, strict=True):
        lines.append(_line(columns, cells, sizes, shown))
        if row.below:
            lines.append(Text(GAP + printable(row.below), style="dim"))
    return Text("\n").join(lines)


def grid_width(columns: Sequence[Column], rows: Sequence[Row]) -> int:
    """How wide the table is with every column whole."""
    return _total(_sizes(columns, [[_text(cell) for cell in row.cells] for row in rows]), range(len(columns)))


def _text(cell: Cell) -> Text:
    return Text(printable(cell)) if isinstance(cell, str) else cell


def _sizes(columns: Sequence[Column], table: Sequence[Sequence[Text]]) -> list[int]:
    """Cells that each column takes, whole."""
    return [
        max([cell_len(column.title), *(cell_len(cells[index].plain) for cells in table)])
        for index, column in enumerate(columns)
    ]


def _total(sizes: Sequence[int], shown: Iterable[int]) -> int:
    each = [sizes[index] for index in shown]
    return sum(each) + len(GAP) * max(0, len(each) - 1)


def _shown(columns: Sequence[Column], sizes: Sequence[int], width: int) -> list[int]:
    """Indices of the columns that stay."""
    # A column that can be cut counts with the width it may be cut to.
    least = [
        min(size, column.cut) if column.cut else size for column, size in zip(columns, sizes, strict=True)
    ]
    shown = list(range(len(columns)))
    while _total(least, shown) > width and (worst := max(columns[index].drop for index in shown)) > 0:
        shown = [index for index in shown if columns[index].drop != worst]
    return shown


def _cut(columns: Sequence[Column], sizes: list[int], shown: list[int], width: int) -> list[int]:
    """Sizes with the widest of the cuttable columns shortened until the table fits."""
    sizes = list(sizes)
    cuttable = {index: columns[index].cut for index in shown if columns[index].cut}
    while cuttable and (over := _total(sizes, shown) - width) > 0:
        widest = max(cuttable, key=lambda index: sizes[index])
        if sizes[widest] <= cuttable[widest]:
            del cuttable[widest]
            continue
        rival = max((sizes[index] for index in cuttable if index != widest), default=0)
        sizes[widest] = max(cuttable[widest], sizes[widest] - over, min(rival, sizes[widest]) - 1)
    return sizes


def _line(
    columns: Sequence[Column], cells: Sequence[Text], sizes: Sequence[int], shown: Sequence[int]
) -> Text:
    line = Text()
    for place, index in enumerate(shown):
        cell, size = cells[index].copy(), sizes[index]
        if cell_len(cell.plain) > size:
            cell.plain = set_cell_size(cell.plain, size - 1).rstrip() + "…"
        pad = " " * (size - cell_len(cell.plain))
        last = place == len(shown) - 1
        if columns[index].right:
            line.append(pad).append_text(cell)
        else:
            line.append_text(cell).append("" if last else pad)
        if not last:
            line.append(GAP)
    return line
