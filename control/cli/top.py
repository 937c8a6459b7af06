"""`cox top`: a fleet on the screen, live or from a recording. Called by `__init__.py`.

The screen is `control/top/` and needs the extra `top`; recording without a screen and `--json` do not.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coxswain.control.cli import parse
from coxswain.control.cli.app import Cox, option
from coxswain.control.cli.exits import CliError, Exit
from coxswain.control.cli.words import plural
from coxswain.control.view.recording import Recorder, Recording, RecordingError

if TYPE_CHECKING:
    from coxswain.control.top.sources import Source


async def top(
    cox: Cox,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Also write the fleet's status frames to a new file; if output is not a terminal, "
            "only that, until Ctrl-C.",
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="Show a recording; no fleet is needed."),
    ] = None,
    speed: Annotated[
        float,
        typer.Option(metavar="N", parser=option(parse.positive), help="Seconds of the recording per second."),
    ] = "1",  # type: ignore[assignment]
    every: Annotated[
        float,
        typer.Option(
            metavar="DURATION", parser=option(parse.positive_duration_s), help="Time between two refreshes."
        ),
    ] = "500ms",  # type: ignore[assignment]
) -> Exit:
    """Watch a fleet: workers, tenants, classes, requests, events; hold and continue from the keyboard.

    It uses status frames alone, so a recording shows what was seen. `?` explains keys and columns. --json prints a
    snapshot per line.
    """
    if record and replay:
        raise CliError(Exit.USAGE, "give --record or --replay, not both")
    screen = cox.out.is_terminal and not cox.json
    if screen:
        _need_textual()
    elif not cox.json and not record:
        raise CliError(
            Exit.USAGE,
            "output is not a terminal: --json prints snapshots, --record FILE records without a screen",
        )
    try:
        async with _source(cox, record, replay, speed) as (source, troubles):
            if screen:
                await _show(cox, source, troubles, every)
            elif cox.json:
                await _print(cox, source, every)
            else:
                async for _ in source.frames():
                    pass
    except RecordingError as error:
        raise CliError(Exit.USAGE, str(error)) from error
    return Exit.DONE


@asynccontextmanager
async def _source(
    cox: Cox, record: Path | None, replay: Path | None, speed: float
) -> AsyncIterator[tuple["Source", list[str]]]:
    """Where frames come from, and a list that is told of trouble with the connection."""
    from coxswain.control.client import Client
    from coxswain.control.top.sources import Live, Replay

    troubles: list[str] = []
    async with AsyncExitStack() as stack:
        if replay:
            yield Replay(stack.enter_context(Recording(replay)), speed), troubles
            return
        client = await Client.connect(
            cox.connection, name="cox top", timeout_s=cox.timeout_s, notice=troubles.append
        )
        await stack.enter_async_context(client)
        recorder = None
        if record:
            recorder = stack.enter_context(Recorder(record, cox.connection.fleet, time.time()))
        try:
            yield Live(client, recorder), troubles
        finally:
            if recorder is not None:
                cox.warn(f"cox: {plural(recorder.frames, 'frame')} in {recorder.path}")


async def _show(cox: Cox, source: "Source", troubles: list[str], every_s: float) -> None:
    from coxswain.control.top.app import TopApp

    app = TopApp(source, every_s=every_s, timeout_s=cox.timeout_s)
    app.troubles = troubles  # told of by the connection from now on
    await app.run_async()
    if app.failure is not None:
        raise app.failure


async def _print(cox: Cox, source: "Source", every_s: float) -> None:
    """A picture per line, for ever; of a recording, to its end."""
    from coxswain.control.top.sources import Replay
    from coxswain.control.view.overview import Overview

    overview = Overview(source.fleet)

    async def read() -> None:
        async for at, frame in source.frames():
            overview.feed(frame, at)

    reading = asyncio.create_task(read())
    try:
        while not reading.done():
            await asyncio.sleep(every_s)
            overview.tick(source.now())
            cox.emit_line(overview.picture(source.now()))
            if isinstance(source, Replay) and source.ended:
                return
        await reading
    finally:
        reading.cancel()


def _need_textual() -> None:
    try:
        import textual  # noqa: F401
    except ModuleNotFoundError as error:
        raise CliError(
            Exit.USAGE,
            "`cox top` needs textual: pip install '.[top]' in a checkout. `cox ps --watch` works without it.",
        ) from error
