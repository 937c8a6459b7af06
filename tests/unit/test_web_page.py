"""The page's pictures and who gets them, without HTTP."""

import asyncio
import time
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from coxswain.control.cli.parse import address
from coxswain.control.web import board as boards
from coxswain.control.web import page as pages
from coxswain.control.web.board import Board, Message, Standing
from coxswain.control.web.page import FullError, Page
from tests.support.frames import frame, request, row

STANDING = Standing(name="ctl-1", leading=True, reaches_nats=True)


def messages(*frames: Any, at: float = 10.0) -> list[Message]:
    """Frames as they come, each on its worker's subject."""
    return [Message(at, each.worker, msgspec.json.encode(each)) for each in frames]


def drawn(board: Board, *heard: Message, now: float = 10.0) -> Any:
    """The picture as of now, decoded."""
    return msgspec.json.decode(board.draw(heard, STANDING, (), 0, now))


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    """A page that draws twenty times a second."""
    monkeypatch.setattr(pages, "EVERY_S", 0.05)
    monkeypatch.setattr(pages, "DUTY", 1.0)
    return Page("main", lambda: STANDING)


def test_a_picture_has_what_frames_say() -> None:
    """Workers, tenants and their requests, as of the frames so far."""
    board = Board("main")
    first = frame("w1", "01A", 1, row("acme", queued=2), queued=2, requests=(request("r1", "acme"),))
    picture = drawn(board, *messages(first))["picture"]
    assert [each["worker"] for each in picture["workers"]] == ["w1"]
    assert (picture["queued"], picture["tenants"][0]["tenant"]) == (2, "acme")
    listed = msgspec.json.decode(board.requests("tenant", "acme"))
    assert [each["status"]["request"] for each in listed["rows"]] == ["r1"]
    assert msgspec.json.decode(board.requests("worker", "w1"))["total"] == 1
    assert msgspec.json.decode(board.requests("tenant", "nobody")) == {"at": 10.0, "total": 0, "rows": []}


def test_what_is_no_frame_or_claims_to_be_of_another_is_passed_over() -> None:
    """NATS decides who publishes on a worker's subject; a frame that names another worker is not believed."""
    forged = Message(10.0, "w2", msgspec.json.encode(frame("w1")))
    assert drawn(Board("main"), Message(10.0, "w1", b"{"), forged)["picture"]["workers"] == []


def test_tenants_beyond_a_pages_room_are_those_that_want_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, the busy ones are shown, and how many there are in all."""
    monkeypatch.setattr(boards, "MAX_TENANTS", 2)
    rows = [row("a"), row("b", queued=1), row("c"), row("d", running=3)]
    scene = drawn(Board("main"), *messages(frame("w1", "01A", 1, *rows)))
    assert [each["tenant"] for each in scene["picture"]["tenants"]] == ["d", "b"]
    assert scene["tenants_total"] == 4


def test_requests_are_cut_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant's first requests are listed; the total says how many there are."""
    monkeypatch.setattr(boards, "MAX_REQUESTS", 3)
    board = Board("main")
    drawn(board, *messages(frame(requests=tuple(request(f"r{number}", "a") for number in range(9)))))
    listed = msgspec.json.decode(board.requests("tenant", "a"))
    assert (listed["total"], len(listed["rows"])) == (9, 3)


async def test_nothing_is_kept_while_nobody_watches(page: Page) -> None:
    """What comes before the first watcher costs nothing and is not shown."""
    async with page.drawing():
        page.heard("w1", msgspec.json.encode(frame("w1")))
        assert page._messages == []
        async with aclosing(page.follow()) as pictures:
            assert msgspec.json.decode(await anext(pictures))["picture"]["workers"] == []


async def test_one_picture_serves_all_and_who_is_slow_gets_the_latest(page: Page) -> None:
    """Watchers share the very same bytes; nothing waits in line for one that does not take them."""
    async with page.drawing():
        async with aclosing(page.follow()) as slow, aclosing(page.follow()) as quick:
            await anext(slow)
            for seq in range(1, 6):
                page.heard("w1", msgspec.json.encode(frame("w1", "01A", seq, queued=seq)))
                latest = await anext(quick)
            while msgspec.json.decode(latest)["picture"]["queued"] != 5:
                latest = await anext(quick)
            late = await anext(slow)
            assert msgspec.json.decode(late)["picture"]["queued"] == 5
            assert late is page._latest
        assert page.watchers == 0


async def test_who_comes_when_all_places_are_taken_is_told(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watchers are bounded, and a place that is given up can be taken."""
    monkeypatch.setattr(pages, "MAX_WATCHERS", 1)
    async with page.drawing():
        async with aclosing(page.follow()) as first:
            await anext(first)
            with pytest.raises(FullError, match="1 watch already"):
                await anext(page.follow())
        async with aclosing(page.follow()) as second:
            await anext(second)


async def test_a_flood_between_two_pictures_is_bounded_and_counted(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is beyond is not kept; the picture says how much was passed over."""
    monkeypatch.setattr(pages, "MAX_MESSAGES", 10)
    async with page.drawing(), aclosing(page.follow()) as pictures:
        await anext(pictures)
        for _ in range(25):
            page.heard("w1", b"{}")
        assert len(page._messages) == 10
        while (missed := msgspec.json.decode(await anext(pictures))["missed_total"]) == 0:
            pass
        assert missed == 15


async def test_the_board_is_let_go_after_the_last_watcher_and_not_at_a_reload(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a while after they left, who comes back finds what was; then it costs nothing again."""
    monkeypatch.setattr(pages, "LINGER_S", 60.0)
    async with page.drawing():
        async with aclosing(page.follow()) as pictures:
            await anext(pictures)
            page.heard("w1", msgspec.json.encode(frame("w1")))
        async with aclosing(page.follow()) as again:
            while not msgspec.json.decode(await anext(again))["picture"]["workers"]:
                pass
            monkeypatch.setattr(pages, "LINGER_S", 0.1)
        deadline = time.monotonic() + 20
        while page._board is not None:
            assert time.monotonic() < deadline, "still drawing for nobody"
            await asyncio.sleep(0.05)
        assert await page.requests("tenant", "a") is None


async def test_drawing_does_not_hold_up_the_loop(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a picture takes, the controller's loop goes on: another thread makes it."""

    def slow(*_: object) -> bytes:
        time.sleep(0.5)
        return b"{}"

    monkeypatch.setattr(Board, "draw", slow)
    async with page.drawing(), aclosing(page.follow()) as pictures:
        task = asyncio.ensure_future(anext(pictures))
        turns = 0
        while not task.done():
            await asyncio.sleep(0.01)
            turns += 1
        assert turns > 0
        await task


async def test_a_picture_that_cannot_be_made_is_logged_and_the_next_one_comes(
    page: Page, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault in drawing, by whatever frame, does not leave every page standing still for ever."""
    draw, faults = Board.draw, iter([True])

    def faulty(board: Board, *arguments: Any) -> bytes:
        if next(faults, False):
            raise ZeroDivisionError("of a test")
        return draw(board, *arguments)

    monkeypatch.setattr(Board, "draw", faulty)
    async with page.drawing(), aclosing(page.follow()) as pictures:
        first = await asyncio.wait_for(anext(pictures), 10)
    assert msgspec.json.decode(first)["controller"]["name"] == "ctl-1"
    assert "page.failed" in "".join(capsys.readouterr())


async def test_commands_are_counted_by_worker_and_verb(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """The latest outcome of each, and how many there were; the one told longest ago gives way."""
    monkeypatch.setattr(pages, "MAX_SENT", 2)
    page.told("w1", "rank", ok=True, code=None, reason="")
    page.told("w1", "rank", ok=False, code=409, reason="stale epoch")
    page.told("w2", "rank", ok=True, code=None, reason="")
    async with page.drawing(), aclosing(page.follow()) as pictures:
        sent = msgspec.json.decode(await anext(pictures))["sent"]
        facts = [(each["worker"], each["sent_total"], each["refused_total"], each["code"]) for each in sent]
        assert facts == [("w1", 2, 1, 409), ("w2", 1, 0, None)]
    page.told("w3", "rank", ok=True, code=None, reason="")
    assert [worker for worker, _ in page._sent] == ["w2", "w3"]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("8080", ("127.0.0.1", 8080)),
        (":8080", ("127.0.0.1", 8080)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::1]:80", ("::1", 80)),
        ("cox.example:0", ("cox.example", 0)),
    ],
)
def test_where_to_listen_is_this_machine_unless_said(text: str, meant: tuple[str, int]) -> None:
    """No host means loopback."""
    assert address(text) == meant


@pytest.mark.parametrize("text", ["", "host", "host:", "host:port", "1:70000", "::1:80", "1:-1", "1:²"])
def test_what_is_no_address_is_refused(text: str) -> None:
    """With words, before anything is started."""
    with pytest.raises(ValueError, match=r"HOST:|brackets"):
        address(text)
