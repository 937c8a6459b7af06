"""Act 3, priority: in a class with `priority` order, the last waiting request is moved to the front.

Called by `__init__`.
"""

import asyncio
from typing import Final

from rich.table import Table
from rich.text import Text

from coxswain.control.demo.load import BUSY, FLOOD, POLITE, Ask, Sizes, asks
from coxswain.control.demo.processes import DemoError, first_error
from coxswain.control.demo.report import Priority
from coxswain.control.demo.screen import View
from coxswain.control.demo.stack import NIGHT, SLOTS, Scene, new_id
from coxswain.control.demo.streams import Stream
from coxswain.schemas.commands import Prioritize, Targets
from coxswain.schemas.status import RequestQuery

CLASS: Final = "batch"
WAITING: Final = 7
RUNNING_TOKENS: Final = (150, 200)
"""Long enough that nothing is admitted before the queue has been looked at."""
WAITING_SIZES: Final = Sizes((12, 24), (20, 30))
FRONT: Final = -100


async def play(scene: Scene) -> Priority:
    """Run the act.

    Raises:
        DemoError: something failed.
    """
    await scene.cox("classes", "set", CLASS, "--position", "10", "--order", "priority")
    await scene.cox("tenants", "set", NIGHT, "--class", CLASS)
    await scene.config_is(
        lambda config: CLASS in config.classes and NIGHT in config.tenants, f"class {CLASS} is in force"
    )
    waiting: list[Stream] = []
    with first_error():
        async with scene.screen.show(_view(waiting)), asyncio.TaskGroup() as group:
            await _fill_slots(scene, group)
            for ask in _some(NIGHT, WAITING_SIZES, WAITING):
                waiting.append(scene.endpoint.start(group, NIGHT, ask))
                # One after another, so that the order of arrival is that of the list.
                await scene.watch.until(
                    lambda view: view.frame.queued >= len(waiting), "requests wait", timeout_s=20
                )
            chosen = waiting[-1]
            before = await _position(scene, chosen)
            await scene.command(
                "prioritize",
                Prioritize(id=new_id(), targets=Targets(requests=(chosen.request,)), priority=FRONT),
            )
            after = await _position(scene, chosen)
    await scene.idle()
    return Priority(
        waiting_position_before=before,
        waiting_position_after=after,
        finished_before_others=_first(chosen, waiting[:-1]),
    )


async def _fill_slots(scene: Scene, group: asyncio.TaskGroup) -> None:
    for number in range(SLOTS):
        tenant = (FLOOD.tenant, BUSY.tenant, POLITE.tenant)[number % 3]
        (ask,) = _some(f"{tenant}-{number}", Sizes((16, 16), RUNNING_TOKENS), 1)
        scene.endpoint.start(group, tenant, ask)
    await scene.watch.until(lambda view: view.frame.running >= SLOTS, "all places are taken", timeout_s=20)


def _some(name: str, sizes: Sizes, count: int) -> list[Ask]:
    """The first `count` requests of a seeded stock."""
    stock = asks(name, sizes, seed=3)
    return [next(stock) for _ in range(count)]


async def _position(scene: Scene, stream: Stream) -> int:
    """The request's place in the queue, 0 is next.

    Raises:
        DemoError: it does not wait.
    """
    (found,) = await scene.client.query(scene.watch.worker, "request", RequestQuery(request=stream.request))
    position = found.children[0].status.position
    if position is None:
        raise DemoError(f"request {stream.request} does not wait any more: the places were free too early")
    return position


def _first(chosen: Stream, others: list[Stream]) -> bool:
    """Whether `chosen` ended, and before every one of `others`."""
    ends = [stream.ended_at for stream in others]
    return chosen.ended_at is not None and all(end is not None and chosen.ended_at < end for end in ends)


def _view(waiting: list[Stream]) -> View:
    def table() -> Table:
        shown = Table(box=None, padding=(0, 2))
        for heading in ("arrived", "state", "tokens"):
            shown.add_column(heading)
        for number, stream in enumerate(waiting, 1):
            chosen = number == WAITING
            style = "bold green" if chosen else ""
            state = "finished" if stream.ended_at else "running" if stream.tokens else "waiting"
            name = f"{number}{' (moved to the front)' if chosen else ''}"
            shown.add_row(Text(name, style=style), Text(state, style=style), str(stream.tokens))
        return shown

    def line() -> str:
        ended = sorted((each.ended_at, number) for number, each in enumerate(waiting, 1) if each.ended_at)
        order = ", ".join(str(number) for _, number in ended) or "none yet"
        return f"{len(waiting)} requests came to wait; finished so far: {order}"

    return View(table, line)
