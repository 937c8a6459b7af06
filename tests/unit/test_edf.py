"""Earliest deadline first: the most requests in time, the rest behind, and nothing said twice."""

from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from coxswain.control.core import Answer, Ask, Beat, ControlCore, Inputs, Listing, Send
from coxswain.control.estimates.rates import Rates
from coxswain.control.fleet import Fleet
from coxswain.control.policies.edf import SPAN, Edf, Job, _deadline, _priority, late
from coxswain.control.policy import Tables
from coxswain.schemas.commands import decode, encode
from coxswain.schemas.policy import ClassPolicy
from coxswain.schemas.status import ClassStatus
from tests.support.control import Driver
from tests.support.frames import frame, request, row

jobs = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 6)).map(lambda pair: (float(pair[0]), float(pair[1]))),
    max_size=6,
).map(lambda pairs: [Job((f"r{n}", 0), deadline, length) for n, (deadline, length) in enumerate(pairs)])


def in_time(order: Any) -> int:
    """How many of these begin by their deadline, one after the other."""
    at, count = 0.0, 0
    for job in order:
        count += at <= job.deadline
        at += job.length
    return count


@given(jobs)
def test_moore_gives_up_the_fewest(these: list[Job]) -> None:
    """No order of any of the requests has more of them in time than those that are kept, by due time (Moore 1968)."""
    given_up = late(these)
    kept = sorted((job for job in these if job.key not in given_up), key=lambda job: job.due)
    assert in_time(kept) == len(kept)
    best = max((in_time(order) for order in permutations(these)), default=0)
    assert len(kept) == best


class Queue:
    """One worker under edf: seconds pass, its queue is what a test says."""

    def __init__(self, **settings: Any) -> None:
        self.policy = Edf(Edf.Params(every_s=0.0, **settings))
        self.fleet = Fleet()
        self.seq = 0

    def look(self, now: float, *waiting: Any, tokens: int = 0) -> dict[str, int]:
        """The priorities decided, by request."""
        self.seq += 1
        tenant = row("a", queued=len(waiting), output_tokens_total=tokens)
        self.fleet.merge(frame("w1", "01A", self.seq, tenant, queued=len(waiting), requests=waiting), now)
        self.fleet.age(now)
        self.policy.observe(self.fleet, Tables({"default": ClassPolicy()}), now)
        self.fleet.settle()
        directives = self.policy.decide(now)
        return {key[0]: priority for key, priority in directives.priorities["w1"].items()}


def waits(name: str, deadline_s: float | None) -> Any:
    """A request in the queue."""
    return request(name, state="queued", deadline_s=deadline_s)


def test_the_earlier_deadline_goes_first() -> None:
    """Before a worker's speed is known nobody is given up: plain EDF; who has no deadline comes last."""
    priorities = Queue().look(100.0, waits("late", 160.0), waits("soon", 120.0), waits("never", None))
    assert priorities["soon"] < priorities["late"] < 0
    assert "never" not in priorities


def busy(queue: Queue, *waiting: Any) -> dict[str, int]:
    """After four seconds at 100 tokens per second."""
    for second in range(4):
        priorities = queue.look(100.0 + second, *waiting, tokens=100 * second)
    return priorities


def test_the_line_comes_first_and_keeps_deadlines() -> None:
    """Whoever takes over reads deadlines off the priorities: requests in the line are ordered as before."""
    first = Queue()
    deadlines = {"a": 160.0, "b": 120.0, "c": 90.0}
    before = busy(first, *(waits(name, at) for name, at in deadlines.items()))
    moved = [
        request(name, state="queued", class_="deadline", priority=before[name], deadline_s=None)
        for name in deadlines
    ]
    after = busy(Queue(), *moved)
    assert after == before
    directives = first.policy.decide(200.0)
    assert set(directives.moves["w1"].values()) == {"deadline"}
    line, plain = directives.classes["deadline"], directives.classes["default"]
    assert (line.position < plain.position, line.order) == (True, "priority")


@given(st.floats(0, 4e9), st.floats(-1e6, 1e6), st.booleans())
def test_a_priority_says_when(now: float, ahead: float, in_time: bool) -> None:
    """To the second, for as long as anybody could wait."""
    deadline = max(0.0, now + ahead)
    assert abs(_deadline(_priority(deadline, in_time=in_time), now) - deadline) <= 1.0


def test_who_cannot_make_it_stands_back() -> None:
    """At 100 tokens/s and 200 tokens each, a request with three ahead that is due in 5 s makes way."""
    waiting = [waits(f"r{n}", 103.0 + 5.0) for n in range(4)]
    priorities = busy(Queue(expected_tokens=200.0), *waiting)
    assert sorted(priority > 0 for priority in priorities.values()) == [False, False, False, True]
    assert max(priorities.values()) <= SPAN


def test_a_deadline_that_has_passed_is_given_up() -> None:
    """Nothing is gained by serving it before those that can still be in time."""
    priorities = busy(Queue(), waits("past", 90.0), waits("fine", 1_000.0))
    assert priorities["fine"] < 0 < priorities["past"]


@pytest.mark.parametrize("by", ["table", "limit"])
def test_a_class_with_caps_keeps_its_requests(by: str) -> None:
    """Requests of a class that may run two at a time are not moved to where nothing bounds them."""
    queue = Queue()
    waiting = [request(f"b{n}", state="queued", class_="bulk", deadline_s=200.0 - n) for n in range(2)]
    tables = Tables({"default": ClassPolicy(), "bulk": ClassPolicy(max_running=2 if by == "table" else None)})
    shown = ClassStatus(class_="bulk", queued=2, running=0, held=0, oldest_queued_s=0.0, max_running=2)
    rows = (shown,) if by == "limit" else ()
    status = frame("w1", "01A", 1, row("a", queued=3), queued=3, requests=(*waiting, waits("free", 300.0)))
    queue.fleet.merge(replace(status, classes=rows), 100.0)
    queue.fleet.age(100.0)
    queue.policy.observe(queue.fleet, tables, 100.0)
    directives = queue.policy.decide(100.0)
    assert directives.moves["w1"] == {("free", 0): "deadline"}
    assert directives.priorities["w1"]["b1", 0] < directives.priorities["w1"]["b0", 0] < 0
    bulk = directives.classes["bulk"]
    assert (bulk.max_running, bulk.position > directives.classes["deadline"].position) == (
        tables.classes["bulk"].max_running,
        True,
    )
    assert bulk.order == "priority"


@pytest.mark.parametrize("first", [-(2**31), 2**31 - 2])
def test_the_line_has_room_whatever_positions_the_table_uses(first: int) -> None:
    """Classes at the ends of what a position can be stay in their order, behind the line, and workers take them."""
    driver = Driver(Edf(Edf.Params()))
    positions = {"default": first, "equal": first, "last": 2**31 - 1}
    driver.classes = {name: ClassPolicy(position=position) for name, position in positions.items()}
    (send,) = (each for each in driver.sends(0.0, frame()) if each.verb == "configure")
    configure, _ = decode("configure", encode(send.command))
    told = {name: row.position for name, row in configure.classes.items()}
    assert told["deadline"] < told["default"] == told["equal"] < told["last"]


def test_the_speed_is_what_a_busy_worker_delivers() -> None:
    """Seconds without anything waiting say nothing about what a worker can do."""
    rates, fleet = Rates(), Fleet()
    for second in range(40):
        queued = 1 if second < 30 else 0
        tokens = 50 * min(second, 30)
        fleet.merge(frame("w1", "01A", second, row("a", queued=queued, output_tokens_total=tokens)), second)
        fleet.age(second)
        rates.observe(fleet)
        fleet.settle()
    assert rates.of("w1") == pytest.approx(50.0)


def test_the_rest_of_a_long_queue_is_asked_for() -> None:
    """Frames list the first that wait; who waits behind them may be the most urgent of all."""
    core = ControlCore(Edf(Edf.Params()), "c", lambda: "id")
    listed = (waits("r1", 500.0),)
    status = frame("w1", "01A", 1, row("a", queued=2), queued=2, requests=listed)
    everything = {"classes": {}, "tenants": {}, "epoch": (1.0, 1)}
    core.hear(0.0, status)
    first = core.step(0.0, Inputs(**everything))
    assert [each for each in first if isinstance(each, Ask)] == [Ask("w1")]
    assert not any(isinstance(each, Ask) for each in core.step(0.1, Inputs(**everything)))
    whole = [*listed, waits("r2", 200.0)]
    ok = [Answer(each, ok=True) for each in first if isinstance(each, Send)]
    answer = Inputs(listings=[Listing("w1", whole)], answers=ok, **everything)
    sends = [each for each in core.step(0.3, answer) if not isinstance(each, Beat | Ask)]
    assert [send.command.targets.requests for send in sends if send.verb == "prioritize"] == [("r2",)]
