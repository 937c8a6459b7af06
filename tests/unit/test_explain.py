"""The story of a request and why a tenant is slow, as a real core's events tell it."""

from typing import Any

import msgspec
import pytest
from ulid import ULID

from coxswain.control.cli import view_explain
from coxswain.control.cli.explain import SKEW_S, made_at
from coxswain.control.explain.slow import Investigator, Quantiles, Slow
from coxswain.control.explain.story import ChildStory, Story, Teller
from coxswain.schemas import events as ev
from coxswain.schemas.policy import ClassPolicy, TenantPolicy
from tests.support.log import LoggedEngine

CLASSES = {
    "default": ClassPolicy(position=5),
    "gold": ClassPolicy(position=-1),
    "line": ClassPolicy(order="priority", position=9),
}


def engine(**tenants: str) -> LoggedEngine:
    """One that runs two requests at once; tenants are in the classes named."""
    made = LoggedEngine(slots=2)
    made.core.configure(CLASSES, {name: TenantPolicy(class_=class_) for name, class_ in tenants.items()})
    return made


def tell(request: str, *logs: LoggedEngine, now: float | None = None) -> Story:
    """The story that these logs tell."""
    teller = Teller(request, CLASSES)
    for each in logs:
        for event in each.log:
            teller.feed(event)
    return teller.story(logs[-1].now if now is None else now)


def one(story: Story) -> ChildStory:
    """Its only child."""
    [child] = story.children
    return child


def why(story: Story) -> dict[tuple[str, str], int]:
    """How many of whom went first, and why."""
    return {(each.tenant, each.why): each.admissions for each in one(story).ahead}


# A request


def test_a_story_says_behind_whom_a_request_waited_and_why() -> None:
    """A better class, a tenant that had less, its own tenant's better priority, and who came earlier."""
    made = engine(boss="gold")
    for tenant, priority in (("a", 0), ("a", -1), ("b", 0), ("boss", 0)):
        made.submit(tenant, prompt=100, priority=priority)
    mine = made.submit("a", prompt=10)
    made.submit("b", prompt=10)
    while mine in made.waiting:
        made.wait(1.0)
        made.admit()
    told = tell(mine.request, made)
    assert why(told) == {
        ("boss", "better class"): 1, ("a", "lower priority"): 1, ("a", "earlier"): 1,
        ("b", "lower virtual time"): 2,
    }  # fmt: skip
    child = one(told)
    assert child.queued_s == pytest.approx(6.0)
    assert (child.phase, child.running_s, child.tenant) == ("running", 0.0, "a")
    [queued] = [event for event in child.events if isinstance(event, ev.Queued)]
    assert (queued.waiting, queued.tenant_waiting, queued.next_tenant) == (4, 2, "boss")


def test_in_a_priority_class_priority_decides_across_tenants() -> None:
    """Virtual times say nothing there."""
    made = engine(a="line", b="line")
    made.submit("b", priority=-3)
    made.submit("b", priority=0)
    mine = made.submit("a", priority=0)
    for _ in range(3):
        made.admit()
    assert why(tell(mine.request, made)) == {("b", "lower priority"): 1, ("b", "earlier"): 1}


def test_phases_add_up_to_what_the_bill_says() -> None:
    """Queued, running, held, and running again: to the second, and as `finished` has it."""
    made = engine()
    mine = made.submit("a", prompt=16, tokens=8)
    made.wait(2.0)
    made.admit()
    made.wait(3.0)
    made.core.holds.hold(made.now, mine, "operator", "keep", None, "ana@desk")
    made.wait(5.0)
    made.core.holds.release(made.now, mine, ["operator"], "operator", "command")
    made.wait(1.0)
    made.finish(mine)
    child = one(tell(mine.request, made, now=made.now + 99))
    bill = child.finished
    assert bill is not None
    assert (child.queued_s, child.running_s, child.held_s) == pytest.approx((2.0, 4.0, 5.0))
    assert (bill.queued_s, bill.run_s, bill.held_s) == pytest.approx((2.0, 4.0, 5.0))
    assert child.phase == "finished"
    text = view_explain.story(tell(mine.request, made), 80).plain
    [phases] = [line for line in text.splitlines() if "━" in line]
    assert len(phases) <= 80


def test_a_dropped_request_waits_again_when_it_is_continued() -> None:
    """What its hold cost is queueing too, and the second admission is in the story."""
    made = engine()
    mine = made.submit("a", prompt=16, tokens=8)
    made.admit()
    made.core.holds.hold(made.now, mine, "operator", "drop", None, "why")
    made.wait(5.0)
    made.core.holds.release(made.now, mine, ["operator"], "operator", "command")
    made.wait(2.0)
    child = one(tell(mine.request, made))
    assert (child.phase, child.held_s, child.queued_s) == ("queued", pytest.approx(5.0), pytest.approx(2.0))
    made.admit()
    assert one(tell(mine.request, made)).phase == "running"


def test_a_story_survives_a_log_that_begins_too_late() -> None:
    """What was before is taken from what the first event says of the past; lost events are counted."""
    made = engine()
    mine = made.submit("a")
    made.wait(4.0)
    made.admit()
    made.wait(1.0)
    made.finish(mine)
    queued = [event for event in made.log if isinstance(event, ev.Queued)]
    made.log = made.log[made.log.index(queued[0]) + 1 :]
    child = one(tell(mine.request, made))
    assert (child.queued_s, child.running_s) == (pytest.approx(4.0), pytest.approx(1.0))
    made.log = made.log[-1:]
    child = one(tell(mine.request, made))
    assert (child.queued_s, child.running_s) == (pytest.approx(4.0), pytest.approx(1.0))


def test_gaps_in_the_log_are_counted() -> None:
    """A story with holes says so."""
    made = engine()
    mine = made.submit("a")
    made.submit("b")
    made.admit()
    assert [event.seq for event in made.log] == [1, 2, 3]
    del made.log[1]
    told = tell(mine.request, made)
    assert told.events_missing == 1
    assert "missing from the log" in view_explain.story(told, 80).plain


def test_a_story_is_of_exactly_the_request_that_was_asked_for() -> None:
    """Another tenant's id may be the end of it; the `id` in a response's body is vLLM's prefix and the public id."""
    made = engine()
    made.submit("acme", request="11")
    made.submit("zeta", request="1")
    for asked in ("11", "chatcmpl-11", "cmpl-11"):
        child = one(tell(asked, made))
        assert {(event.request, event.tenant) for event in child.events} == {("11", "acme")}


def test_a_request_whose_worker_restarted_is_lost() -> None:
    """It neither runs for ever nor is it taken for one of the new incarnation."""
    made, reborn = engine(), LoggedEngine(incarnation="01B", slots=2)
    mine = made.submit("a")
    made.admit()
    made.wait(2.0)
    reborn.now = made.now + 5.0
    reborn.submit("b", request="another")
    child = one(tell(mine.request, made, reborn, now=made.now + 1_000))
    assert (child.phase, child.running_s) == ("lost", pytest.approx(7.0))


def test_a_story_has_an_end() -> None:
    """Whoever reads the log may stop when all that it knows of has ended."""
    made = engine()
    mine = made.submit("a")
    teller = Teller(mine.request, CLASSES)
    made.admit()
    for event in made.log:
        teller.feed(event)
    assert teller.ended_at() is None
    made.wait(1.0)
    made.finish(mine)
    teller.feed(made.log[-1])
    assert teller.ended_at() == made.log[-1].at
    assert Teller("nobody", CLASSES).ended_at() is None


@pytest.mark.parametrize(
    "tenant",
    ["acme", "01BX5ZZKBKACTAV9WEVGEMMVRZ", "7ZZZZZZZZZZZZZZZZZZZZZZZZZ", "01NZZZZZZZZZZZZZZZZZZZZZZZ"],
    ids=["no ulid", "an old one", "beyond all dates", "a later one"],
)
def test_a_signed_id_says_when_it_was_made_whatever_its_tenant_is_called(tenant: str) -> None:
    """The log is read from there, and a tenant's name may look like a time too."""
    made = ULID.from_timestamp(1_790_000_000.0)
    at = made_at(f"cox.{tenant}.chat.{made}.0123456789abcdef", made.timestamp + 60.0)
    assert at == pytest.approx(made.timestamp - SKEW_S)


@pytest.mark.parametrize("request_id", ["job-7", "7ZZZZZZZZZZZZZZZZZZZZZZZZZ"])
def test_an_id_that_tells_no_time_of_the_past_has_none(request_id: str) -> None:
    """Then the whole log is read."""
    assert made_at(request_id, 1_790_000_000.0) is None


def test_the_story_for_people_says_who_held_it() -> None:
    """Ids and reasons are whole, and foreign text steers no terminal."""
    made = engine()
    made.submit("b\x1b[31m")
    mine = made.submit("a")
    made.admit()
    made.admit()
    made.core.holds.hold(made.now, mine, "operator", "keep", made.now + 30.0, "ana@desk")
    made.wait(1.5)
    made.finish(mine)
    told = tell(mine.request, made)
    text = view_explain.story(told, 80).plain
    for words in (
        "finished: ",
        "by operator for 30s, kv kept",
        "(ana@desk)",
        "behind 1",
        "held 1.5s",
        "tokens to compute",
    ):
        assert words in text, text
    assert "\x1b" not in text
    assert msgspec.json.decode(msgspec.json.encode(told), type=dict[str, Any])["children"][0]["held_s"] == 1.5


# A tenant


def investigate(made: LoggedEngine, tenant: str, since: float, **caps: int) -> Slow:
    """What the log says of a tenant up to now."""
    found = Investigator(tenant, since, CLASSES, caps)
    for event in made.log:
        found.feed(event)
    return found.result(made.now)


def test_a_tenants_time_is_shared_out_among_its_states() -> None:
    """Of all its requests together, and of the time asked about only; who waited all along counts."""
    made = engine()
    ours = [made.submit("a", prompt=10) for _ in range(3)]
    made.submit("b", prompt=10)
    made.wait(10.0)
    since = made.now
    made.wait(4.0)
    first = made.admit()
    made.wait(2.0)
    made.core.holds.hold(made.now, first, "operator", "keep", None, "ana@desk")
    made.wait(3.0)
    found = investigate(made, "a", since)
    assert found.requests == len(ours) == 3
    assert (found.queued_s, found.running_s, found.held_s) == pytest.approx((4.0 + 2 * 9.0, 2.0, 3.0))
    assert [(hold.by, hold.reason, hold.count) for hold in found.holds] == [("operator", "ana@desk", 1)]
    assert (found.wait.count, found.wait.p50, found.waited) == (1, pytest.approx(14.0), 1)


def test_who_went_first_is_counted_only_while_the_tenant_waited() -> None:
    """On the same worker, in the time asked about."""
    made = engine(boss="gold")
    made.submit("boss")
    made.admit()
    made.submit("boss")
    made.submit("a")
    since = made.now
    made.admit()
    made.admit()
    made.submit("boss")
    made.admit()
    found = investigate(made, "a", since)
    assert [(each.tenant, each.why, each.admissions) for each in found.ahead] == [("boss", "better class", 1)]
    assert found.admitted == 1


def test_time_at_a_cap_counts_while_something_waits() -> None:
    """A cap that nothing runs against costs nothing."""
    made = engine()
    first = made.submit("a")
    made.admit()
    made.wait(7.0)
    made.submit("a")
    made.wait(3.0)
    made.finish(first)
    made.wait(1.0)
    assert investigate(made, "a", 0.0, w1=1).at_cap_s == {"w1": pytest.approx(3.0)}
    assert investigate(made, "a", 0.0).at_cap_s == {}


def test_preemptions_and_lost_kv_are_told() -> None:
    """What was computed twice, and how often the tenant lost its turn."""
    made = engine()
    mine = made.submit("a", prompt=64, tokens=4)
    made.admit()
    made.step()
    made.core.evict(made.now, mine, "cut-in for r9")
    made.wait(1.0)
    found = investigate(made, "a", 0.0)
    assert found.preempted == 1
    text = view_explain.slow(found, 80).plain
    assert "preempted: 1" in text
    assert "caps: none" in text


def test_quantiles_are_by_nearest_rank() -> None:
    """Half of a hundred values are at most the 50th; of one value all are that value; of none there are none."""
    assert Quantiles.of([float(n) for n in range(100, 0, -1)]) == Quantiles(
        count=100, p50=50.0, p90=90.0, p99=99.0
    )
    assert Quantiles.of([1.0, 100.0]) == Quantiles(count=2, p50=1.0, p90=100.0, p99=100.0)
    assert Quantiles.of([3.0]) == Quantiles(count=1, p50=3.0, p90=3.0, p99=3.0)
    assert Quantiles.of([]).p50 is None
