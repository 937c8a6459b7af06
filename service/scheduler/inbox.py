"""What came over the bus for this engine, worked off in order between two steps.

A fault of ours in one command or query must not end everybody's requests: it is logged, and whoever asked is told.
Called by `steered.py` on the engine's thread.
"""

import time
from typing import Final

from coxswain.common.logs import get_logger
from coxswain.schemas.commands import Reply
from coxswain.schemas.errors import Code, RefusedError
from coxswain.service.port import AnswerOut, CommandIn, LeadIn, Port, QueryIn, ReplyOut
from coxswain.service.scheduler.answers import Answer, Answers
from coxswain.service.scheduler.core import SteeringCore
from coxswain.service.scheduler.verbs import Commands

DRAIN_S: Final = 0.005
"""Time for commands and queries before one step; the rest wait for the next, so that a flood cannot stop steps."""

log = get_logger()


class Inbox:
    """Takes what waits on the port, and puts the answers there.

    Args:
        port: to and from the bus.
        core: hears the leader's heartbeats.
        commands: applies commands.
        answers: answers queries.
    """

    def __init__(self, port: Port, core: SteeringCore, commands: Commands, answers: Answers) -> None:
        self._port = port
        self._core = core
        self._commands = commands
        self._answers = answers

    def work(self, now: float) -> None:
        """Apply and answer what waits, in order, for at most `DRAIN_S`."""
        enough = time.monotonic() + DRAIN_S
        while (item := self._port.take()) is not None:
            if isinstance(item, CommandIn):
                self._port.put(ReplyOut(item.token, self._apply(now, item)))
            elif isinstance(item, LeadIn):
                self._core.heard(now, item.lead)
            else:
                self._port.put(AnswerOut(item.token, self._answer(now, item)))
            if time.monotonic() > enough:
                break

    def _apply(self, now: float, item: CommandIn) -> Reply:
        try:
            return self._commands.apply(now, item.role, item.verb, item.command, item.ignored)
        except Exception:
            log.exception("command.failed", verb=item.verb, command=item.command.id, role=item.role)
            return self._commands.failed(now, item.command)

    def _answer(self, now: float, item: QueryIn) -> Answer:
        try:
            return self._answers.answer(now, item)
        except Exception:
            log.exception("query.failed", what=item.what)
            return RefusedError(Code.NOT_POSSIBLE, "this worker failed on it: its log says how")
