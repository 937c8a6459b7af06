"""`cox requests`: the requests of a fleet, or the story of one.

Called by `__init__.py`; what it looks like is decided in `view_requests.py`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from coxswain.control.cli import parse, view_requests
from coxswain.control.cli.app import Cox, option
from coxswain.control.cli.exits import CliError, Exit
from coxswain.control.cli.view_requests import Listing, Told
from coxswain.control.view.picture import RequestRow
from coxswain.schemas.errors import Code, RefusedError
from coxswain.schemas.names import ALL
from coxswain.schemas.status import MAX_PAGE, Frame, QueueQuery, RequestQuery, RequestStatus

if TYPE_CHECKING:
    from coxswain.control.client import Client

State = Literal["running", "held", "queued"]
Wanted = Callable[[RequestStatus], bool]


async def requests(
    cox: Cox,
    request: Annotated[
        str | None,
        typer.Argument(
            metavar="REQUEST",
            parser=option(parse.request),
            show_default=False,
            help="Show the story of this request.",
        ),
    ] = None,
    worker: Annotated[
        str,
        typer.Option(
            "--worker", metavar="NAME", parser=option(parse.worker_or_all), help="Only those of this worker."
        ),
    ] = ALL,
    tenant: Annotated[
        str | None,
        typer.Option(metavar="TENANT", parser=option(parse.tenant), help="Only those of this tenant."),
    ] = None,
    class_: Annotated[
        str | None,
        typer.Option(
            "--class", metavar="CLASS", parser=option(parse.class_name), help="Only those of this class."
        ),
    ] = None,
    state: Annotated[State | None, typer.Option(help="Only those in this state.")] = None,
    limit: Annotated[
        int, typer.Option(metavar="N", min=1, max=1_000_000, help="At most this many requests.")
    ] = 100,
) -> Exit:
    """List requests, running and held first, then the queue in order; or show the story of one."""

    def wanted(status: RequestStatus) -> bool:
        return (
            (tenant is None or status.tenant == tenant)
            and (class_ is None or status.class_ == class_)
            and (state is None or status.state == state)
        )

    async with cox.client() as client:
        frames = await _frames(cox, client, worker)
        if request is not None:
            return await _tell(cox, client, request, sorted(frames))
        return await _list(cox, client, frames, wanted, limit, queue=state in (None, "queued"))


async def _frames(cox: Cox, client: "Client", worker: str) -> dict[str, Frame]:
    if worker != ALL:
        return {
            frame.worker: frame for frame in await client.query(worker, "status", timeout_s=cox.timeout_s)
        }
    frames = await client.statuses(wait_s=cox.timeout_s)
    if not frames:
        raise CliError(
            Exit.NOT_FOUND,
            f"no worker of fleet {cox.connection.fleet} answered within {cox.timeout_s:g} s: "
            "start one (`cox worker MODEL`) or name another fleet (--fleet)",
        )
    return frames


async def _list(
    cox: Cox,
    client: "Client",
    frames: dict[str, Frame],
    wanted: Wanted,
    limit: int,
    *,
    queue: bool,
) -> Exit:
    found = [
        RequestRow(worker=name, status=status)
        for state in ("running", "held")
        for name, frame in frames.items()
        for status in frame.requests
        if status.state == state and wanted(status)
    ]
    for name in frames if queue else ():
        if len(found) > limit:
            break
        async for status in _queue(cox, client, name):
            if wanted(status):
                found.append(RequestRow(worker=name, status=status))
            if len(found) > limit:  # one more than is shown: then the list is known to be cut
                break
    listing = Listing(
        at=time.time(),
        requests=tuple(found[:limit]),
        queued_total=sum(frame.queued for frame in frames.values()),
        truncated=len(found) > limit,
    )
    cox.emit(listing)
    cox.say(view_requests.text(listing, cox.out.width))
    if footer := view_requests.footer(listing):
        cox.warn(footer)
    return Exit.DONE


async def _queue(cox: Cox, client: "Client", worker: str) -> AsyncIterator[RequestStatus]:
    """One worker's queue in order, page by page, as it is when each page is asked for."""
    after: str | None = None
    while True:
        query = QueueQuery(after=after, limit=MAX_PAGE)
        [page] = await client.query(worker, "queue", query, timeout_s=cox.timeout_s)
        for status in page.requests:
            yield status
        if page.next is None or not page.requests:
            return
        after = page.next


async def _tell(cox: Cox, client: "Client", request: str, workers: list[str]) -> Exit:
    answers = await asyncio.gather(*(_report(cox, client, request, worker) for worker in workers))
    told = [answer for answer in answers if answer is not None]
    if not told:
        raise CliError(
            Exit.NOT_FOUND,
            f"no request {request} on {', '.join(workers)}: "
            "it has finished, or was never there (`cox events --request` reads the log)",
        )
    cox.emit(told)
    cox.say(view_requests.story(told, time.time()), hang=4)
    return Exit.DONE


async def _report(cox: Cox, client: "Client", request: str, worker: str) -> Told | None:
    query = RequestQuery(request=request)
    try:
        [report] = await client.query(worker, "request", query, timeout_s=cox.timeout_s)
    except RefusedError as error:
        if error.code == Code.NOT_FOUND:
            return None
        raise
    return Told(worker=worker, report=report)
