"""What waits for the engine: who goes first, what a full queue keeps out, and what answers may cost a busy engine."""

from typing import Any

import pytest

from coxswain.schemas.commands import Abort, Reply, Targets
from coxswain.schemas.errors import Code, RefusedError
from coxswain.schemas.policy import Epoch, Lead
from coxswain.service.port import (
    MAX_COMMANDS,
    MAX_QUERIES,
    AnswerOut,
    CommandIn,
    LeadIn,
    Port,
    QueryIn,
    ReplyOut,
)
from coxswain.service.scheduler.inbox import ANSWERS_SHARE, DRAIN_S, Inbox
from coxswain.service.scheduler.verbs import Commands
from tests.support.fake_engine import FakeEngine

COST_S = 0.004
"""What an answer takes here."""


def lead(revision: int, policy: str = "vtc") -> LeadIn:
    """A heartbeat of the leader with this revision."""
    epoch: Epoch = (100.0, revision)
    return LeadIn(Lead(epoch=epoch, controller=f"c{revision}", policy=policy, at=0.0))


def command(number: int) -> CommandIn:
    """A command that finds nothing."""
    return CommandIn("operator", "abort", Abort(id=f"c{number}", targets=Targets(all=True)), (), f"c{number}")


def query(number: int) -> QueryIn:
    """A question."""
    return QueryIn("status", None, f"q{number}")


class Desk:
    """An inbox on a port with a clock that only work on it moves.

    Args:
        command_s: what applying a command takes.
        reply_s: what sending its reply takes, on the engine's thread as where the bus is a process of its own.
    """

    def __init__(self, *, command_s: float = 0.0, reply_s: float = 0.0) -> None:
        self.now = 0.0
        self._command_s = command_s
        self._reply_s = reply_s
        self._sent: list[Any] = []
        self.port = Port()
        self.port.clock = lambda: self.now
        self.core = FakeEngine(slots=1).core
        self.port.attach_bus(self._send)
        self._commands = Commands(self.core, "w1", "01INC")
        self._inbox = Inbox(self.port, self.core, self, self)  # type: ignore[arg-type]

    def _send(self) -> None:
        items = self.port.collect()
        self.now += self._reply_s * sum(isinstance(item, ReplyOut) for item in items)
        self._sent += items

    def apply(self, *item: Any) -> Reply:
        """Stand in front of `Commands`: it takes its time."""
        self.now += self._command_s
        return self._commands.apply(*item)

    def answer(self, now: float, item: QueryIn) -> RefusedError:
        """Stand in for `Answers`: the answer does not matter, its price does."""
        del now, item
        self.now += COST_S
        return RefusedError(Code.NOT_FOUND, "")

    def work(self, *, idle: bool = False) -> list[Any]:
        """What one turn says."""
        self._inbox.work(self.now, idle=idle)
        said, self._sent = self._sent + self.port.collect(), []
        return said


def test_a_full_queue_keeps_no_heartbeat_out() -> None:
    """Who asks or commands too much is refused, each for himself; the leader is heard, and heard first."""
    desk = Desk()
    assert all(desk.port.offer(command(number)) for number in range(MAX_COMMANDS))
    assert all(desk.port.offer(query(number)) for number in range(MAX_QUERIES))
    assert not desk.port.offer(command(-1))
    assert not desk.port.offer(query(-1))
    assert desk.port.offer(lead(1))
    assert desk.port.pending() == MAX_COMMANDS + MAX_QUERIES + 1
    assert desk.port.take() == lead(1)
    assert desk.port.take() == command(0)
    assert desk.port.offer(command(-1))
    assert not desk.port.offer(query(-1))


def test_only_the_newest_heartbeat_of_the_newest_leader_waits() -> None:
    """One that lost its lease and does not know it cannot silence its successor; each is heard once."""
    port = Port()
    for beat in (lead(2), lead(2, "edf"), lead(1)):
        assert port.offer(beat)
    assert (port.pending(), port.take(), port.pending(), port.take()) == (1, lead(2, "edf"), 0, None)
    port.offer(lead(2, "edf"))
    assert port.take() == lead(2, "edf")


def test_every_heartbeat_wakes_a_sleeping_engine() -> None:
    """An engine that rests must hear that its holds' leader lives."""
    port, woken = Port(), []
    port.attach_engine(lambda: woken.append(True))
    port.offer(lead(1))
    assert woken == [True]


def test_a_reply_does_not_wait_for_the_step() -> None:
    """It is on its way when the inbox is done: vLLM's part of the step takes milliseconds."""
    desk = Desk()
    desk.port.offer(command(1))
    desk._inbox.work(0.0)
    assert [item.token for item in desk._sent] == ["c1"]
    assert not desk.port.outbound


def test_commands_go_before_queries() -> None:
    """Whoever only looks delays nobody who steers, whichever came first."""
    desk = Desk()
    desk.port.offer(query(1))
    desk.port.offer(command(1))
    desk.port.offer(lead(3))
    said = desk.work()
    assert [(type(item), item.token) for item in said] == [(ReplyOut, "c1"), (AnswerOut, "q1")]
    assert desk.core.epoch == (100.0, 3)


def test_a_query_waits_for_the_commands_before_it() -> None:
    """Where commands take all the time of a step, those that are left are not overtaken by who asks what they did."""
    desk = Desk(command_s=2 * DRAIN_S)
    desk.port.offer(command(1))
    desk.port.offer(command(2))
    desk.port.offer(query(1))
    desk.port.offer(command(3))
    assert [[item.token for item in desk.work()] for _ in range(3)] == [["c1"], ["c2", "q1"], ["c3"]]


def test_a_query_waits_for_a_command_that_comes_while_the_engine_turns_to_queries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bus's thread may offer both after the engine has seen that no command waits."""
    desk = Desk()
    take_query = desk.port.take_query
    late: list[CommandIn | QueryIn] = [command(1), query(1)]

    def between() -> QueryIn | None:
        while late:
            desk.port.offer(late.pop(0))
        return take_query()

    monkeypatch.setattr(desk.port, "take_query", between)
    assert [[item.token for item in desk.work()] for _ in range(2)] == [[], ["c1", "q1"]]


def test_a_refused_command_keeps_no_query_waiting() -> None:
    """What was not queued is not waited for."""
    desk = Desk()
    assert all(desk.port.offer(command(number)) for number in range(MAX_COMMANDS))
    assert not desk.port.offer(command(-1))
    desk.port.offer(query(1))
    while desk.port.take() is not None:
        pass
    assert desk.port.take_query() == query(1)


def test_what_commands_say_is_not_charged_to_answers() -> None:
    """Their replies cost to send as well; the pause after answers goes by the answers alone."""
    desk = Desk(reply_s=0.5)
    desk.port.offer(command(1))
    assert [item.token for item in desk.work()] == ["c1"]
    desk.port.offer(command(2))
    desk.port.offer(query(1))
    assert [item.token for item in desk.work()] == ["c2", "q1"]
    desk.now += 2 * COST_S / ANSWERS_SHARE
    desk.port.offer(query(2))
    assert [item.token for item in desk.work()] == ["q2"]


def test_answers_take_no_more_than_their_share_of_a_busy_engine() -> None:
    """However many ask, for a second of steps; what finds no time waits and is then refused, commands are not."""
    desk, answered, steps = Desk(), 0, 0
    while desk.now < 1.0:
        while desk.port.offer(query(0)):
            pass
        desk.port.offer(command(steps))
        said = desk.work()
        assert isinstance(said[0], ReplyOut)
        answered += len(said) - 1
        steps += 1
        desk.now += 0.001
    assert answered * COST_S == pytest.approx(ANSWERS_SHARE / (1 + ANSWERS_SHARE), abs=0.01)


def test_a_sleeping_engine_answers_all_at_once() -> None:
    """Its time is nobody's: one question after the other, without a pause."""
    desk = Desk()
    for number in range(6):
        desk.port.offer(query(number))
    assert [len(desk.work(idle=True)) for _ in range(4)] == [2, 2, 2, 0]
