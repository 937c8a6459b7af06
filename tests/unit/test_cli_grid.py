"""Tables that fit the terminal, numbers that read well, and text that cannot steer the terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from coxswain.control.cli.grid import Column, Row, grid
from coxswain.control.cli.words import clock, count, printable, share, span

COLUMNS = (Column(title="NAME", cut=6), Column(title="N", right=True), Column(title="MORE", drop=1))


def _lines(width: int, *rows: Row) -> list[str]:
    return grid(COLUMNS, rows, width).plain.split("\n")


def test_a_wide_terminal_shows_every_column_whole() -> None:
    """Columns are padded to their widest cell, numbers to the right."""
    rows = [Row(cells=["a-long-name", "7", "x"]), Row(cells=["b", "12345", "yy"])]
    assert _lines(80, *rows) == [
        "NAME             N  MORE",
        "a-long-name      7  x",
        "b            12345  yy",
    ]


def test_a_narrow_terminal_cuts_names_then_drops_columns() -> None:
    """Names are cut as far as they may be; when that is not enough, columns go and names are whole again."""
    row = Row(cells=["a-long-name", "7", "x"])
    assert _lines(16, row) == ["NAME     N  MORE", "a-long…  7  x"]
    assert _lines(14, row) == ["NAME         N", "a-long-name  7"]
    assert _lines(11, row) == ["NAME      N", "a-long-…  7"]


def test_the_line_below_is_never_cut() -> None:
    """An id is there to be copied, whatever the width."""
    assert _lines(9, Row(cells=["a", "7", "x"], below="r" * 70))[-1] == "  " + "r" * 70


def test_wide_characters_keep_the_columns_straight() -> None:
    """Characters of two cells count as two."""
    lines = _lines(80, Row(cells=["初音ミク", "7", "x"]), Row(cells=["ab", "8", "y"]))
    assert cell_len(lines[1].partition("7")[0]) == cell_len(lines[2].partition("8")[0])


@given(
    st.lists(st.tuples(st.text(max_size=40), st.text(max_size=4), st.text(max_size=20)), max_size=5),
    st.integers(min_value=14, max_value=60),
)
def test_no_line_is_wider_than_the_terminal(rows: list[tuple[str, str, str]], width: int) -> None:
    """Whatever the cells contain, a table that can fit does, and control characters are gone."""
    columns = (Column(title="A", cut=6), Column(title="B", cut=2), Column(title="C", drop=1))
    text = grid(columns, [Row(cells=row) for row in rows], width).plain
    lines = text.split("\n")
    assert len(lines) == len(rows) + 1
    assert all(cell_len(line) <= width for line in lines)
    assert text.replace("\n", "").isprintable()


def test_text_of_strangers_cannot_steer_the_terminal() -> None:
    """Escape sequences and line ends are shown, not sent."""
    assert printable("a\x1b[2Jb\nc") == r"a\x1b[2Jb\nc"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0384, "38ms"),
        (0.9999, "1.0s"),
        (4.21, "4.2s"),
        (59.7, "1m00s"),
        (185, "3m05s"),
        (7800, "2h10m"),
        (273_600, "3d04h"),
        (-41, "-41s"),
    ],
)
def test_durations_use_two_units_at_most(seconds: float, text: str) -> None:
    """A duration takes few cells at any size."""
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (9999, "9999"),
        (12_345, "12.3k"),
        (999_940, "999.9k"),
        (999_960, "1.0M"),
        (4_500_000, "4.5M"),
        (-20_000, "-20.0k"),
    ],
)
def test_counts_stay_short(number: float, text: str) -> None:
    """Up to four digits are shown as they are, more with a unit."""
    assert count(number) == text


def test_shares_of_nothing_are_no_number() -> None:
    """A worker without KV blocks has no KV use."""
    assert share(1, 0) == "-"
    assert share(1, 3) == "33%"


def test_clock_shows_milliseconds() -> None:
    """Events of one step are told apart."""
    assert clock(1_700_000_000.1239).endswith(".123")
