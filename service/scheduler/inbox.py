"""What came over the bus for this engine, worked off between two steps: the leader's heartbeat, commands, queries.

A fault of ours in one command or query must not end everybody's requests: it is logged, and whoever asked is told.
Called by `steered.py` on the engine's thread.
"""

from typing import Final

from coxswain.common.logs import get_logger
from coxswain.schemas.commands import Reply
from coxswain.schemas.errors import Code, RefusedError
from coxswain.service.port import AnswerOut, CommandIn, LeadIn, Port, QueryIn, ReplyOut
from coxswain.service.scheduler.answers import Answer, Answers
from coxswain.service.scheduler.core import SteeringCore
from coxswain.service.scheduler.verbs import Commands

DRAIN_S: Final = 0.005
"""Time for commands before one step; the rest wait for the next, so that a flood cannot stop steps."""
ANSWERS_S: Final = 0.001
"""The same for queries; one that takes longer is answered whole."""
ANSWERS_SHARE: Final = 0.1
"""Part of a busy engine's time that answers may take: those that cost more wait, beyond the queue they are refused."""

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
        self._answers_at = 0.0
        """When a busy engine answers again (the port's clock)."""

    def work(self, now: float, *, idle: bool = False) -> None:
        """Apply what waits, in order, and then answer queries, as far as their time goes.

        Args:
            now: Unix s.
            idle: nothing runs that answers could delay.
        """
        clock = self._port.clock
        began = clock()
        while (item := self._port.take()) is not None:
            if isinstance(item, LeadIn):
                self._core.heard(now, item.lead)
            else:
                self._port.put(ReplyOut(item.token, self._apply(now, item)))
            if clock() > began + DRAIN_S:
                break
        self._port.flush()  # now: vLLM's part of the step takes milliseconds
        if idle or began >= self._answers_at:
            self._answer_some(now, DRAIN_S if idle else ANSWERS_S)

    def _answer_some(self, now: float, within_s: float) -> None:
        clock, query = self._port.clock, self._port.take_query()
        if query is None:
            return
        # The bus's end of a flush encodes on this thread: what commands said before, that answers alone are counted.
        self._port.flush(events=True)
        began = clock()
        while query is not None:
            self._port.put(AnswerOut(query.token, self._answer(now, query)))
            if clock() > began + within_s:
                break
            query = self._port.take_query()
        self._port.flush()
        ended = clock()
        self._answers_at = ended + (ended - began) / ANSWERS_SHARE

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
            return RefusedError(Code.NOT_POSSIBLE, "this worker failed to apply it: see its log")
