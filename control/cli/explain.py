"""`cox explain`: one request's story, or why a tenant is slow, from the event log.

Called by `__init__.py`; `explain/story.py` and `explain/slow.py` find it out, `view_explain.py` says it.
"""

import re
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer
from ulid import ULID

from coxswain.control.cli import parse, view_explain
from coxswain.control.cli.app import Cox, option
from coxswain.control.cli.exits import CliError, Exit
from coxswain.control.errors import ControlError
from coxswain.control.explain.ahead import Classes
from coxswain.control.explain.slow import Investigator
from coxswain.control.explain.story import AnyEvent, Teller
from coxswain.schemas.names import DEFAULT
from coxswain.schemas.policy import ClassPolicy

if TYPE_CHECKING:
    from coxswain.control.client import Client

TENANT_SINCE_S: Final = 600.0
"""How far back a tenant is looked at, if nothing else is said."""
BEFORE_S: Final = 600.0
"""So much of the log before that is read as well, for whoever waited or was held since then."""
SKEW_S: Final = 30.0
"""Clocks of the edge and of JetStream may be so far apart."""
AFTER_S: Final = 2.0
"""A request's children end about together: so long after the last one ended no more are looked for."""
_ULID: Final = re.compile(r"(?<![0-9A-Z])[0-7][0-9A-HJKMNP-TV-Z]{25}(?![0-9A-Z])")


async def explain(
    cox: Cox,
    request: Annotated[
        str | None,
        typer.Argument(
            metavar="REQUEST",
            parser=option(parse.request),
            show_default=False,
            help="Explain this request; it may have ended long ago.",
        ),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(metavar="TENANT", parser=option(parse.tenant), help="Explain why this tenant is slow."),
    ] = None,
    since: Annotated[
        float | None,
        typer.Option(
            metavar="DURATION",
            parser=option(parse.positive_duration_s),
            help="How far back to read the log. Without it: 10m for a tenant; for a request, from when its id was "
            "created, or the whole log if the id does not tell.",
        ),
    ] = None,
) -> Exit:
    """Explain what happened to a request, or why a tenant is slow, from the event log.

    Lists the requests that were admitted on the same worker while it waited, and the rule that let them go first:
    by classes, virtual times and priorities at that time, and by the class table as it is now.
    """
    if (request is None) == (tenant is None):
        raise CliError(Exit.USAGE, "name either a request or a tenant (--tenant)")
    async with cox.client() as client:
        if request is not None:
            return await _request(cox, client, request, since)
        assert tenant is not None
        return await _tenant(cox, client, tenant, TENANT_SINCE_S if since is None else since)


async def _request(cox: Cox, client: "Client", request: str, since: float | None) -> Exit:
    now = time.time()
    start = made_at(request, now) if since is None else now - since
    teller = Teller(request, await _classes(client))
    async for event in _log(client, "all" if start is None else start, now):
        teller.feed(event)
        ended_at = teller.ended_at()
        if ended_at is not None and not isinstance(event, dict) and event.at > ended_at + AFTER_S:
            break
    told = teller.story(now)
    if not told.children:
        raise CliError(
            Exit.NOT_FOUND,
            f"the log has nothing on request {request}: it was never in this fleet, or its events have expired "
            "(`cox init --max-age` sets how long they are kept)",
        )
    cox.emit(told)
    cox.say(view_explain.story(told, cox.out.width), hang=4)
    return Exit.DONE


async def _tenant(cox: Cox, client: "Client", tenant: str, since_s: float) -> Exit:
    now = time.time()
    investigator = Investigator(
        tenant, now - since_s, await _classes(client), await _caps(cox, client, tenant)
    )
    async for event in _log(client, now - since_s - BEFORE_S, now):
        investigator.feed(event)
    found = investigator.result(now)
    if not found.requests:
        raise CliError(
            Exit.NOT_FOUND,
            f"the log has nothing on tenant {tenant} in that time: look further back (--since)",
        )
    cox.emit(found)
    cox.say(view_explain.slow(found, cox.out.width), hang=4)
    return Exit.DONE


async def _log(client: "Client", start: float | Literal["all"], until: float) -> AsyncIterator[AnyEvent]:
    """The log up to now: a busy fleet writes it faster than anybody could reach its end."""
    stream = client.events(start=start, follow=False)
    try:
        async for event in stream:
            if not isinstance(event, dict) and event.at > until + SKEW_S:
                return
            yield event
    finally:
        await stream.aclose()


async def _classes(client: "Client") -> Classes:
    """The class table, with the class that is always there; nothing where there is none to read."""
    try:
        return {DEFAULT: ClassPolicy(), **(await client.classes.get_all()).good}
    except ControlError:
        return {}


async def _caps(cox: Cox, client: "Client", tenant: str) -> dict[str, int]:
    """The caps on a tenant's running requests, per worker that has one."""
    frames = await client.statuses(wait_s=cox.timeout_s)
    return {
        worker: row.max_running
        for worker, frame in frames.items()
        for row in frame.tenants
        if row.tenant == tenant and row.max_running is not None
    }


def made_at(request: str, now: float) -> float | None:
    """When a request's id was made, a little earlier; None if it does not tell.

    Of several times that of a signed id is the last: its tenant may be called like one.
    """
    times = [ULID.from_str(text).timestamp for text in _ULID.findall(request)]
    past = [at for at in times if at <= now + SKEW_S]
    return past[-1] - SKEW_S if past else None
