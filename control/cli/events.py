"""`cox events`: what happens in a fleet, as it happens or from the log. Called by `__init__.py`."""

import time
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from coxswain.control.cli import parse, view_events
from coxswain.control.cli.app import Cox, option
from coxswain.control.cli.exits import Exit
from coxswain.schemas.events import Event


async def events(
    cox: Cox,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow/--no-follow", "-f", help="Continue with new events, or stop at the end of the log."
        ),
    ] = True,
    since: Annotated[
        float | None,
        typer.Option(
            metavar="DURATION",
            parser=option(parse.duration_s),
            help="Start this far back in the log: 10m, 1h30m. Without it: new events only, "
            "or the whole log with --no-follow.",
        ),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND", parser=option(parse.kind), help="Only this kind: held, finished, …; repeatable."
        ),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(metavar="TENANT", parser=option(parse.tenant), help="Only events of this tenant."),
    ] = None,
    request: Annotated[
        str | None,
        typer.Option(metavar="REQUEST", parser=option(parse.request), help="Only events of this request."),
    ] = None,
    worker: Annotated[
        str | None,
        typer.Option(metavar="NAME", parser=option(parse.worker_name), help="Only events of this worker."),
    ] = None,
) -> Exit:
    """Show events, one line each; with --json one JSON object per line."""
    start: float | Literal["all"] | None = None if since is None else time.time() - since
    if start is None and not follow:
        start = "all"
    widest = 0
    async with cox.client() as client:
        stream = client.events(start=start, follow=follow, request=request, tenant=tenant, worker=worker)
        try:
            async for event in stream:
                if kind and _field(event, "kind") not in kind:
                    continue
                widest = max(widest, len(str(_field(event, "worker"))))
                cox.emit_line(event)
                _say(cox, *view_events.line(event, worker_width=widest))
        finally:
            await stream.aclose()
    return Exit.DONE


def _say(cox: Cox, facts: Text, request: Text) -> None:
    """One line; on a terminal that is too narrow for it the id goes below, whole, to be copied."""
    whole = Text(" ").join((facts, request)) if request else facts
    if not cox.out.is_terminal or whole.cell_len <= cox.out.width:
        cox.say(whole)
        return
    cox.say(facts, hang=2)
    if request:
        cox.say(Text("  ").append_text(request))


def _field(event: Event | dict[str, Any], name: str) -> Any:
    if isinstance(event, dict):
        return event.get(name)
    return event.__struct_config__.tag if name == "kind" else getattr(event, name)
