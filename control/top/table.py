"""The one table of `cox top`: a head, rows, and a cursor that follows its row when the order changes.

Only what is on the screen is laid out, so that ten thousand rows cost what thirty do. Columns adapt to the width
(`cli/grid.py`). Knows rows and keys, not what they mean.
"""

from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from coxswain.control.cli.grid import Row, grid
from coxswain.control.cli.words import printable
from coxswain.control.top.columns import Spec

R = TypeVar("R")


class Table(Widget, Generic[R], can_focus=True):
    """Rows of one kind.

    Args:
        spec: what is shown.
        id: of the widget.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("home,g", "move(-1000000000)", "First", show=False),
        Binding("end,G", "move(1000000000)", "Last", show=False),
        Binding("enter", "open", "Open", show=False),
    ]

    COMPONENT_CLASSES: ClassVar[set[str]] = {"table--cursor", "table--place"}

    class Moved(Message):
        """The cursor is on another row, or on none."""

        def __init__(self, table: "Table[object]") -> None:
            super().__init__()
            self.table = table

    class Opened(Message):
        """Enter was pressed on a row."""

        def __init__(self, table: "Table[object]") -> None:
            super().__init__()
            self.table = table

    def __init__(self, spec: Spec[R], *, id: str) -> None:  # noqa: A002  (textual's word)
        super().__init__(id=id)
        self.spec = spec
        self.sort = spec.sorts[0]
        self.turned = False
        self.wanted = ""
        """What rows must have in them."""
        self.scope = ""
        """What the rows are limited to, for the title."""
        self._rows: list[R] = []
        self._now = 0.0
        self._all = 0
        self._cursor = 0
        self._first = 0
        """The first row on the screen."""
        self._lines: list[Text] = []

    # What is shown

    def show(self, rows: Sequence[R], now: float) -> None:
        """Put rows on the screen; the cursor stays on its row if that is still there."""
        before, old_key, height = self._cursor, self.key, len(self._rows)
        self._all = len(rows)
        self._now = now
        self._rows = self.spec.arrange(rows, sort=self.sort, turned=self.turned, wanted=self.wanted)
        place = next((place for place, row in enumerate(self._rows) if self.spec.key(row) == old_key), None)
        self._cursor = max(0, min(before, len(self._rows) - 1)) if place is None else place
        self._entitle()
        self._lay_out()
        if height != len(self._rows):
            self.refresh(layout=True)
        if self.key != old_key:
            self.post_message(self.Moved(self))  # type: ignore[arg-type]

    @property
    def key(self) -> str | None:
        """The key of the row under the cursor."""
        return self.spec.key(self._rows[self._cursor]) if self._rows else None

    @property
    def row(self) -> R | None:
        """The row under the cursor."""
        return self._rows[self._cursor] if self._rows else None

    def _entitle(self) -> None:
        scope = f" of {self.scope}" if self.scope else ""
        some = f"{len(self._rows)} of {self._all}" if len(self._rows) != self._all else f"{self._all}"
        arrow = "↓" if self.sort.falling != self.turned else "↑"
        wanted = f" · /{self.wanted}" if self.wanted else ""
        # Titles are markup to textual, and tenants are called what they like.
        self.border_title = Text(
            printable(f"{self.spec.title}{scope} {some} · {self.sort.name} {arrow}{wanted}")
        )

    def _lay_out(self) -> None:
        room = max(0, self.size.height - 1)
        self._first = max(0, min(self._first, len(self._rows) - room))
        if self._cursor < self._first:
            self._first = self._cursor
        elif room and self._cursor >= self._first + room:
            self._first = self._cursor - room + 1
        rows = self._rows[self._first : self._first + room]
        shown = [Row(cells=self.spec.cells(row, self._now)) for row in rows]
        self._lines = list(
            grid(self.spec.columns, shown, max(1, self.size.width)).split("\n", allow_blank=True)
        )
        self.refresh()

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:  # noqa: ARG002
        """The head and all rows; the style sheet says how much of that there is room for."""
        return 1 + max(1, len(self._rows))

    def render_line(self, y: int) -> Strip:
        """One line of the screen."""
        width, base = self.size.width, self.rich_style
        if y >= len(self._lines):
            return Strip.blank(width, base)
        line = self._lines[y].copy()
        style = base
        if y and self._first + y - 1 == self._cursor:
            # Colours would be hard to read on the cursor's own.
            line = Text(line.plain)
            style = self.get_component_rich_style("table--cursor" if self.has_focus else "table--place")
        strip = Strip(line.render(self.app.console)).apply_style(style)
        return strip.adjust_cell_length(width, style).simplify()

    # What the user does

    def action_move(self, rows: int) -> None:
        """Move the cursor."""
        self._go(self._cursor + rows)

    def action_page(self, pages: int) -> None:
        """Move the cursor by what the screen shows."""
        self._go(self._cursor + pages * max(1, self.size.height - 2))

    def action_open(self) -> None:
        """Tell that the row under the cursor is wanted."""
        if self._rows:
            self.post_message(self.Opened(self))  # type: ignore[arg-type]

    def next_sort(self) -> None:
        """Sort by the next thing."""
        sorts = self.spec.sorts
        self.sort = sorts[(sorts.index(self.sort) + 1) % len(sorts)]
        self.turned = False

    def on_click(self, event: events.Click) -> None:
        """Put the cursor where the mouse is; a second click opens."""
        offset = event.get_content_offset(self)
        if offset is None or offset.y < 1:
            return
        place = self._first + offset.y - 1
        if place < len(self._rows):
            self._go(place)
            if event.chain > 1:
                self.action_open()

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Move on."""
        event.stop()
        self.action_move(1)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Move back."""
        event.stop()
        self.action_move(-1)

    def on_resize(self) -> None:
        """Lay out for the new size."""
        self._lay_out()

    def _go(self, place: int) -> None:
        place = max(0, min(place, len(self._rows) - 1))
        if place != self._cursor:
            self._cursor = place
            self._lay_out()
            self.post_message(self.Moved(self))  # type: ignore[arg-type]
