"""What `cox top` does to a fleet: one command at a time, and what became of it in a line. Needs no textual.

The commands are those of `cox hold`, `cox continue` and `cox prioritize`, with their envelope and their verdict.
"""

import time
from dataclasses import dataclass
from typing import Final, Literal

from coxswain.control.cli import parse
from coxswain.control.cli.steer import SKEW_S, envelope
from coxswain.control.cli.verdict import judge, skew_s
from coxswain.control.cli.words import span
from coxswain.control.client import Client
from coxswain.control.errors import ControlError
from coxswain.control.view.picture import Happening
from coxswain.schemas import commands
from coxswain.schemas.errors import RefusedError
from coxswain.schemas.names import ALL

Verb = Literal["hold", "continue", "prioritize"]

ASKS: Final[dict[Verb, str]] = {
    "hold": "Lease (30s, 10m; empty: until continued)",
    "continue": "",
    "prioritize": "New priority (lower runs first)",
}
"""What a verb wants to know; nothing of `continue`."""
FIRST: Final[dict[Verb, str]] = {"hold": "5m", "continue": "", "prioritize": "-10"}
"""What stands there until something else is written."""
_DONE: Final[dict[Verb, str]] = {"hold": "held", "continue": "continued", "prioritize": "changed"}


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a command means: its words for people, and for the wire."""

    name: str
    """`tenant acme`."""
    count: str
    """`12 queued, 3 running`: what is known of it now; later arrivals are not affected."""
    targets: commands.Targets
    worker: str = ALL


def build(verb: Verb, target: Target, value: str) -> tuple[str, commands.Targeted]:
    """The wire's verb and the command.

    Args:
        verb: what to do.
        target: to whom.
        value: a lease or a priority, as the user wrote it.

    Raises:
        ValueError: if the value is none, in words.
    """
    shared = {**envelope(), "targets": target.targets}
    match verb:
        case "hold":
            lease_s = parse.lease_s(value.strip()) if value.strip() else None
            return "preempt", commands.Preempt(**shared, lease_s=lease_s)
        case "continue":
            return "continue", commands.Continue(**shared)
        case "prioritize":
            return "prioritize", commands.Prioritize(**shared, priority=parse.priority(value.strip()))


async def send(
    client: Client, verb: Verb, target: Target, command: commands.Targeted, wire_verb: str, timeout_s: float
) -> Happening:
    """Send a command and say what became of it."""
    asked_at = time.time()
    what = f"{verb} {target.name}"
    try:
        replies = await client.command(target.worker, wire_verb, command, timeout_s=timeout_s)
    except (ControlError, RefusedError) as error:
        return Happening(at=time.time(), worker="you", text=f"{what}: {error}", weight="warning")
    answered_at = time.time()
    verdict = judge(_DONE[verb], "request", target.targets, sorted(replies, key=lambda reply: reply.worker))
    skews = [
        f"the clock of {reply.worker} is off by {span(abs(skew))}"
        for reply in replies
        if abs(skew := skew_s(reply.worker_now, asked_at, answered_at)) > SKEW_S
    ]
    words = "; ".join((*verdict.lines, *verdict.problems, *skews))
    return Happening(
        at=answered_at, worker="you", text=f"{what}: {words}", weight="warning" if verdict.code else "news"
    )
