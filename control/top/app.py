"""The screen of `cox top`: tables of one overview, and keys. Draws; what is true is `control/view/overview.py`'s.

Frames come from a `Source` and go into the overview as they come; the screen is drawn at its own pace, so a fleet of
any size costs the terminal the same. Called by `cli/top.py`.
"""

from typing import Any, ClassVar, Final, cast

from rich.text import Text
from textual import on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widgets import Footer, Input, Static

from coxswain.control.cli.view_requests import Told, story
from coxswain.control.cli.words import printable
from coxswain.control.errors import ControlError, NoAnswerError
from coxswain.control.top.columns import CLASSES, REQUESTS, TENANTS, WORKERS
from coxswain.control.top.dialogs import Help, Question, Story
from coxswain.control.top.lines import head, line
from coxswain.control.top.sources import Live, Replay, Source
from coxswain.control.top.steering import Target, Verb, send
from coxswain.control.top.table import Table
from coxswain.control.view.overview import TICK_S, Overview
from coxswain.control.view.picture import ClassRow, Happening, Picture, RequestRow, TenantRow, WorkerRow
from coxswain.schemas.commands import Targeted, Targets
from coxswain.schemas.errors import RefusedError
from coxswain.schemas.status import Child, RequestQuery, RequestReport

JUMP_S: Final = 10.0


class TopApp(App[None]):
    """A fleet on a terminal.

    Args:
        source: where frames come from.
        every_s: time between two drawings.
        timeout_s: how long to wait for answers.
    """

    CSS_PATH = "top.tcss"
    TITLE = "cox top"
    ENABLE_COMMAND_PALETTE = False
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (130, "-wide")]  # noqa: RUF012  (textual's, not a class variable)
    VERTICAL_BREAKPOINTS = [(0, "-low"), (40, "-high")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("h", "steer('hold')", "Hold"),
        Binding("c", "steer('continue')", "Continue"),
        Binding("p", "steer('prioritize')", "Prioritize"),
        Binding("s", "sort", "Sort"),
        Binding("S", "turn", "Turn", show=False),
        Binding("slash", "filter", "Filter", key_display="/"),
        Binding("a", "all", "All"),
        Binding("w", "upper", "Workers/classes", show=False),
        Binding("space", "pause", "Pause", key_display="␣"),
        Binding("left", "jump(-1)", "Back", show=False),
        Binding("right", "jump(1)", "On", show=False),
        Binding("plus,equals_sign", "speed(2.0)", "Faster", show=False),
        Binding("minus", "speed(0.5)", "Slower", show=False),
        Binding("escape", "clear", "Clear", show=False),
        Binding("question_mark", "help", "Help", key_display="?"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(self, source: Source, *, every_s: float = 0.5, timeout_s: float = 2.0) -> None:
        super().__init__()
        self.source = source
        self.every_s = every_s
        self.timeout_s = timeout_s
        self.overview = Overview(source.fleet)
        self.troubles: list[str] = []
        """What the connection went through: `lost`, `back`, or the text of an error; the last one counts."""
        self.failure: Exception | None = None
        """Why it ended, if not by the user's wish."""
        self._stopped = False
        self._own_tenant = True
        """Whether requests are those of the tenant under the cursor."""
        self._on_worker = ""
        self._picture = self.overview.picture(source.now())

    # What is there

    def compose(self) -> ComposeResult:
        """Head, workers and classes, tenants, requests, what happened, keys."""
        yield Static(id="head")
        with Horizontal(id="upper"):
            yield Table(WORKERS, id="workers")
            yield Table(CLASSES, id="classes")
        yield Table(TENANTS, id="tenants")
        yield Table(REQUESTS, id="requests")
        log = Static(id="log")
        log.border_title = "What happened"
        yield log
        yield Input(placeholder="words that rows must have", id="filter")
        yield Footer(show_command_palette=False, compact=True)

    @property
    def worker_table(self) -> Table[WorkerRow]:
        """The table of workers."""
        return cast("Table[WorkerRow]", self.query_one("#workers"))

    @property
    def class_table(self) -> Table[ClassRow]:
        """The table of classes."""
        return cast("Table[ClassRow]", self.query_one("#classes"))

    @property
    def tenant_table(self) -> Table[TenantRow]:
        """The table of tenants."""
        return cast("Table[TenantRow]", self.query_one("#tenants"))

    @property
    def request_table(self) -> Table[RequestRow]:
        """The table of requests."""
        return cast("Table[RequestRow]", self.query_one("#requests"))

    def on_mount(self) -> None:
        """Begin to read and to draw."""
        self.tenant_table.focus()
        self.run_worker(self._read(), exit_on_error=False, name="frames")
        self.set_interval(TICK_S, self._tick)
        self.set_interval(self.every_s, self.draw)
        self.draw()

    # Time

    async def _read(self) -> None:
        try:
            async for at, frame in self.source.frames():
                self.overview.feed(frame, at)
        except (ControlError, OSError) as error:
            self.failure = error
            self.exit()

    def _tick(self) -> None:
        self.overview.tick(self.source.now())

    def draw(self) -> None:
        """Put the overview on the screen."""
        if self._stopped or not self.is_running:
            return
        now = self.source.now()
        picture = self._picture = self.overview.picture(now)
        self.query_one("#head", Static).update(self._head(picture))
        self.worker_table.show(picture.workers, now)
        self.class_table.show(picture.classes, now)
        self.tenant_table.show(picture.tenants, now)
        self._show_requests()
        self._show_log()

    def _show_requests(self) -> None:
        tenant = self.tenant_table.key if self._own_tenant else None
        worker = self._on_worker

        def wanted(row: RequestRow) -> bool:
            return (tenant is None or row.status.tenant == tenant) and (not worker or row.worker == worker)

        self.request_table.scope = " on ".join(filter(None, (tenant or "all tenants", worker)))
        self.request_table.show(self.overview.requests(wanted), self._picture.at)

    def _show_log(self) -> None:
        log = self.query_one("#log", Static)
        lines = [line(each) for each in self._picture.happenings[-max(1, log.size.height) :]]
        log.update(Text("\n").join(lines) if lines else Text("nothing has happened yet", style="dim"))

    def _head(self, picture: Picture) -> Text:
        return head(picture, self.source, self.troubles, stopped=self._stopped, width=self.size.width)

    # Keys

    @property
    def _current(self) -> Table[Any]:
        return self.focused if isinstance(self.focused, Table) else self.tenant_table

    def action_sort(self) -> None:
        """Sort the table by the next column."""
        self._current.next_sort()
        self.draw()

    def action_turn(self) -> None:
        """Turn the order round."""
        table = self._current
        table.turned = not table.turned
        self.draw()

    def action_filter(self) -> None:
        """Ask what rows must have in them."""
        field, table = self.query_one("#filter", Input), self._current
        field.value = table.wanted
        field.border_title = f"Filter {table.spec.title.lower()}"
        field.set_class(True, "open")
        self._filtered = table
        field.focus()

    @on(Input.Changed, "#filter")
    def _filter_as_written(self, event: Input.Changed) -> None:
        if event.input.has_class("open"):
            self._filtered.wanted = event.value
            self.draw()

    @on(Input.Submitted, "#filter")
    def _filter_done(self) -> None:
        self._close_filter()

    def _close_filter(self) -> None:
        self.query_one("#filter", Input).set_class(False, "open")
        self._filtered.focus()

    def action_clear(self) -> None:
        """Show all rows again."""
        field = self.query_one("#filter", Input)
        if field.has_class("open"):
            self._filtered.wanted = ""
            self._close_filter()
        else:
            self._current.wanted = ""
            self._on_worker = ""
        self.draw()

    def action_all(self) -> None:
        """Show requests of all tenants, or of the one under the cursor."""
        self._own_tenant = not self._own_tenant
        self._on_worker = ""
        self.draw()

    def action_upper(self) -> None:
        """Where there is no room for both: workers or classes."""
        self.screen.toggle_class("by-class")
        (self.class_table if self.screen.has_class("by-class") else self.worker_table).focus()

    def action_pause(self) -> None:
        """Stop the picture, or a replay's clock."""
        if isinstance(self.source, Replay):
            self.source.paused = not self.source.paused
            self.draw()
            return
        self._stopped = not self._stopped
        if self._stopped:
            self.query_one("#head", Static).update(self._head(self._picture))
        self.draw()

    def action_jump(self, direction: int) -> None:
        """Go back or on in a replay."""
        if isinstance(self.source, Replay):
            frames = self.source.seek(self.source.now() + direction * JUMP_S)
            self.overview = Overview(self.source.fleet)
            for at, frame in frames:
                self.overview.feed(frame, at)
            self._tick()
            self.draw()

    def action_speed(self, factor: float) -> None:
        """Play a replay faster or slower."""
        if isinstance(self.source, Replay):
            self.source.accelerate(factor)
            self.draw()

    def action_help(self) -> None:
        """Show the keys."""
        self.push_screen(Help())

    @on(Table.Moved)
    def _moved(self, event: Table.Moved) -> None:
        if event.table.id == "tenants" and self._own_tenant:
            self._show_requests()

    @on(Table.Opened)
    def _opened(self, event: Table.Opened) -> None:
        match event.table.row:
            case TenantRow():
                self._own_tenant = True
                self.request_table.focus()
            case WorkerRow(worker=worker):
                self._own_tenant, self._on_worker = False, worker
                self.request_table.focus()
            case RequestRow() as row:
                self.push_screen(Story(lambda: self._story(row)))
        self.draw()

    # A request's story

    async def _story(self, row: RequestRow) -> Text:
        """As its worker tells it; where it cannot be asked, as frames told it."""
        note, told = "", None
        if isinstance(self.source, Live):
            try:
                query = RequestQuery(request=row.status.request)
                [report] = await self.source.client.query(
                    row.worker, "request", query, timeout_s=self.timeout_s
                )
                told = Told(worker=row.worker, report=report)
            except RefusedError as error:
                note = f"{row.worker} says: {error.message}. `cox explain {row.status.request}` reads the event log."
            except (NoAnswerError, ControlError) as error:
                note = str(error)
        else:
            note = "from the recorded frames: what came and went between two of them is missing"
        if told is None:
            told = self._as_frames_told(row)
        text = story([told], self.source.now())
        return Text("\n\n").join((text, Text(printable(note), style="yellow"))) if note else text

    def _as_frames_told(self, row: RequestRow) -> Told:
        key = (row.status.request, row.status.child)
        view = self.overview.fleet.workers.get(row.worker)
        status = (view.request(key) if view else None) or row.status
        child = Child(status=status, story=self.overview.trail(row.worker, key))
        return Told(worker=row.worker, report=RequestReport(request=row.status.request, children=(child,)))

    # Commands

    def action_steer(self, verb: Verb) -> None:
        """Ask, then do it."""
        source, target = self.source, _target(self._current.row)
        if not isinstance(source, Live):
            self.notify("this is a recording: nothing can be steered in it", severity="warning")
        elif target is None:
            self.notify("put the cursor on a tenant, a class or a request", severity="warning")
        else:
            client = source.client

            def answered(answer: tuple[str, Targeted] | None) -> None:
                if answer is not None:
                    wire_verb, command = answer
                    work = send(client, verb, target, command, wire_verb, self.timeout_s)
                    self.run_worker(self._do(work), exit_on_error=False)

            self.push_screen(Question(verb, target), answered)

    async def _do(self, work: Any) -> None:
        happening: Happening = await work
        self.overview.note(happening)
        failed = happening.weight == "warning"
        self.notify(printable(happening.text), severity="error" if failed else "information", markup=False)
        self.draw()


def _target(row: Any) -> Target | None:
    """What a command on a row means; None where it would mean nothing."""
    match row:
        case TenantRow(tenant=tenant):
            return Target(name=f"tenant {tenant}", count=_counts(row), targets=Targets(tenants=(tenant,)))
        case ClassRow(class_=class_):
            return Target(name=f"class {class_}", count=_counts(row), targets=Targets(classes=(class_,)))
        case RequestRow(worker=worker, status=status):
            told = (
                f"tenant {status.tenant}, class {status.class_}, priority {status.priority}, {status.state}"
            )
            return Target(
                name=f"request {status.request}",
                count=told,
                targets=Targets(requests=(status.request,)),
                worker=worker,
            )
    return None


def _counts(row: TenantRow | ClassRow) -> str:
    return f"{row.queued} queued, {row.running} running, {row.held} held; requests that come later are not affected"
