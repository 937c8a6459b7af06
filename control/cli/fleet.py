"""`cox ps`: the workers and tenants of a fleet.

Called by `__init__.py`; what it looks like is decided in `view_fleet.py`.
"""

import asyncio
import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live

from coxswain.control.cli import parse, view_fleet
from coxswain.control.cli.app import Cox, option
from coxswain.control.cli.exits import Exit

if TYPE_CHECKING:
    from coxswain.control.client import Client


async def ps(
    cox: Cox,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until Ctrl-C.")] = False,
    every: Annotated[
        float,
        typer.Option(
            metavar="DURATION",
            parser=option(parse.positive_duration_s),
            help="Time between refreshes with --watch.",
        ),
    ] = "1s",  # type: ignore[assignment]
) -> Exit:
    """Show workers and tenants: queues, slots, KV use, leader, virtual time, shares.

    SLOTS is running/active+held; KV (HELD) is the share of KV blocks in use, and of those that held requests
    keep; STEP is the median time between steps; LEADER is its policy and how long ago it was heard; V-TIME is
    virtual time (lower runs first); OUT% is the tenant's part of all output tokens so far (SHARE in `cox top`: of the
    service of the last 30 s).
    """
    async with cox.client() as client:
        if watch:
            await _watch(cox, client, every)
        fleet = await _look(cox, client)
        cox.emit(fleet)
        if fleet.workers:
            cox.say(view_fleet.text(fleet, cox.out.width))
            return Exit.DONE
    cox.warn(
        f"cox: no worker of fleet {fleet.fleet} answered within {cox.timeout_s:g} s: "
        "start one (`cox worker MODEL`) or name another fleet (--fleet)",
    )
    return Exit.NOT_FOUND


async def _look(cox: Cox, client: "Client") -> view_fleet.FleetView:
    frames = await client.statuses(wait_s=cox.timeout_s)
    return view_fleet.view(cox.connection.fleet, frames, time.time())


async def _watch(cox: Cox, client: "Client", every_s: float) -> None:
    """Look for ever; with `--json` one line of JSON per look. Ends by Ctrl-C or a lost connection."""
    if cox.json:
        while True:
            cox.emit_line(await _look(cox, client))
            await asyncio.sleep(every_s)
    # Only a terminal has a screen to redraw; anything else gets one table after another.
    if not cox.out.is_terminal:
        while True:
            cox.say(view_fleet.text(await _look(cox, client), cox.out.width))
            cox.say("")
            await asyncio.sleep(every_s)
    with Live(console=cox.out, screen=True, auto_refresh=False) as live:
        while True:
            fleet = await _look(cox, client)
            live.update(view_fleet.text(fleet, cox.out.width), refresh=True)
            await asyncio.sleep(every_s)
