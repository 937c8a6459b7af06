"""What every command shares: the global options, where output goes, and how failures end.

Lives here: `Cox` (what a command gets to work with) and `command`, which registers one. Commands are plain or
async functions `(cox, options…) -> Exit | int | None`; the boundary here turns their errors into one or two
lines on stderr and the exit codes of `exits.py`. Knows no command. Called by the command modules.
"""

import asyncio
import inspect
import os
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from coxswain.common.connection import DEFAULT_FLEET, DEFAULT_URL, AddressRefusedError, Connection
from coxswain.control.cli import parse
from coxswain.control.cli.exits import CliError, Exit
from coxswain.control.cli.words import printable
from coxswain.control.errors import (
    ControlError,
    DeniedError,
    JetStreamRefusedError,
    NoAnswerError,
    NotSetUpError,
    PolicyError,
    RowError,
    UnreachableError,
)
from coxswain.schemas.errors import Code, RefusedError
from coxswain.schemas.names import NameRefusedError, check_token

if TYPE_CHECKING:
    from coxswain.control.client import Client

TIMEOUT_S: Final = 2.0
PIPE_WIDTH: Final = 200
"""Cells per line where output goes to a file or pipe: nothing is cut for want of a terminal."""
GLOBAL_PANEL: Final = "Global options"
SHARED: Final = ("nats", "fleet", "timeout", "json")
"""The global options; a command that has no use for one does without it."""

Function = Callable[..., Any]


def option(parser: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parser` as typer wants it: a `ValueError` becomes a usage error with its text."""

    def parse_option(value: Any) -> Any:
        if not isinstance(value, str):  # typer passes defaults through
            return value
        try:
            return parser(value)
        except ValueError as error:
            raise typer.BadParameter(printable(str(error))) from None

    parse_option.__name__ = parser.__name__
    return parse_option


def or_none(help: str, parser: Callable[[str], Any], metavar: str) -> Any:
    """An option that also takes the word `none`: it arrives as `UNSET`, None is not given."""

    def parse_or_none(text: str) -> Any:
        value = parser(text)
        return msgspec.UNSET if value is None else value

    return typer.Option(help=help, parser=option(parse_or_none), metavar=metavar, show_default=False)


def _shared(*, root: bool) -> list[inspect.Parameter]:
    """The global options, for the root (with their environment variables and defaults) or for one command."""

    def parameter(name: str, kind: Any, default: Any, env: str, help: str, **more: Any) -> inspect.Parameter:
        # The root alone reads the environment: a command's own default must not hide what the root was given.
        flag = typer.Option(
            f"--{name}",
            envvar=env if root else None,
            help=help,
            show_default=False,
            rich_help_panel=GLOBAL_PANEL,
            **more,
        )
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind, flag],
        )

    urls = f"NATS servers, comma-separated (default {DEFAULT_URL})."
    wait = f"Wait this long for NATS and for answers: 500ms, 5s (default {TIMEOUT_S:g}s)."
    duration = {"metavar": "DURATION", "parser": option(parse.positive_duration_s)}
    return [
        parameter("nats", str | None, None, "COX_NATS_URL", urls, metavar="URL"),
        parameter(
            "fleet",
            str | None,
            None,
            "COX_FLEET",
            f"Fleet to talk to (default {DEFAULT_FLEET}).",
            metavar="NAME",
        ),
        parameter("timeout", float | None, None, "COX_TIMEOUT", wait, **duration),
        parameter("json", bool, False, "COX_JSON", "Machine-readable output on stdout, nothing else."),
    ]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The global options as given so far; None is not given."""

    nats: str | None = None
    fleet: str | None = None
    timeout: float | None = None
    json: bool = False

    def over(self, outer: "Options") -> "Options":
        """These, and those of `outer` where these say nothing: `cox --json ps` is `cox ps --json`."""
        return Options(
            nats=self.nats or outer.nats,
            fleet=self.fleet or outer.fleet,
            timeout=self.timeout if self.timeout is not None else outer.timeout,
            json=self.json or outer.json,
        )


class Cox:
    """What a command works with: where to connect, how long to wait, and how to answer.

    Raises:
        NameRefusedError: if the fleet's name is not allowed.
        AddressRefusedError: if an address of NATS is none.
    """

    def __init__(self, options: Options) -> None:
        connection = Connection.from_env(
            os.environ if options.fleet is None else {**os.environ, "COX_FLEET": ""}
        )
        if options.nats:
            urls = tuple(url.strip() for url in options.nats.split(",") if url.strip())
            connection = msgspec.structs.replace(connection, urls=urls or connection.urls)
        if options.fleet is not None:
            connection = msgspec.structs.replace(connection, fleet=check_token("fleet", options.fleet))
        self.connection = connection.check()
        self.timeout_s = options.timeout if options.timeout is not None else TIMEOUT_S
        self.json = options.json
        self.out = _console(stderr=False)
        self.err = _console(stderr=True)

    def say(self, text: str | Text, *, hang: int | None = None) -> None:
        """Print for people on stdout; nothing with `--json`.

        A line that is too long is the terminal's to wrap, so that what is copied stays whole. With `hang` it is
        broken between words on a terminal, and what follows is indented by so many cells; an id alone stays whole.
        """
        if self.json:
            return
        text = _plain(text)
        if hang is not None and self.out.is_terminal:
            text = Text("\n").join(self._broken(line, hang) for line in text.split("\n", allow_blank=True))
        self.out.print(text, soft_wrap=True, highlight=False)

    def _broken(self, line: Text, hang: int) -> Text:
        if line.cell_len <= self.out.width or " " not in line.plain.strip():
            return line
        return Text("\n" + " " * hang).join(line.wrap(self.out, max(20, self.out.width - hang)))

    def warn(self, text: str) -> None:
        """Print on stderr, with or without `--json`."""
        self.err.print(_plain(text), soft_wrap=not self.err.is_terminal, highlight=False)

    def emit(self, value: Any) -> None:
        """Print `value` as an indented JSON document on stdout, with `--json` only."""
        if self.json:
            _write(msgspec.json.format(msgspec.json.encode(value), indent=2))

    def emit_line(self, value: Any) -> None:
        """Print `value` as one line of JSON on stdout, with `--json` only."""
        if self.json:
            _write(msgspec.json.encode(value))

    @asynccontextmanager
    async def client(self) -> AsyncIterator["Client"]:
        """A connected client, closed at the end."""
        from coxswain.control.client import Client  # nats-py takes a moment: `cox --help` does without

        async with await Client.connect(self.connection, timeout_s=self.timeout_s) as client:
            yield client
            if client.unreadable:
                self.warn(f"cox: passed over: {printable(client.unreadable[-1])}")


def root(app: typer.Typer) -> None:
    """Give `app` the global options, which its commands inherit."""

    def global_options(context: typer.Context, **values: Any) -> None:
        context.obj = Options(**values)

    app.callback()(_signed(global_options, [], _shared(root=True)))


def command(
    app: typer.Typer,
    name: str,
    *,
    panel: str,
    example: str = "",
    shared: Sequence[str] = SHARED,
    passes_on: bool = False,
) -> Callable[[Function], Function]:
    """Register a function as a command with the global options, an example and the error boundary.

    Args:
        app: where to register.
        name: the word that the user types.
        panel: the heading of `cox --help` that it stands under.
        example: one line, shown under the help.
        shared: which of the global options it has a use for.
        passes_on: arguments, `--help` too, belong to a program that reads them itself; then the global options may
            only stand before the command's name.
    """
    settings = {"ignore_unknown_options": True, "allow_interspersed_args": False} if passes_on else {}

    def register(function: Function) -> Function:
        app.command(
            name,
            epilog=epilogue(example),
            rich_help_panel=panel,
            context_settings=settings,
            add_help_option=not passes_on,
        )(boundary(function, shared=() if passes_on else shared))
        return function

    return register


def epilogue(example: str) -> str:
    """What stands under a command's help."""
    return f"Example: [bold]{escape(example)}[/bold]"


def boundary(function: Function, *, shared: Sequence[str] = SHARED) -> Function:
    """`function` as typer calls it: errors become exits, the global options of `shared` join its own."""

    def called(context: typer.Context, **values: Any) -> None:
        given = {name: values.pop(name) for name in shared}
        options = Options(**given).over(context.obj or Options())
        context.obj = options
        if context.invoked_subcommand is not None:  # a group's default command: the sub-command runs instead
            return
        if code := _guarded(function, options, values):
            raise typer.Exit(code)

    own = [
        each for name, each in inspect.signature(function, eval_str=True).parameters.items() if name != "cox"
    ]
    called.__name__, called.__doc__ = function.__name__, _unwrapped(function.__doc__ or "")
    return _signed(called, own, [each for each in _shared(root=False) if each.name in shared])


def _unwrapped(text: str) -> str:
    """A docstring's paragraphs without its line ends: a terminal has its own width."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n"))


def _signed(function: Function, *groups: list[inspect.Parameter]) -> Function:
    """Make typer see `context` and these parameters, as keywords, whatever `function` is written to take."""
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    keywords = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for group in groups for each in group]
    function.__signature__ = inspect.Signature([context, *keywords])  # type: ignore[attr-defined]
    function.__annotations__ = {}
    return function


def _guarded(function: Function, options: Options, values: dict[str, Any]) -> int:
    """Run a command; its exit code, whatever happens."""
    err = _console(stderr=True)
    try:
        result = function(Cox(options), **values)
        return int((asyncio.run(_await(result)) if inspect.isawaitable(result) else result) or Exit.DONE)
    except KeyboardInterrupt:
        if err.is_terminal:  # which has echoed ^C
            err.print()
        return Exit.INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return Exit.UNREAD  # not DONE: what a command found out, it says before it returns its code
    except Exception as error:  # noqa: BLE001 — the boundary: whatever it is, the user sees a line, not a traceback
        code, message = explain(error)
        if os.environ.get("COX_DEBUG") == "1":
            traceback.print_exc()
        err.print(_plain(f"cox: {message}"), soft_wrap=not err.is_terminal, highlight=False)
        return code


async def _await(result: Awaitable[Any]) -> Any:
    return await result


def explain(error: Exception) -> tuple[Exit, str]:
    """The exit code and the words for an error; of a task group's, for the first in it."""
    match error:
        case ExceptionGroup():
            return explain(error.exceptions[0])
        case CliError():
            return error.code, error.message
        case DeniedError():
            return Exit.REFUSED, str(error)
        case UnreachableError():
            return Exit.UNREACHABLE, str(error)
        case JetStreamRefusedError():
            return Exit.REFUSED, str(error)
        case NoAnswerError() | NotSetUpError():
            return Exit.NOT_FOUND, str(error)
        case RefusedError():
            code = Exit.NOT_FOUND if error.code == Code.NOT_FOUND else Exit.REFUSED
            return code, f"refused ({error.code.value}): {error.message}"
        case RowError() | PolicyError() | NameRefusedError():
            return Exit.USAGE, str(error)
        case AddressRefusedError():
            return Exit.USAGE, f"--nats or COX_NATS_URL: {error}"
        case ControlError():
            return Exit.UNEXPECTED, str(error)
    return Exit.UNEXPECTED, f"unexpected {type(error).__name__}: {error} (COX_DEBUG=1 shows where)"


def _plain(text: str | Text) -> Text:
    """Text with neither markup nor control characters; line ends stay."""
    return Text("\n".join(printable(line) for line in text.split("\n"))) if isinstance(text, str) else text


def _write(line: bytes) -> None:
    sys.stdout.write(line.decode() + "\n")
    sys.stdout.flush()


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(stderr=stderr, width=PIPE_WIDTH)
    console.on_broken_pipe = _broken_pipe  # type: ignore[method-assign]
    return console


def _broken_pipe() -> None:
    raise BrokenPipeError


def _silence_stdout() -> None:
    """`cox events | head`: the reader has gone, so nothing may be flushed at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
