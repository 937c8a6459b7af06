"""Frames on their way out: numbers, splitting, heartbeats."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coxswain.schemas.errors import Code
from coxswain.schemas.status import ClassStatus, CommandStats, Gone, Leader, TenantStatus, decode_frame
from coxswain.service.bus.frames import ROWS, Frames, split
from tests.support.engine import frame

BARE = len(split(frame(), 1 << 20)[0])


@given(
    requests=st.integers(0, 60),
    tenants=st.integers(0, 20),
    gone=st.integers(0, 20),
    room=st.integers(600, 6_000),
)
def test_split_keeps_every_row_and_the_limit(requests: int, tenants: int, gone: int, room: int) -> None:
    """Parts fit into the limit, are numbered, and hold each row exactly once and in order."""
    served = frame(requests=requests, tenants=tenants)
    whole = msgspec.structs.replace(
        served,
        charged={row.tenant: row.charged for row in served.tenants},
        gone=tuple(Gone(request=f"gone-{number}", child=0) for number in range(gone)),
    )
    payloads = split(whole, BARE + room)
    parts = [decode_frame(payload) for payload in payloads]
    assert max(map(len, payloads)) <= BARE + room
    assert [part.part for part in parts] == list(range(len(parts)))
    assert {part.parts for part in parts} == {len(parts)}
    for field in ROWS:
        assert tuple(row for part in parts for row in getattr(part, field)) == getattr(whole, field)
    fits = len(msgspec.json.encode(whole)) <= BARE + room
    assert all(part.charged == (whole.charged if fits else {}) for part in parts)
    bare = {
        msgspec.json.encode(msgspec.structs.replace(part, part=0, tenants=(), requests=(), gone=()))
        for part in parts
    }
    assert len(bare) == 1


def test_row_larger_than_the_limit_is_not_lost() -> None:
    """A limit below one row gives each row a part of its own instead of dropping it."""
    assert len(split(frame(requests=3), 10)) == 3


def test_parts_share_a_number_and_frames_count_on() -> None:
    """All parts of a frame carry its number, and the next frame the next one."""
    frames = Frames()
    first = [decode_frame(part) for part in frames.outgoing(frame(requests=40), 5.0, BARE + 900, idle=False)]
    second = [decode_frame(part) for part in frames.outgoing(frame(), 6.0, 1 << 20, idle=False)]
    assert len(first) > 1
    assert {(part.seq, part.sent_at) for part in first} == {(1, 5.0)}
    assert [(part.seq, part.sent_at) for part in second] == [(2, 6.0)]


def test_heartbeat_repeats_only_an_idle_frame() -> None:
    """An idle frame is repeated with a new number, time and leader's age, until the engine sends another."""
    frames = Frames()
    assert frames.heartbeat(1.0, 1 << 20) == []
    frames.outgoing(frame(age_s=0.5), 10.0, 1 << 20, idle=True)
    beat = decode_frame(frames.heartbeat(12.0, 1 << 20)[0])
    assert (beat.seq, beat.sent_at, beat.leader.age_s) == (2, 12.0, pytest.approx(2.5))
    assert decode_frame(frames.heartbeat(13.0, 1 << 20)[0]).leader.age_s == pytest.approx(3.5)
    frames.outgoing(frame(), 14.0, 1 << 20, idle=False)
    assert frames.heartbeat(15.0, 1 << 20) == []


def test_a_large_idle_frame_is_repeated_a_part_a_heartbeat_in_the_mean() -> None:
    """Between two it says that it lives: no rows, no revision, the age of what it obeys; no number is left out."""
    frames, limit = Frames(), BARE + 900
    idle = msgspec.structs.replace(frame(requests=40, age_s=1.0), revision=7)
    parts = len(frames.outgoing(idle, 10.0, limit, idle=True))
    assert parts > 2
    for first in (10, 10 + parts):
        beats = [frames.heartbeat(float(now), limit) for now in range(first + 1, first + parts + 1)]
        assert [len(beat) for beat in beats] == [1] * (parts - 1) + [parts]
        alive = [decode_frame(beat[0]) for beat in beats[:-1]]
        assert {(beat.full, beat.revision, len(beat.requests), beat.queued) for beat in alive} == {
            (False, 0, 0, 40)
        }
        assert alive[0].leader.age_s == pytest.approx(first - 8.0)
        whole = [decode_frame(part) for part in beats[-1]]
        assert sum(len(part.requests) for part in whole) == 40
        assert {(part.full, part.revision, part.seq) for part in whole} == {(True, 7, first - 9 + parts)}
    frames.remember(idle, 90.0, idle=True)  # not sent: soon then
    assert len(frames.heartbeat(91.0, limit)) == parts


def test_what_waits_in_a_sleeping_engine_waits_on() -> None:
    """Kept back by caps, requests wait while the engine sleeps: the age of the oldest grows in every repetition."""
    waiting = TenantStatus(
        **{**msgspec.structs.asdict(frame(tenants=1).tenants[0]), "queued": 2, "oldest_queued_s": 1.5}
    )
    nothing = msgspec.structs.replace(waiting, tenant="nobody", queued=0, oldest_queued_s=0.0)
    classes = ClassStatus(class_="chat", queued=2, running=0, held=0, oldest_queued_s=1.5)
    frames = Frames()
    said = msgspec.structs.replace(frame(), tenants=(waiting, nothing), classes=(classes,))
    frames.outgoing(said, 10.0, 1 << 20, idle=True)
    for now in (12.0, 610.0):
        beat = decode_frame(frames.heartbeat(now, 1 << 20)[0])
        assert [row.oldest_queued_s for row in beat.tenants] == [pytest.approx(1.5 + now - 10.0), 0.0]
        assert beat.classes[0].oldest_queued_s == pytest.approx(1.5 + now - 10.0)


def test_a_leader_that_an_idle_engine_hears_does_not_grow_old() -> None:
    """Heartbeats of the leader that the frame names keep its age; those of another, whom it may not believe, do not."""
    said = msgspec.structs.replace(frame(), leader=Leader(epoch=(1.0, 7), age_s=0.5))

    def age_s(now: float) -> float | None:
        return decode_frame(frames.heartbeat(now, 1 << 20)[0]).leader.age_s

    frames = Frames()
    frames.outgoing(said, 10.0, 1 << 20, idle=True)
    frames.led((1.0, 7), 19.0)
    assert age_s(20.0) == pytest.approx(1.0)
    assert age_s(23.0) == pytest.approx(4.0)
    frames.led((1.0, 6), 23.5)
    assert age_s(24.0) == pytest.approx(5.0)
    frames.led((1.0, 8), 24.5)
    assert age_s(25.0) == pytest.approx(15.5), "the engine has not said yet that it obeys that one"


def test_frame_that_was_not_sent_still_replaces_the_idle_one() -> None:
    """An outage does not make an old frame true again: the latest counts, whether or not it was sent."""
    frames = Frames()
    frames.outgoing(frame(), 1.0, 1 << 20, idle=True)
    frames.remember(frame(), 2.0, idle=False)
    assert frames.heartbeat(3.0, 1 << 20) == []
    frames.remember(frame(requests=2), 4.0, idle=True)
    assert len(decode_frame(frames.heartbeat(5.0, 1 << 20)[0]).requests) == 2


def test_refusals_of_the_bus_are_counted_with_the_engines() -> None:
    """A frame counts every refused command, whoever refused it."""
    frames = Frames()
    for verb in ("abort", "fly", "swim", "abort"):
        frames.refuse(verb, Code.MALFORMED)
    engines = CommandStats(
        applied_total=2, rejected_total={"400": 1, "404": 3},
        outcomes_total={"abort": {"applied": 2, "400": 1}, "preempt": {"404": 3}},
    )  # fmt: skip
    counted = msgspec.structs.replace(frame(), commands=engines)
    sent = decode_frame(frames.outgoing(counted, 1.0, 1 << 20, idle=False)[0])
    assert sent.commands == frames.stamp(counted, 1.0).commands
    assert sent.commands.rejected_total == {"400": 5, "404": 3}
    assert sent.commands.outcomes_total == {
        "abort": {"applied": 2, "400": 3}, "preempt": {"404": 3}, "other": {"400": 2},
    }  # fmt: skip
    again = Frames(refused=frames.refused)
    assert again.stamp(counted, 1.0).commands == sent.commands, "the next bus goes on from there"


def test_events_that_wait_are_those_of_when_the_frame_is_sent() -> None:
    """A heartbeat repeats what the engine said last, but the log's backlog is the bus's own to tell."""
    frames = Frames(waiting=lambda now: (int(now), now - 1.0))
    frames.outgoing(frame(), 2.0, 1 << 20, idle=True)
    beat = decode_frame(frames.heartbeat(7.0, 1 << 20)[0])
    assert (beat.events_waiting, beat.events_waiting_s) == (7, 6.0)
