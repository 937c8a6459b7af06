"""The board: of what the engine told, what a frame says again and what it leaves out."""

from typing import Any

import pytest
from msgspec.structs import replace

from coxswain.schemas.status import ClassStatus, Frame, RequestStatus
from coxswain.service.bus.board import Board
from coxswain.service.port import Draft
from tests.support.frames import frame, request, row


class Engine:
    """What an engine tells a board, a draft at a time."""

    def __init__(self, *, requests: bool = True) -> None:
        self.board = Board(1.0, requests=requests)
        self._number = 0

    def tell(self, *classes: ClassStatus, **told: Any) -> None:
        """The next draft, as of so many seconds."""
        self._number += 1
        said = frame(full=False, sent_at=float(self._number), classes=classes)
        assert self.board.take(Draft(self._number, self._number == 1, complete=True, frame=said, **told))

    def delta(self) -> Frame:
        """What is said of it."""
        said = self.board.delta()
        assert said is not None
        return said


def waiting(name: str, tokens: int = 0) -> RequestStatus:
    """A row as it is told: without a position."""
    return request(name, state="queued", output_tokens=tokens)


def chat(oldest_queued_s: float, queued: int = 1) -> ClassStatus:
    """A class in which something waits."""
    return ClassStatus(class_="chat", queued=queued, running=0, held=0, oldest_queued_s=oldest_queued_s)


def test_tokens_that_arrive_for_who_waits_at_the_head_are_said() -> None:
    """Preempted with a step in flight, it stays where it is, and its output grows: nothing else of its row changes."""
    engine = Engine()
    engine.tell(
        requests=[(1, waiting("r1", 3), False)], head=[1], tokens=[3], tenants=[(row("a"), None, 3, 2.0)]
    )
    engine.board.full()
    engine.tell(head=[1], tokens=[5])
    (said,) = engine.delta().requests
    assert (said.request, said.position, said.output_tokens) == ("r1", 0, 5)
    engine.tell(head=[1], tokens=[5])
    assert engine.delta().requests == ()


@pytest.mark.parametrize("shows", [True, False])
def test_a_board_without_rows_of_requests_says_of_none_that_it_is_gone(shows: bool) -> None:
    """Who was never told of a request need not be told of its end; who was, must be."""
    engine = Engine(requests=shows)
    told = {"requests": [(1, request("r1"), True)], "tokens": [3], "tenants": [(row("a"), None, 0, 2.0)]}
    engine.tell(**told)
    assert [each.request for each in engine.board.full().requests] == ["r1"] * shows
    engine.tell(gone=[(1, 9)])
    said = engine.delta()
    assert [(each.request, each.output_tokens) for each in said.gone] == [("r1", 9)] * shows
    assert said.requests == ()


def test_who_was_served_and_no_more_comes_last_and_is_told_in_short() -> None:
    """Tokens and charges alone are told in short; a row of which more is other is not, whatever is told after it."""
    engine = Engine()
    rows = {name: row(name, charged=1.0) for name in "abc"}
    request_of_a = (1, request("r1", "a"), True)
    engine.tell(requests=[request_of_a], tokens=[0], tenants=[(each, None, 0, 2.0) for each in rows.values()])
    engine.board.full()
    engine.tell(tokens=[3], charges=[("b", 0.0, 9.0, 4, 4, 2.0)])
    engine.tell(tokens=[3], tenants=[(replace(rows["c"], lift=5.0), None, 0, 2.0)])
    engine.tell(tokens=[3], charges=[("c", 0.0, 2.0, 0, 0, 2.0)])
    said = engine.delta()
    assert said.charged == {"a": 7.0, "b": 9.0}
    assert [each.tenant for each in said.tenants] == ["c", *said.charged]
    engine.tell(tokens=[3], charges=[("c", 0.0, 3.0, 0, 0, 2.0)])
    assert engine.delta().charged == {"c": 3.0}
    engine.tell(tokens=[4])
    assert engine.board.full().charged == {}


def test_a_new_base_is_told_once_and_not_of_a_row_that_is_told_whole() -> None:
    """It is of the delta after it alone, and of none after a full frame, which had it."""
    engine = Engine()
    engine.tell(tenants=[(row(name), None, 0, 2.0) for name in "ab"])
    engine.board.full()
    engine.tell(charges=[(name, 5.0, 1.0, 0, 0, 2.0) for name in "ab"])
    engine.tell(tenants=[(row("b", base=5.0, charged=1.0, lift=1.0), None, 0, 2.0)])
    said = engine.delta()
    assert (said.charged, said.bases) == ({"a": 1.0}, {"a": 5.0})
    assert [(each.tenant, each.base, each.virtual_time) for each in said.tenants] == [
        ("b", 5.0, 7.0),
        ("a", 5.0, 6.0),
    ]
    engine.tell(charges=[("a", 5.0, 2.0, 0, 0, 2.0)])
    said = engine.delta()
    assert (said.charged, said.bases) == ({"a": 2.0}, {})
    engine.tell(charges=[("a", 6.0, 2.0, 0, 0, 2.0)])
    assert engine.board.full().bases == {}
    engine.tell(charges=[("a", 6.0, 3.0, 0, 0, 2.0)])
    assert engine.delta().bases == {}


@pytest.mark.parametrize("full", [False, True], ids=["after a delta", "after a full frame"])
def test_a_class_of_which_only_the_age_grew_is_no_news(full: bool) -> None:
    """Twenty times a second it would be said of every class in which anything waits."""
    engine = Engine()
    engine.tell(chat(0.0))
    engine.board.full()
    engine.tell(chat(1.0, queued=2))
    said = engine.board.full() if full else engine.delta()
    assert said.classes == (chat(1.0, queued=2),)
    engine.tell(chat(2.0, queued=2))
    assert engine.delta().classes == ()
    engine.tell(chat(3.0, queued=3))
    assert engine.delta().classes == (chat(3.0, queued=3),)
