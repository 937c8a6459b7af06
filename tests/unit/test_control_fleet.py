"""The fleet's view of its workers, under a transport that loses, repeats, delays and reorders."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from coxswain.control.fleet import GONE_S, MAX_RETIRED, MAX_WORKERS, STALE_S, Fleet
from coxswain.control.presence import MAX_CLASSES
from coxswain.schemas.commands import encode
from coxswain.schemas.parts import Assembler
from coxswain.schemas.status import ClassStatus, Frame, Gone, decode_frame
from tests.support.frames import frame, request, row

TENANTS = ("a", "b", "c")


class Counting(Fleet):
    """A fleet, and all that it ever said about what tenants were charged."""

    def __init__(self, *, rows: bool = True) -> None:
        super().__init__(rows=rows)
        self.charged = dict.fromkeys(TENANTS, 0.0)

    def settle(self) -> None:
        """Add up what is new: it is never negative."""
        for name, more in self.served.items():
            assert more >= 0.0
            self.charged[name] += more
        super().settle()


def _history(incarnation: str, charges: list[tuple[int, float]]) -> tuple[list[Frame], dict[str, float]]:
    """Every frame that one incarnation publishes, the last of them full, and what it charged in the end."""
    totals = dict.fromkeys(TENANTS, 0.0)
    frames = []
    for seq, (which, cost) in enumerate(charges):
        totals[TENANTS[which]] += cost
        rows = [row(name, charged=total, queued=1) for name, total in totals.items()]
        if seq % 3 == 2:
            frames += [
                frame("w1", incarnation, seq, *rows[:2], part=0, parts=2),
                frame("w1", incarnation, seq, *rows[2:], part=1, parts=2),
            ]
        else:
            frames.append(frame("w1", incarnation, seq, rows[which], full=False))
    last = [row(name, charged=total) for name, total in totals.items()]
    frames.append(frame("w1", incarnation, len(charges), *last))
    return frames, totals


charges = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 50).map(float)), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.lists(charges, min_size=1, max_size=3), st.randoms(use_true_random=False), st.booleans())
def test_totals_survive_a_hostile_transport(lives: list[list[tuple[int, float]]], random, rows: bool) -> None:
    """Whatever is lost, repeated, late or reordered, all that was charged is told once each last full frame arrived."""
    fleet = Counting(rows=rows)
    expected = dict.fromkeys(TENANTS, 0.0)
    late: list[Frame] = []
    now = 0.0
    for number, life in enumerate(lives):
        frames, totals = _history(f"01{number}", life)
        delivered = [each for each in frames[:-1] if random.random() < 0.7]
        delivered += random.choices(frames, k=3)
        random.shuffle(delivered)
        after = [*random.choices(frames, k=2), *random.choices(late or frames, k=2)]
        for each in [*delivered, frames[-1], *after]:
            now += 0.01
            fleet.merge(each, now)
            fleet.validate()
            if random.random() < 0.5:
                fleet.settle()
        for name, total in totals.items():
            expected[name] += total
        late += frames
        fleet.settle()
        assert fleet.charged == expected


def test_a_full_frame_in_parts_counts_once_the_last_part_is_in() -> None:
    """Until all parts of a full frame are there, the view is what it was before."""
    fleet = Fleet()
    fleet.merge(frame("w1", "01A", 1, row("a", charged=1.0), row("b", charged=1.0)), 0.0)
    fleet.merge(frame("w1", "01A", 2, row("a", charged=5.0), part=0, parts=2), 0.1)
    assert (fleet.served["a"], fleet.workers["w1"].tenants["a"].charged) == (1.0, 1.0)
    fleet.merge(frame("w1", "01A", 2, row("b", charged=6.0), part=1, parts=2), 0.2)
    assert (fleet.served["a"], fleet.served["b"]) == (5.0, 6.0)


@pytest.mark.parametrize(("part", "parts"), [(2, 2), (-1, 2), (0, 0), (0, 10**9)])
def test_a_part_that_cannot_be_is_nobodys(part: int, parts: int) -> None:
    """It is kept by nobody, and completes nothing."""
    assembler: Assembler[Frame] = Assembler()
    impossible = frame("w1", "01A", 1, row("a"), part=part, parts=parts)
    references = sys.getrefcount(impossible)
    assert assembler.add(impossible) is None
    assert sys.getrefcount(impossible) == references


def test_a_delta_overtakes_a_full_frame_that_is_still_in_parts() -> None:
    """A part that comes after a newer frame completes nothing: totals never fall."""
    fleet = Fleet()
    fleet.merge(frame("w1", "01A", 1, row("a", charged=1.0), part=0, parts=2), 0.0)
    fleet.merge(frame("w1", "01A", 2, row("a", charged=9.0), full=False), 0.1)
    fleet.merge(frame("w1", "01A", 1, part=1, parts=2), 0.2)
    assert fleet.workers["w1"].tenants["a"].charged == 9.0
    assert not fleet.workers["w1"].complete


def test_requests_come_and_go_with_deltas() -> None:
    """A delta adds and updates requests, and `gone` takes them out."""
    fleet = Fleet()
    fleet.merge(frame(seq=1, requests=(request("r1"), request("r2"))), 0.0)
    fleet.merge(
        frame(
            seq=2, full=False, requests=(request("r2", state="held"),),
            gone=(Gone(request="r1", child=0, output_tokens=7),),
        ),
        0.1,
    )  # fmt: skip
    assert [(row.request, row.output_tokens) for row in fleet.workers["w1"].left] == [("r1", 7)]
    assert {key: each.state for key, each in fleet.workers["w1"].requests.items()} == {("r2", 0): "held"}


def test_what_waited_behind_is_forgotten_once_frames_list_the_whole_queue() -> None:
    """Who waited behind and hung up is in no frame, not even as gone: a queue without anything behind says so."""
    fleet = Fleet()
    queue = [request(f"r{number}", state="queued") for number in range(5)]
    fleet.merge(frame(seq=1, queued=5, requests=tuple(queue[:2])), 0.0)
    fleet.list_queue("w1", queue)
    fleet.merge(frame(seq=2, queued=3, full=False), 0.1)
    view = fleet.workers["w1"]
    assert [row.request for row in view.known()] == ["r0", "r1", "r2", "r3", "r4"]
    assert view.unlisted == 1
    fleet.merge(frame(seq=3, queued=2, full=False), 0.2)
    assert [row.request for row in view.known()] == ["r0", "r1"]


def test_a_silent_worker_is_not_counted_and_what_it_said_is_kept() -> None:
    """After 3 s without a frame its queue counts for nothing; if it comes back, what is new is counted, and no more."""
    fleet = Counting()
    fleet.merge(frame(seq=1), 0.0)
    fleet.merge(frame("w1", "01A", 2, row("a", charged=7.0, queued=3)), 0.0)
    fleet.age(0.0)
    assert fleet.presence.waiting["a"] == {"w1"}
    fleet.settle()
    fleet.age(STALE_S + 1)
    assert "a" not in fleet.presence.waiting
    assert "a" in fleet.changed["w1"]
    fleet.age(GONE_S + 1)
    assert fleet.liveness(fleet.workers["w1"]) == "gone"
    fleet.merge(frame("w1", "01A", 3, row("a", charged=8.0, queued=1)), GONE_S + 2)
    fleet.age(GONE_S + 2)
    fleet.settle()
    assert (fleet.presence.waiting["a"], fleet.charged["a"]) == ({"w1"}, 8.0)


def test_a_second_process_under_a_live_name_is_reported() -> None:
    """The later started incarnation wins; the other changes nothing and is named."""
    fleet = Fleet()
    for second in range(8):
        fleet.merge(frame("w1", "01B", second, row("a", charged=1.0)), float(second))
        fleet.merge(frame("w1", "01A", second, row("a", charged=100.0)), float(second))
    assert fleet.rivals == {"w1": "01A"}
    assert fleet.served["a"] == 1.0


@pytest.mark.parametrize(("first", "second", "refused"), [("01A", "01B", 3), ("01B", "01A", 0)])
def test_of_two_processes_under_a_name_the_one_that_is_left_is_counted(
    first: str, second: str, refused: int
) -> None:
    """Whichever of them had the turn before and lost it: it has it again once the other is silent.

    What it charged before, or while the other had the turn, is told no second time. The later started one has its
    turn again at once, the other once three frames were in vain.
    """
    fleet = Counting()
    fleet.merge(frame("w1", first, 1, row("a", charged=5.0)), 0.0)
    fleet.merge(frame("w1", second, 1, row("a", charged=100.0)), STALE_S + 1)
    assert fleet.workers["w1"].incarnation == second
    for tick in range(20):
        now = STALE_S + 2 + tick
        fleet.merge(frame("w1", first, 2 + tick, row("a", charged=10.0 + tick)), now)
        fleet.age(now)
        fleet.validate()
    assert [view.incarnation for view in fleet.live()] == [first]
    fleet.settle()
    assert fleet.charged["a"] == 105.0 + 19 - refused


def test_one_that_lives_on_is_remembered_however_often_its_twin_restarts() -> None:
    """The twin was counted nine times, with nothing; what the other charged is told no second time once it is alone."""
    fleet = Counting()
    fleet.merge(frame("w1", "01A", 0, row("a", charged=90_000.0)), 0.0)
    now = 0.0
    for restart in range(MAX_RETIRED + 1):
        now += 1.0
        fleet.merge(frame("w1", f"01B{restart:02}", 0, row("a")), now)
        fleet.merge(frame("w1", "01A", 1 + restart, row("a", charged=90_010.0)), now)
        fleet.age(now)
        fleet.validate()
    now += STALE_S + 1
    for seq, charged in ((50, 90_010.0), (51, 90_020.0)):
        fleet.merge(frame("w1", "01A", seq, row("a", charged=charged)), now)
        fleet.age(now)
    fleet.settle()
    assert fleet.workers["w1"].incarnation == "01A"
    assert fleet.charged["a"] == 90_010.0


def test_a_clock_set_back_does_not_lock_a_worker_out() -> None:
    """An incarnation that sorts before the last one is taken once that one is silent."""
    fleet = Fleet()
    fleet.merge(frame("w1", "01B", 1, row("a", charged=1.0)), 0.0)
    assert not fleet.merge(frame("w1", "01A", 1, row("a", charged=2.0)), 1.0)
    assert fleet.merge(frame("w1", "01A", 2, row("a", charged=2.0)), STALE_S + 2)
    assert fleet.served["a"] == 3.0


def test_unchanged_rows_are_not_named_as_changed() -> None:
    """A full frame that repeats what was known asks no policy to look again."""
    fleet = Fleet()
    first = frame("w1", "01A", 1, row("a", charged=1.0))
    fleet.merge(first, 0.0)
    fleet.age(0.0)
    fleet.settle()
    fleet.merge(replace(first, seq=2), 1.0)
    fleet.age(1.0)
    assert not any(fleet.changed.values())


def test_a_tenant_that_is_only_served_is_not_named() -> None:
    """Most of what frames say is that somebody who waits was served a little: that is summed, and no policy looks."""
    fleet = Fleet()
    fleet.merge(frame("w1", "01A", 1, row("a", queued=2), row("b", queued=2)), 0.0)
    fleet.age(0.0)
    fleet.settle()
    served = row("a", queued=1, charged=5.0, output_tokens_total=5)
    came = row("c", queued=1)
    lifted = row("b", queued=2, lift=3.0)
    fleet.merge(frame("w1", "01A", 2, served, lifted, came, full=False), 0.1)
    assert fleet.changed["w1"].keys() == {"b", "c"}
    assert fleet.served["a"] == 5.0


def test_a_fleet_beyond_all_bounds_may_restart() -> None:
    """Of more workers than are remembered each begins a new incarnation, and all of them are heard."""
    fleet = Fleet()
    names = [f"w{number}" for number in range(2 * MAX_WORKERS + 1)]
    for incarnation in ("01A", "01B"):
        for name in names:
            assert fleet.merge(frame(name, incarnation, 0, row("a")), 0.0)
    assert {view.incarnation for view in fleet.workers.values()} == {"01B"}


def test_a_class_that_a_full_frame_does_not_list_is_gone() -> None:
    """An operator took it out of the table. Deltas list what changed, and take nothing away."""
    both = tuple(
        ClassStatus(class_=name, queued=0, running=0, held=0, oldest_queued_s=0.0) for name in ("a", "b")
    )
    fleet = Fleet()
    fleet.merge(frame("w1", "01A", 1, classes=both), 0.0)
    fleet.merge(frame("w1", "01A", 2, full=False, classes=both[:1]), 0.1)
    assert [*fleet.workers["w1"].classes] == ["a", "b"]
    fleet.merge(frame("w1", "01A", 3, classes=both[:1]), 0.2)
    assert [*fleet.workers["w1"].classes] == ["a"]


def test_classes_that_a_worker_invents_are_bounded() -> None:
    """A policy may configure every class that anybody is in, everywhere: one worker must not make that without end."""
    fleet = Fleet()
    names = [f"c{number}" for number in range(2 * MAX_CLASSES)]
    fleet.merge(frame("w1", "01A", 0, *(row(name, class_=name) for name in names)), 0.0)
    assert fleet.presence.classes == set(names[:MAX_CLASSES])


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("name", ["", "x" * 129, "é" * 65, "\ud800"])
def test_a_tenant_that_cannot_be_is_not_taken_in(name: str, *, full: bool, rows: bool) -> None:
    """Names in here come into commands to any worker: whoever forged one must not keep others' rows from it."""
    fleet = Fleet(rows=rows)
    fleet.merge(frame("w1", "01A", 1, row("a")), 0.0)
    bad = row(name, queued=1, charged=5.0, lift=1.0, weight=2.0, max_running=1, uncached_input_tokens_total=9)
    for seq in (2, 3):
        fleet.merge(frame("w1", "01A", seq, bad, row("a", queued=1, charged=3.0), full=full), 0.0)
    fleet.age(0.0)
    assert [*fleet.workers["w1"].tenants] == [*fleet.presence.waiting] == ["a"]
    assert fleet.served == {"a": 3.0}
    assert fleet.changed.keys() == {"w1"}
    assert fleet.changed["w1"].keys() == {"a"}
    fleet.validate()


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("name", ["", "x" * 65, "cha=t", "Chat", "chat\n", "all", "other"])
def test_nor_is_a_class(name: str, *, full: bool) -> None:
    """The same of classes, whatever says that there is one."""
    classes = tuple(
        ClassStatus(class_=each, queued=1, running=0, held=0, oldest_queued_s=0.0) for each in (name, "b")
    )
    fleet = Fleet()
    fleet.merge(frame("w1", "01A", 1, row("a", class_=name), classes=classes, full=full), 0.0)
    assert [*fleet.workers["w1"].classes] == ["b"]
    assert fleet.presence.classes == {"b"}


@pytest.mark.parametrize("name", ["", "r" * 513])
def test_nor_is_a_request_that_no_command_can_name(name: str) -> None:
    """In full frames, in deltas, and in a queue that was asked for."""
    for full in (True, False):
        fleet = Fleet()
        fleet.merge(frame("w1", "01A", 1, requests=(request(name), request("r")), full=full, queued=2), 0.0)
        fleet.list_queue("w1", [request(name), request("s")])
        assert [each.request for each in fleet.workers["w1"].known()] == ["r", "s"]


def test_a_tenant_has_one_name_in_memory_on_all_workers() -> None:
    """In a large fleet a hundred equal strings would be compared, each at a place of its own, for every row heard."""
    fleet = Fleet()
    for worker in ("w1", "w2"):
        payload = encode(frame(worker, "01A", 0, row("acme", queued=1)))
        fleet.merge(decode_frame(payload), 0.0)
    (first,), (second,) = (view.tenants for view in fleet.workers.values())
    (third,) = fleet.workers["w2"].waiting
    assert first is second is third
