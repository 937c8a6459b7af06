"""What `cox top` puts over its tables: the question before a command, a request's story, the keys.

Foreign text (ids, tenants, reasons) is shown as `rich.text.Text`, never as markup.
"""

from collections.abc import Awaitable, Callable
from typing import ClassVar, Final

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, Label, Static

from coxswain.control.cli.words import printable
from coxswain.control.top.steering import ASKS, FIRST, Target, Verb, build
from coxswain.schemas.commands import Targeted
from coxswain.schemas.names import ALL

STORY_S: Final = 1.0
"""A story on the screen is asked for again this often."""

HELP: Final = """\
 Tab  Shift+Tab  the next, the previous table
 ↑ ↓  g G        move; also PgUp, PgDn and the mouse
 Enter           a tenant's or worker's requests, a request's story
 a               requests of all tenants, or of the one under the cursor
 s  S            sort by the next column; reverse the order
 /               filter this table; Esc shows all again
 w               workers or classes, where there is no room for both

 h               hold        the tenant, class or request that the cursor
 c               continue    is on. You are asked first; the outcome
 p               prioritize  appears below and under "What happened"

 Space           pause (a replay: its clock)
 ← →  + -        a replay: 10 s back, 10 s on; faster, slower
 q               quit

 SHARE  part of all service of the last 30 s (priced tokens, as charged)
 DUE    what its weight is worth: its part, among the tenants of its
        class that want anything, of what the class got; ┃ in the bar
 TTFT   median of the requests whose first token came in that time
 CAPS   in force: running/queued
 DUE    of a request: time left until its class's deadline
"""


class Question(ModalScreen[tuple[str, Targeted] | None]):
    """Asks before a command is sent; gives the wire's verb and the command, or None.

    Args:
        verb: what is to be done.
        target: to whom.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "no", "No", show=False),
        Binding("enter,y", "yes", "Yes", show=False),
    ]

    def __init__(self, verb: Verb, target: Target) -> None:
        super().__init__()
        self.verb: Verb = verb
        self.target = target

    def compose(self) -> ComposeResult:
        """The question, what must be known, and how to answer."""
        verb, target = self.verb, self.target
        where = "all workers" if target.worker == ALL else target.worker
        question = Text(printable(f"{verb.capitalize()} {target.name} on {where}?"), style="bold").append(
            "\n"
        )
        question.append(printable(target.count), style="not bold dim")
        with Vertical(classes="dialog"):
            yield Static(question)
            if ASKS[verb]:
                yield Label(ASKS[verb])
                yield Input(FIRST[verb], select_on_focus=True)
            yield Static("", classes="error")
            yield Label(Text("Enter: yes   Esc: cancel", style="dim"))

    def on_input_submitted(self) -> None:
        """Enter in the field is a yes."""
        self.action_yes()

    def action_yes(self) -> None:
        """Make the command; what cannot be one is said in words."""
        field = self.query(Input)
        try:
            self.dismiss(build(self.verb, self.target, field.first().value if field else ""))
        except ValueError as error:
            self.query_one(".error", Static).update(Text(printable(str(error)), style="red"))

    def action_no(self) -> None:
        """Nothing is sent."""
        self.dismiss(None)


class Story(ModalScreen[None]):
    """One request: what it is and what happened to it, asked for again and again.

    Args:
        tell: gives the story as of now.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,enter", "close", "Close", show=False)]

    def __init__(self, tell: Callable[[], Awaitable[Text]]) -> None:
        super().__init__()
        self._tell = tell

    def compose(self) -> ComposeResult:
        """The story in a frame that scrolls."""
        with VerticalScroll(classes="story"):
            yield Static(Text("…"), id="text")
        yield Label(Text("↑ ↓ scroll   Esc close", style="dim"), classes="hint")

    async def on_mount(self) -> None:
        """Tell it now, and again every second."""
        self.query_one(VerticalScroll).focus()
        await self._renew()
        self.set_interval(STORY_S, self._renew)

    async def _renew(self) -> None:
        self.query_one("#text", Static).update(await self._tell())

    def action_close(self) -> None:
        """Back to the tables."""
        self.dismiss(None)


class Help(ModalScreen[None]):
    """The keys, and what the columns mean."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,enter,question_mark", "close", "Close", show=False)
    ]

    def compose(self) -> ComposeResult:
        """One page."""
        with VerticalScroll(classes="story"):
            yield Static(Text(HELP))

    def action_close(self) -> None:
        """Back to the tables."""
        self.dismiss(None)
