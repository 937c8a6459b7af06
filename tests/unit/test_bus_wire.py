"""What crosses between the engine and its bus arrives as it was, however the bytes are cut."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coxswain.schemas.commands import COMMANDS, decode, encode
from coxswain.schemas.errors import Code, RefusedError
from coxswain.schemas.events import KINDS, Event
from coxswain.schemas.policy import Lead
from coxswain.schemas.status import QueueQuery, RequestQuery
from coxswain.service.bus import wire
from coxswain.service.bus.board import Board
from coxswain.service.port import AnswerOut, CommandIn, EventOut, FrameOut, LeadIn, QueryIn
from tests.support import structs
from tests.support.engine import draft, frame

ENVELOPE = Event.__struct_fields__


def across_up(item: Any) -> Any:
    """An item of the engine as it arrives at the bus."""
    (body,) = wire.unpack(bytearray(wire.pack_up(7, [wire.up(item)])))
    batch = wire.read_batch(body)
    assert batch.step == 7
    return wire.from_up(batch.messages[0])


def across_down(item: Any) -> Any:
    """An item of the bus as it arrives at the engine."""
    (body,) = wire.unpack(bytearray(wire.pack_down(wire.down(item))))
    return wire.from_down(wire.read_down(body))


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_command_arrives_as_it_was(verb: str) -> None:
    """Also where an absent field means something else than null."""

    @settings(max_examples=30, deadline=None)
    @given(structs.of(COMMANDS[verb]))
    def check(command: Any) -> None:
        item = CommandIn("operator", verb, command, ("typo",), "_INBOX.x")
        assert across_down(item) == item

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_every_event_says_the_same(kind: str) -> None:
    """What is written into the log is, byte for byte, what the engine would have written."""

    @settings(max_examples=30, deadline=None)
    @given(structs.of(KINDS[kind]))
    def check(event: Any) -> None:
        envelope = {
            "id",
            "worker",
            "incarnation",
            "seq",
            "at",
            "step",
            "request",
            "child",
            "tenant",
            "class_",
            "priority",
        }
        fields = {name: getattr(event, name) for name in event.__struct_fields__ if name not in envelope}
        item = EventOut(kind, 3, event.at, event.step, ("r", 0, "acme", "batch", -1), fields)
        assert encode(across_up(item).event("w", "i")) == encode(item.event("w", "i"))

    check()


@given(st.lists(structs.of(Lead), min_size=1, max_size=5), st.integers(1, 9))
def test_messages_survive_any_cut(leads: list[Lead], size: int) -> None:
    """A message is taken when its last byte is there, whatever the socket makes of it."""
    data = b"".join(wire.pack_down(wire.down(LeadIn(lead))) for lead in leads)
    buffer, bodies = bytearray(), []
    for at in range(0, len(data), size):
        buffer += data[at : at + size]
        bodies += wire.unpack(buffer)
    assert [wire.from_down(wire.read_down(body)) for body in bodies] == [LeadIn(lead) for lead in leads]
    assert not buffer


def test_no_message_comes_twice() -> None:
    """Whoever takes messages may be interrupted (Ctrl-C on the engine's thread)."""
    messages = [
        LeadIn(Lead(epoch=(1.0, revision), controller="c", policy="vtc", at=1.0)) for revision in range(3)
    ]
    buffer = bytearray(b"".join(wire.pack_down(wire.down(message)) for message in messages))
    bodies: list[bytes] = []

    def take() -> None:
        for body in wire.unpack(buffer):
            bodies.append(body)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take()
    bodies += wire.unpack(buffer)
    assert [wire.from_down(wire.read_down(each)) for each in bodies] == messages


def test_frames_answers_and_queries() -> None:
    """A frame keeps its rows and the numbers beside them; an answer is the JSON that it would have been."""
    told = draft(frame(requests=2, tenants=3), 7)
    arrived = across_up(FrameOut(told, True))
    assert arrived.idle
    boards = Board(1.0), Board(1.0), Board(1.0)
    for board, each in zip(
        boards, (told, arrived.draft, across_up(AnswerOut("t", told)).answer), strict=True
    ):
        assert board.take(each)
    assert boards[0].full() == boards[1].full() == boards[2].full()
    assert (len(boards[0].full().requests), len(boards[0].full().tenants)) == (2, 3)
    refusal = across_up(AnswerOut("t", RefusedError(Code.NOT_FOUND, "no"))).answer
    assert (refusal.code, refusal.message) == (Code.NOT_FOUND, "no")
    for query in (None, QueueQuery(after="4", limit=2), RequestQuery(request="r")):
        assert across_down(QueryIn("queue", query, "t")) == QueryIn("queue", query, "t")


def test_number_that_no_machine_counts_to() -> None:
    """An integer beyond 64 bits, which JSON allows, crosses like any other."""
    command, _ = decode("abort", b'{"id": "c", "targets": {"all": true}, "epoch": [%d, 1]}' % 10**30)
    item = CommandIn("controller", "abort", command, (), "")
    assert across_down(item) == item
