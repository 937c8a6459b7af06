"""The screen of `cox top`, as a terminal of a given size shows it, and what its keys do."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from textual.pilot import Pilot
from textual.widgets import Input

from coxswain.control.cli.grid import Cell
from coxswain.control.top.app import TopApp
from coxswain.control.top.columns import REQUESTS, TENANTS, gauge
from coxswain.control.top.sources import Live, Replay, Timed
from coxswain.control.view.overview import Overview
from coxswain.control.view.picture import RequestRow
from coxswain.control.view.recording import Recorder, Recording
from coxswain.schemas import commands as c
from coxswain.schemas.errors import Code, RefusedError
from coxswain.schemas.status import ClassStatus, Frame, KvBlocks, Leader, RequestReport, Slots
from coxswain.schemas.subjects import Subjects
from tests.support.frames import frame, request, row

NOW = 1_700_000_000.0
HOSTILE = "zz[red]a[/] \x1b[31m"


def fleet(seq: int = 1, cost: float = 0.0) -> list[Frame]:
    """Two workers: acme runs and waits, globex is held, a stranger has a name like markup."""
    held = request("h1", "globex", state="held", kv="kept", held_by=("operator",), arrived_at=NOW - 60)
    requests = (
        *(request(f"r{n}", "acme", arrived_at=NOW - 5, output_tokens=seq) for n in range(3)), held,
        request("q0", "acme", state="queued", position=0, arrived_at=NOW - 2),
        request("x0", HOSTILE, state="queued", position=1, arrived_at=NOW - 1),
    )  # fmt: skip
    rows = (
        row("acme", weight=2.0, charged=cost, queued=1, running=3, oldest_queued_s=2.0),
        row("globex", charged=cost / 2, held=1), row(HOSTILE, queued=1, oldest_queued_s=1.0),
    )  # fmt: skip
    classes = (
        ClassStatus(class_="default", queued=2, running=3, held=1, oldest_queued_s=2.0, max_running=9),
    )
    first = frame(
        "w1", "01A", seq, *rows, requests=requests, classes=classes, queued=2, running=3, held=1, step_s=0.02,
        slots=Slots(active=8, total=10, running=3, held=1), kv_blocks=KvBlocks(total=100, used=40, held=10),
        leader=Leader(epoch=(1.0, 7), age_s=0.2, policy="vtc"), model="org/Llama-3.1-8B", config=str(seq),
    )  # fmt: skip
    return [first, frame("w2", "01A", seq, slots=Slots(active=8, total=10, running=0, held=0))]


class FakeClient:
    """Answers as a worker would; remembers what it was sent."""

    subjects = Subjects("main")

    def __init__(self, *, refuse: bool = False) -> None:
        self.sent: list[tuple[str, str, Any]] = []
        self.refuse = refuse

    async def command(self, worker: str, verb: str, command: Any, *, timeout_s: float) -> list[c.Reply]:
        """One reply."""
        assert timeout_s > 0
        self.sent.append((worker, verb, command))
        plain = {
            "id": command.id,
            "worker": "w1",
            "incarnation": "01A",
            "worker_now": command.expires_at - 30.0,
            "step": 5,
        }
        if self.refuse:
            return [c.Reply(**plain, outcome="rejected", code=403, error="not you")]
        return [c.Reply(**plain, outcome="applied", counts={"applied": 2})]

    async def query(self, *_: Any, **__: Any) -> list[RequestReport]:
        """It has ended."""
        raise RefusedError(Code.NOT_FOUND, "no such request")


class Given(Live):
    """A live fleet whose frames a test gives."""

    def __init__(self, *frames: Frame, **more: Any) -> None:
        self.client: Any = FakeClient(**more)
        self.recorder = None
        self.fleet = "main"
        self.clock = NOW
        self._frames = frames

    def now(self) -> float:
        """The test's clock."""
        return self.clock

    async def frames(self) -> AsyncIterator[Timed]:
        """All at once."""
        for each in self._frames:
            yield self.clock, each
        await asyncio.Event().wait()


def text(app: TopApp) -> str:
    """What the terminal shows."""
    return "\n".join(strip.text.rstrip() for strip in app.screen._compositor.render_strips())


async def shown(pilot: Pilot[None], app: TopApp, words: str) -> str:
    """The screen, once the words are on it."""
    for _ in range(100):
        app.draw()
        await pilot.pause()
        if words in text(app):
            return text(app)
    raise AssertionError(f"{words!r} never came:\n{text(app)}")


@pytest.mark.parametrize(("size", "wide"), [((80, 24), False), ((200, 60), True)])
async def test_a_fleet_fits_the_terminal(size: tuple[int, int], wide: bool) -> None:
    """At 80×24 every table is there with its numbers; at 200×60 classes, ids and the rest are beside them."""
    app = TopApp(Given(*fleet()))
    async with app.run_test(size=size) as pilot:
        await shown(pilot, app, "globex")
        screen = await shown(pilot, app, "w1: joined")
    assert all(cell_len(line) <= size[0] for line in screen.split("\n"))
    for words in (
        "2 queued  3 running  1 held", "vtc #7", "w1      serving", "w2      serving", "3/8+1", "40% (10%)", "20ms",
        "Tenants 3 · share ↓", "globex", "Requests of acme 4", "queued #0", "What happened", "w1: joined", "h Hold",
    ):  # fmt: skip
        assert words in screen, screen
    for words in ("Classes 1", "9/-", "MODEL", "RECOMPUTED", "FINISHED"):
        assert (words in screen) == wide, words


async def test_names_of_strangers_are_neither_markup_nor_control_characters() -> None:
    """A tenant that is called like markup is shown as it is called, in tables, titles and questions."""
    app = TopApp(Given(*fleet()))
    async with app.run_test(size=(120, 30)) as pilot:
        await shown(pilot, app, r"zz[red]a[/] \x1b[31m")
        await pilot.press("s", "G")
        assert app.tenant_table.key == HOSTILE
        assert r"Requests of zz[red]a[/] \x1b[31m 1" in await shown(pilot, app, "Requests of zz")
        await pilot.press("h")
        assert r"Hold tenant zz[red]a[/] \x1b[31m on all workers?" in text(app)


async def test_the_cursor_stays_on_its_row_when_the_order_changes() -> None:
    """Whoever is about to press a key must not meet another tenant under it."""
    app = TopApp(Given(*fleet()))
    async with app.run_test(size=(80, 24)) as pilot:
        await shown(pilot, app, "globex")
        await pilot.press("down")
        assert app.tenant_table.key == "globex"
        await pilot.press("s")  # by name
        assert app.tenant_table.key == "globex"
        await pilot.press("S")
        assert "name ↓" in text(app)
        assert app.tenant_table.key == "globex"
        assert "Requests of globex 1" in await shown(pilot, app, "held kept by operator")


async def test_a_filter_keeps_the_rows_that_have_its_words() -> None:
    """As it is written; Escape shows all again."""
    app = TopApp(Given(*fleet()))
    async with app.run_test(size=(80, 24)) as pilot:
        await shown(pilot, app, "globex")
        await pilot.press("slash", *"glo")
        screen = await shown(pilot, app, "Tenants 1 of 3")
        assert "globex" in screen
        await pilot.press("enter", "a")
        assert isinstance(app.focused, type(app.tenant_table))
        assert "Requests of all tenants 6" in await shown(pilot, app, "all tenants")
        await pilot.press("escape")
        await shown(pilot, app, "Tenants 3 ·")


async def test_a_hold_is_sent_after_a_question_and_its_outcome_is_told() -> None:
    """The command names the tenant under the cursor; the lease is what was written."""
    source = Given(*fleet())
    app = TopApp(source)
    async with app.run_test(size=(80, 24)) as pilot:
        await shown(pilot, app, "globex")
        await pilot.press("h")
        assert "1 queued, 3 running, 0 held" in text(app)
        assert source.client.sent == []
        app.screen.query_one(Input).value = "30s"
        await pilot.press("enter")
        await shown(pilot, app, "you: hold tenant acme: w1: held 2 requests from step 5")
    [(worker, verb, command)] = source.client.sent
    assert (worker, verb) == ("all", "preempt")
    assert command.targets == c.Targets(tenants=("acme",))
    assert command.lease_s == 30.0
    assert "@" in command.issuer


async def test_nothing_is_sent_unless_the_answer_is_yes() -> None:
    """Escape leaves it, and a value that is none is said so."""
    source = Given(*fleet())
    app = TopApp(source)
    async with app.run_test(size=(80, 24)) as pilot:
        await shown(pilot, app, "globex")
        await pilot.press("p")
        app.screen.query_one(Input).value = "soon"
        await pilot.press("enter")
        assert "'soon' is not a whole number" in text(app)
        await pilot.press("escape")
        await shown(pilot, app, "Tenants 3")
    assert source.client.sent == []


async def test_a_request_is_commanded_on_its_worker() -> None:
    """Continue asks too, but for nothing; a refusal is shown as one."""
    source = Given(*fleet(), refuse=True)
    app = TopApp(source)
    async with app.run_test(size=(80, 24)) as pilot:
        await shown(pilot, app, "globex")
        await pilot.press("down", "enter", "c")
        assert "Continue request h1 on w1?" in text(app)
        await pilot.press("enter")
        await shown(pilot, app, "you: continue request h1: w1 refused (403): not you")
    [(worker, verb, command)] = source.client.sent
    assert (worker, verb, command.targets.requests) == ("w1", "continue", ("h1",))


async def test_a_request_that_its_worker_forgot_is_told_from_frames() -> None:
    """Its story is asked for; where nobody answers it is what frames showed."""
    source = Given(*fleet())
    app = TopApp(source)
    async with app.run_test(size=(100, 30)) as pilot:
        await shown(pilot, app, "globex")
        await pilot.press("down", "enter", "enter")
        for _ in range(50):
            await pilot.pause()
            if "no such request" in text(app):
                break
        screen = text(app)
        assert "kv=kept by=operator" in screen
        assert "cox explain h1" in screen
        await pilot.press("escape")
        await shown(pilot, app, "Tenants 3")


async def test_a_stopped_picture_stays_as_it_is() -> None:
    """Until it is let go again."""
    source = Given(*fleet())
    app = TopApp(source)
    async with app.run_test(size=(80, 24)) as pilot:
        await shown(pilot, app, "globex")
        await pilot.press("space")
        app.overview.feed(frame("w3"), NOW)
        app.draw()
        await pilot.pause()
        assert "paused" in text(app)
        assert "w3" not in text(app)
        await pilot.press("space")
        await shown(pilot, app, "w3")


async def test_a_lost_connection_and_a_silent_leader_are_on_the_first_line() -> None:
    """Whoever looks at old numbers knows it."""
    source = Given(*fleet())
    app = TopApp(source)
    async with app.run_test(size=(80, 24)) as pilot:
        await shown(pilot, app, "globex")
        app.troubles.append("lost")
        source.clock += 9.0
        app.overview.tick(source.clock)
        screen = await shown(pilot, app, "NATS lost")
        assert "silent 9.0s" in screen
        app.troubles.append("back")
        app.overview.feed(
            frame("w1", "01A", 2, leader=Leader(epoch=(1.0, 7), age_s=8.0, policy="vtc")), source.clock
        )
        screen = await shown(pilot, app, "vtc #7 8.0s ago")
        assert "NATS lost" not in screen


def recording(path: Path, seconds: int = 40) -> Path:
    """Frames of a fleet, every second; a request is held from the twentieth on."""
    with Recorder(path, "main", NOW) as recorder:
        for n in range(seconds):
            state: Any = {"state": "held", "kv": "kept", "held_by": ("operator",)} if n >= 20 else {}
            each = frame(
                "w1", "01A", n, row("acme", held=int(n >= 20), running=int(n < 20)), sent_at=NOW + n,
                requests=(request("r1", "acme", arrived_at=NOW, **state),), held=int(n >= 20), running=int(n < 20),
            )  # fmt: skip
            recorder.write(each, NOW + n)
    return path


async def test_a_recording_is_shown_again_at_its_own_time(tmp_path: Path) -> None:
    """Played, stopped, sought on and back; nothing can be steered in it."""
    with Recording(recording(tmp_path / "r.jsonl")) as played:
        source = Replay(played, 1.0)
        source.paused = True
        app = TopApp(source)
        async with app.run_test(size=(100, 24), notifications=True) as pilot:
            await shown(pilot, app, "‖")
            await pilot.press("right", "right", "right")
            screen = await shown(pilot, app, "30s of 39s")
            assert "0 running  1 held" in screen
            await pilot.press("left", "left")
            screen = await shown(pilot, app, "10s of 39s")
            assert "1 running  0 held" in screen
            await pilot.press("plus", "plus")
            assert "×4" in await shown(pilot, app, "×4")
            await pilot.press("h")
            await shown(pilot, app, "this is a recording")
            source.speed = 1_000.0
            await pilot.press("space")
            screen = await shown(pilot, app, "■")
            assert "1 request held by operator" in screen


def test_rows_are_sorted_filtered_and_told_apart() -> None:
    """Sorting keeps equals in order; a filter looks at all of a row's words."""
    overview = Overview("main")
    for each in fleet():
        overview.feed(each, NOW)
    tenants = overview.picture(NOW).tenants
    by_queue = next(sort for sort in TENANTS.sorts if sort.name == "queued")
    names = [row.tenant for row in TENANTS.arrange(tenants, sort=by_queue, turned=False, wanted="")]
    assert names == ["acme", HOSTILE, "globex"]
    turned = [row.tenant for row in TENANTS.arrange(tenants, sort=by_queue, turned=True, wanted="")]
    assert turned == ["globex", "acme", HOSTILE]
    requests = overview.requests()
    listed = REQUESTS.arrange(requests, sort=REQUESTS.sorts[0], turned=False, wanted="ACME queued")
    assert [each.status.request for each in listed] == ["q0"]
    assert len({REQUESTS.key(row) for row in requests}) == len(requests) == 6


def test_a_gauge_shows_the_share_and_what_is_due() -> None:
    """The mark stands at what is due, also where the bar covers it."""
    assert gauge(0.5, 0.75, cells=8).plain == "━━━━╌╌┃╌"
    assert gauge(1.0, 0.25, cells=8).plain == "━━┃━━━━━"
    assert gauge(0.0, 0.0, cells=4).plain == "╌╌╌╌"
    assert gauge(1.0, 1.0, cells=4).plain == "━━━┃"


async def test_only_what_is_on_the_screen_is_laid_out() -> None:
    """Ten thousand requests cost what twenty do, at any place of the table."""
    asked = []

    def cells(row: RequestRow, now: float) -> list[Cell]:
        asked.append(row)
        return REQUESTS.cells(row, now)

    many = tuple(request(f"q{n}", "acme", state="queued", position=n) for n in range(10_000))
    app = TopApp(Given(frame("w1", "01A", 1, row("acme", queued=10_000), queued=10_000, requests=many)))
    async with app.run_test(size=(80, 24)) as pilot:
        await shown(pilot, app, "Requests of acme 10000")
        await pilot.press("tab")
        app.request_table.spec = dataclasses.replace(REQUESTS, cells=cells)
        await pilot.press("G")
        assert len(asked) < 24
        assert "queued #9999" in text(app)
