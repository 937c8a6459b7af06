"""How the demo talks: acts, sentences, live tables on a terminal, plain progress lines elsewhere.

Knows nothing of what is shown. Called by everything else in this package.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

from rich.console import Console, RenderableType
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from coxswain.control.demo.report import Claim

REFRESH_S: Final = 0.25
LINE_EVERY_S: Final = 5.0
"""Between two progress lines where there is no terminal."""
PLAIN_WIDTH: Final = 110
PLAIN_CHARS: Final = 300
"""Of a log's line, where there is no terminal."""


class View(NamedTuple):
    """Something that changes while it is shown: as a table, and as one plain line."""

    table: Callable[[], RenderableType]
    line: Callable[[], str]


class Screen:
    """Where the demo appears.

    Args:
        console: rich's; what is not a terminal gets plain lines.
    """

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(highlight=False)
        self.console = console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)

    def act(self, number: int, title: str, *sentences: str) -> None:
        """Open an act: its title, and in two or three sentences what will happen and why."""
        self.console.print()
        self.console.print(
            Rule(Text(f"Act {number}: {title}", style="bold cyan"), style="cyan", align="left")
        )
        self.say(" ".join(sentences))

    def say(self, text: str, style: str = "") -> None:
        """Print a paragraph."""
        self.console.print(Text(text, style=style))

    def verbatim(self, text: str) -> None:
        """Print lines to be copied: the terminal wraps them, nothing breaks them."""
        self.console.print(Text(text), soft_wrap=True)

    def result(self, text: str) -> None:
        """Print what was seen."""
        self.console.print(Text("→ ", style="bold green") + Text(text))

    def failure(self, text: str, lines: Iterable[str] = ()) -> None:
        """Print what went wrong, and the end of a log, a row a line: vLLM prints its whole configuration in one."""
        self.console.print(Text(text, style="bold red"))
        for line in lines:
            row = Text(f"  │ {line}", style="dim")
            row.truncate(self.console.width if self.console.is_terminal else PLAIN_CHARS, overflow="ellipsis")
            self.console.print(row, soft_wrap=True)

    @asynccontextmanager
    async def show(self, view: View) -> AsyncIterator[None]:
        """Show `view` for as long as the block runs; its last state stays on the screen."""
        if not self.console.is_terminal:
            async with _beside(self._print_lines(view)):
                yield
            self._print_line(view)
            return
        with Live(view.table(), console=self.console, auto_refresh=False) as live:
            async with _beside(self._refresh(view, live)):
                yield
            live.update(view.table(), refresh=True)

    def summary(self, claims: Iterable[Claim]) -> None:
        """The table at the end: every claim, and the numbers behind it."""
        table = Table(box=None, padding=(0, 1), show_header=False, pad_edge=False)
        table.add_column(width=1)
        table.add_column()
        for claim in claims:
            mark = Text("✓", style="bold green") if claim.holds else Text("✗", style="bold red")
            table.add_row(mark, Text(claim.claim, style="bold") + Text(f"\n{claim.seen}", style="default"))
        self.console.print()
        self.console.print(Rule(Text("What was seen", style="bold cyan"), style="cyan", align="left"))
        self.console.print(table)

    async def _refresh(self, view: View, live: Live) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            live.update(view.table(), refresh=True)

    async def _print_lines(self, view: View) -> None:
        while True:
            await asyncio.sleep(LINE_EVERY_S)
            self._print_line(view)

    def _print_line(self, view: View) -> None:
        # Where there is no terminal nobody sees a line's width: one state, one line.
        self.console.print(Text(f"  {view.line()}"), soft_wrap=True)


@asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
