"""What people see of a fleet follows from its status frames, and from nothing else."""

from typing import Any

import msgspec
import pytest

from coxswain.control.view.overview import Overview
from coxswain.control.view.picture import Picture
from coxswain.schemas.status import CommandStats, Frame, Gone, KvBlocks, Leader, Slots
from tests.support.frames import frame, request, row

NOW = 1_700_000_000.0


def seen(*timed: tuple[float, Frame], until: float | None = None) -> Overview:
    """An overview that was fed frames, each at its time, with a tick after each and at the end."""
    overview = Overview("main", window_s=10.0)
    for at, each in timed:
        overview.feed(each, at)
        overview.tick(at)
    if until is not None:
        overview.tick(until)
    return overview


def look(overview: Overview, now: float | None = None) -> Picture:
    """The picture as of the last tick."""
    return overview.picture(overview.now if now is None else now)


def said(overview: Overview) -> list[str]:
    """The happenings, without their times."""
    return [f"{each.worker}: {each.text}" for each in look(overview).happenings]


def charged(seq: int, **cost: float) -> Frame:
    """A frame in which tenants were charged so much so far."""
    rows = [
        row(name, charged=each, output_tokens_total=int(each), running=1, class_="chat")
        for name, each in cost.items()
    ]
    return frame("w1", "01A", seq, *rows)


# Shares


def test_shares_are_of_what_was_served_of_late() -> None:
    """What was charged before we looked, or has left the window, does not count."""
    overview = seen((NOW, charged(1, a=5_000, b=0)), (NOW + 2, charged(2, a=5_030, b=90)))
    a, b = look(overview).tenants
    assert (a.share, b.share) == (0.25, 0.75)
    assert (a.due, b.due) == (0.5, 0.5)
    assert a.output_tokens_per_s == pytest.approx(15.0)
    assert look(overview).output_tokens_per_s == pytest.approx(60.0)
    overview.feed(charged(3, a=5_030, b=90), NOW + 13)
    overview.tick(NOW + 13)
    assert [each.share for each in look(overview).tenants] == [0.0, 0.0]


def test_service_is_cost_and_not_cost_by_weight() -> None:
    """A tenant of weight 4 that was charged a quarter for the same work has the same share, and is due more."""
    frames = [
        frame("w1", "01A", n, row("a", charged=c, running=1), row("b", charged=c / 4, weight=4.0, running=1))
        for n, c in ((1, 0.0), (2, 80.0))
    ]
    a, b = look(seen((NOW, frames[0]), (NOW + 1, frames[1]))).tenants
    assert (a.share, b.share) == (0.5, 0.5)
    assert (a.due, b.due) == (pytest.approx(0.2), pytest.approx(0.8))


def test_a_tenant_is_due_its_part_of_what_its_class_got() -> None:
    """Classes are served in order, so a weight counts inside its class; who wants nothing is due nothing."""

    def frames(n: int, *costs: float) -> Frame:
        rows = [
            row(name, class_=class_, charged=cost, running=busy)
            for (name, class_, busy), cost in zip(
                (("a", "chat", 1), ("b", "chat", 1), ("c", "batch", 1), ("idle", "chat", 0)), costs, strict=True
            )
        ]  # fmt: skip
        return frame("w1", "01A", n, *rows)

    picture = look(seen((NOW, frames(1, 0, 0, 0, 7)), (NOW + 1, frames(2, 60, 20, 20, 7))))
    assert {each.tenant: each.due for each in picture.tenants} == {
        "a": pytest.approx(0.4), "b": pytest.approx(0.4), "c": pytest.approx(0.2), "idle": 0.0,
    }  # fmt: skip
    assert {each.class_: each.share for each in picture.classes} == {"chat": pytest.approx(0.8), "batch": 0.2}


def test_a_new_incarnation_takes_nothing_away() -> None:
    """Totals that begin again at zero are no negative service."""
    overview = seen((NOW, charged(1, a=500)), (NOW + 1, charged(2, a=600)))
    overview.feed(frame("w1", "01B", 1, row("a", charged=0.0), row("b", charged=0.0)), NOW + 2)
    overview.tick(NOW + 2)
    overview.feed(frame("w1", "01B", 2, row("a", charged=100.0), row("b", charged=200.0)), NOW + 3)
    overview.tick(NOW + 3)
    assert [each.share for each in look(overview).tenants] == [0.5, 0.5]
    assert "w1: restarted: a new incarnation" in said(overview)


# Requests


def test_time_to_first_token_is_seen_when_a_request_begins_to_speak() -> None:
    """Only requests that were seen silent before count, and only of late."""
    silent = [request(name, "a", arrived_at=NOW - 2) for name in ("r1", "r2")]
    spoke = [msgspec.structs.replace(each, output_tokens=1) for each in silent]
    late = request("r3", "a", arrived_at=NOW - 99, output_tokens=40)
    first = frame("w1", "01A", 1, row("a"), sent_at=NOW, requests=tuple(silent))
    overview = seen((NOW, first))
    for at, each in ((NOW + 1, spoke[0]), (NOW + 3, spoke[1])):
        delta = frame("w1", "01A", int(at - NOW) + 1, sent_at=at, full=False, requests=(each, late))
        overview.feed(delta, at)
    overview.tick(NOW + 3)
    assert look(overview).tenants[0].ttft_s == pytest.approx(4.0)
    assert look(overview, NOW + 20).tenants[0].ttft_s is None


def test_requests_come_running_first_then_held_then_in_order_of_the_queue() -> None:
    """And a filter keeps those that are wanted."""
    rows = (
        request("q1", state="queued", position=1), request("q0", state="queued", position=0),
        request("h", "b", state="held", kv="kept"), request("r"),
    )  # fmt: skip
    overview = seen((NOW, frame(requests=rows)))
    assert [each.status.request for each in overview.requests()] == ["r", "h", "q0", "q1"]
    assert [each.status.request for each in overview.requests(lambda row: row.status.tenant == "b")] == ["h"]


def test_a_request_leaves_a_trail() -> None:
    """Every change that two frames show, in the words of events."""
    steps: list[dict[str, Any]] = [
        {"state": "queued", "position": 0}, {"state": "running"}, {"state": "running", "output_tokens": 3},
        {"state": "held", "kv": "kept", "held_by": ("operator",)},
        {"state": "held", "kv": "dropped", "held_by": ("operator",)},
        {"state": "queued", "position": 4, "priority": -1}, {"state": "running", "priority": -1},
    ]  # fmt: skip
    overview = seen(
        *((NOW + n, frame("w1", "01A", n, step=n, requests=(request("r", **each),))) for n, each in enumerate(steps))
    )  # fmt: skip
    trail = overview.trail("w1", ("r", 0))
    assert [(each.step, each.kind) for each in trail] == [
        (0, "queued"), (1, "admitted"), (2, "first_token"), (3, "held"), (4, "held"), (5, "continued"),
        (5, "reprioritized"), (6, "admitted"),
    ]  # fmt: skip
    assert said(overview)[1:] == [
        "w1: 1 request held by operator", "w1: 1 request continued (held by operator)",
        "w1: 1 request reprioritized",
    ]  # fmt: skip


def test_what_a_policy_does_again_and_again_is_one_line() -> None:
    """It grows and stays last, for ten seconds; a refusal before it is still to be seen, and another role's hold."""

    def shown(seq: int, *roles: str) -> Frame:
        more = {"state": "held", "kv": "kept", "held_by": roles} if roles else {"state": "running"}
        return frame("w1", "01A", seq, requests=(request("r", **more),))

    roles = [(), ("controller",), (), ("operator",), (), ("controller",), (), ("controller",)]
    times = [0.0, 0.2, 0.4, 1.0, 2.0, 4.2, 4.4, 11.0]
    overview = seen(
        *((NOW + at, shown(seq, *of)) for seq, (at, of) in enumerate(zip(times, roles, strict=True)))
    )
    assert said(overview)[1:] == [
        "w1: 1 request held by operator", "w1: 1 request continued (held by operator)",
        "w1: 2 requests held by controller within 4 s", "w1: 2 requests continued (held by controller) within 4 s",
        "w1: 1 request held by controller",
    ]  # fmt: skip


def test_what_the_engine_makes_room_with_is_no_happening() -> None:
    """Cut-in is everyday work; what people and controllers do is not."""
    held = request("r", state="held", kv="kept", held_by=("engine",))
    overview = seen((NOW, frame(seq=1, requests=(request("r"),))), (NOW + 1, frame(seq=2, requests=(held,))))
    assert len(said(overview)) == 1
    assert [each.kind for each in overview.trail("w1", ("r", 0))] == ["running", "held"]


# Workers and their leader


def test_workers_that_fall_silent_stay_in_the_picture_for_a_while() -> None:
    """Marked, and without their requests; after half a minute they are gone."""
    overview = seen((NOW, frame(queued=3, requests=(request("r"),))), until=NOW + 5)
    [worker] = look(overview).workers
    assert (worker.liveness, worker.silent_s) == ("stale", 5.0)
    assert look(overview).queued == 0
    assert overview.requests() == []
    overview.tick(NOW + 40)
    assert look(overview).workers == ()
    overview.feed(frame(seq=9), NOW + 41)
    overview.tick(NOW + 41)
    assert said(overview)[1:] == ["w1: silent", "w1: gone: silent for half a minute", "w1: back"]


def test_the_leader_is_the_one_of_the_newest_epoch() -> None:
    """Its age is since any worker heard it, and goes on growing between frames."""
    old, new = (
        Leader(epoch=(1.0, 3), age_s=0.1, policy="fcfs"),
        Leader(epoch=(1.0, 9), age_s=0.5, policy="vtc"),
    )
    overview = seen((NOW, frame("w1", leader=old)), (NOW, frame("w2", leader=new)))
    leader = look(overview, NOW + 2).leader
    assert leader is not None
    assert (leader.epoch, leader.policy, leader.age_s) == ((1.0, 9), "vtc", 2.5)
    assert look(seen((NOW, frame()))).leader is None


def test_what_workers_refuse_and_lose_is_told() -> None:
    """Refusals by code, but for requests that are elsewhere; dropped events, new tables, a new leader, a state."""
    calm = frame(seq=1, commands=CommandStats(rejected_total={"410": 1}), config="aaaaaaaaaa")
    storm = frame(
        seq=2, commands=CommandStats(rejected_total={"410": 3, "404": 5, "409": 1}), config="bbbbbbbbbb",
        state="paused", events_dropped_total=7, leader=Leader(epoch=(1.0, 4), age_s=0.0, policy="vtc"),
    )  # fmt: skip
    overview = seen((NOW, calm), (NOW + 1, storm))
    assert said(overview)[1:] == [
        "w1: serving → paused", "w1: tables aaaaaaaa → bbbbbbbb", "w1: refused 2 commands (410)",
        "w1: refused a command (409)", "w1: dropped 7 events", "w1: obeys a new leader with vtc, epoch 4",
    ]  # fmt: skip
    assert [each.weight for each in look(overview).happenings][1:4] == ["warning", "news", "warning"]


def test_a_worker_is_shown_as_its_frame_says() -> None:
    """Slots, KV and step time are the frame's own."""
    slots, blocks = Slots(active=16, total=20, running=12, held=3), KvBlocks(total=1000, used=700, held=90)
    picture = look(seen((NOW, frame(slots=slots, kv_blocks=blocks, running=12, held=3, step_s=0.02))))
    [worker] = picture.workers
    assert (worker.running_slots, worker.active_slots, worker.held_slots) == (12, 16, 3)
    assert (worker.kv_used, worker.kv_held, worker.step_s) == (0.7, 0.09, 0.02)
    assert (picture.running, picture.held) == (12, 3)


def test_a_frame_that_is_late_is_no_news() -> None:
    """Of two frames in the wrong order the older one changes and tells nothing."""
    newer = frame(
        seq=5, state="serving", requests=(request("r", state="held", kv="kept", held_by=("operator",)),)
    )
    older = frame(seq=4, state="paused", requests=(request("r"),))
    overview = seen((NOW, newer), (NOW, older))
    assert len(said(overview)) == 1
    assert look(overview).workers[0].state == "serving"


def test_a_picture_is_one_json_document() -> None:
    """Whoever draws it elsewhere needs nothing of ours."""
    overview = seen((NOW, frame("w1", "01A", 1, row("a", queued=1), gone=(Gone(request="x", child=0),))))
    document = msgspec.json.decode(msgspec.json.encode(look(overview)))
    assert document["tenants"][0]["class"] == "default"
    assert msgspec.convert(document, Picture) == look(overview)
