"""Single requests and caps: commands go out until what a worker says is what the policy wants, and not longer."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from coxswain.control.core import Answer, Send
from coxswain.control.policy import Cap, Directives, load
from coxswain.control.requests import HOLD_LEASE_S, MAX_COMMANDS, MAX_TARGETS, RENEW_S
from coxswain.control.told import ECHO_S
from coxswain.schemas.policy import TenantPolicy
from coxswain.schemas.status import ClassStatus, KvBlocks, Slots
from tests.support.control import EPOCH, Driver, Fixed
from tests.support.frames import frame, request, row


def driver(**directives: Any) -> Driver:
    """A core whose policy wants this."""
    return Driver(Fixed(**directives))


def ok(sends: list[Send]) -> list[Answer]:
    """Every command was accepted."""
    return [Answer(send, ok=True) for send in sends]


def names(send: Send) -> set[str]:
    """The requests that a command means."""
    return set(send.command.targets.requests)


def class_row(name: str, **fields: Any) -> ClassStatus:
    """A class in which nobody is, unless `fields` say otherwise."""
    plain = {"queued": 0, "running": 0, "held": 0, "oldest_queued_s": 0.0}
    return ClassStatus(class_=name, **(plain | fields))


# Priorities


def test_only_priorities_that_differ_are_sent_one_command_for_each_value() -> None:
    """Requests that have their priority already, or are not listed, are left alone; equal ones go together."""
    wanted = {("r1", 0): 5, ("r2", 0): 5, ("r3", 0): 0, ("r4", 0): -1, ("gone", 0): 9}
    rows = tuple(request(name) for name in ("r1", "r2", "r3", "r4", "other"))
    sends = driver(priorities={"w1": wanted}).sends(0.0, frame(requests=rows))
    assert [(send.verb, send.command.priority, names(send)) for send in sends] == [
        ("prioritize", -1, {"r4"}),
        ("prioritize", 5, {"r1", "r2"}),
    ]


def test_a_priority_is_sent_again_only_if_status_never_shows_it() -> None:
    """No repeat while frames may be older than the command; one when they should have shown it."""
    core = driver(priorities={"w1": {("r1", 0): 5}})
    (send,) = core.sends(0.0, frame(requests=(request("r1"),)))
    assert core.sends(0.1, frame(seq=2, requests=(request("r1"),)), answers=ok([send])) == []
    assert len(core.sends(ECHO_S + 0.1, frame(seq=3, requests=(request("r1"),)))) == 1


def test_a_change_of_mind_is_sent_at_once() -> None:
    """What was told counts, not a row that is older: the way back to the old priority is a command too."""
    core = driver(priorities={"w1": {("r1", 0): 5}})
    (send,) = core.sends(0.0, frame(requests=(request("r1"),)))
    core.core.policy.directives = Directives(priorities={"w1": {("r1", 0): 0}})
    (send,) = core.sends(0.1, frame(seq=2, requests=(request("r1"),)), answers=ok([send]))
    assert send.command.priority == 0


def test_a_class_goes_with_the_priority() -> None:
    """One command moves a request and orders it there; what is there already is left alone."""
    wanted = {("r1", 0): 5, ("r2", 0): 5}
    moves = {("r1", 0): "line", ("r2", 0): "line", ("r3", 0): "line"}
    rows = (request("r1"), request("r2", priority=5, class_="line"), request("r3"))
    core = driver(priorities={"w1": wanted}, moves={"w1": moves})
    sends = core.sends(0.0, frame(requests=rows))
    assert [(send.command.priority, send.command.class_, names(send)) for send in sends] == [
        (0, "line", {"r3"}),
        (5, "line", {"r1"}),
    ]
    assert core.sends(0.1, frame(seq=2, requests=rows), answers=ok(sends)) == []


def test_a_request_that_ended_meanwhile_costs_no_patience() -> None:
    """A 404 is no failure of the worker: the next priority goes out at the next step."""
    core = driver(priorities={"w1": {("r1", 0): 5}})
    (send,) = core.sends(0.0, frame(requests=(request("r1"), request("r2"))))
    core.core.policy.directives = Directives(priorities={"w1": {("r2", 0): 6}})
    answers = [Answer(send, ok=False, code=404)]
    assert len(core.sends(0.05, frame(seq=2, requests=(request("r2"),)), answers=answers)) == 1


def test_a_worker_that_does_not_answer_is_left_alone_for_a_while() -> None:
    """A command that failed for other reasons is tried again with patience."""
    core = driver(priorities={"w1": {("r1", 0): 5}})
    rows = (request("r1"),)
    (send,) = core.sends(0.0, frame(requests=rows))
    failed = [Answer(send, ok=False)]
    assert core.sends(0.05, frame(seq=2, requests=rows), answers=failed) == []
    assert len(core.sends(0.35, frame(seq=3, requests=rows))) == 1


def test_batches_are_bounded() -> None:
    """However much there is to say, a step says at most so much to a worker; the rest follows."""
    rows = tuple(request(f"r{n}") for n in range(3 * MAX_COMMANDS))
    wanted = {(each.request, 0): n + 1 for n, each in enumerate(rows)}
    core = driver(priorities={"w1": wanted})
    sends = core.sends(0.0, frame(requests=rows))
    assert [send.command.priority for send in sends] == list(range(1, MAX_COMMANDS + 1))
    again = core.sends(0.05, frame(seq=2, requests=rows), answers=ok(sends))
    assert [send.command.priority for send in again] == list(range(MAX_COMMANDS + 1, 2 * MAX_COMMANDS + 1))
    many = tuple(request(f"r{n}") for n in range(MAX_TARGETS + 10))
    core = driver(priorities={"w1": {(each.request, 0): 1 for each in many}})
    (send,) = core.sends(0.0, frame(requests=many))
    assert len(names(send)) == MAX_TARGETS


def test_children_of_a_request_share_the_most_urgent_of_their_priorities() -> None:
    """A command means them all: one for each child would undo the other's, at every look, for ever."""
    core = driver(
        priorities={"w1": {("r", 0): 1, ("r", 1): 2, ("r", 2): -7}},
        moves={"w1": {("r", 1): "chat", ("r", 0): "batch"}},
    )
    (send,) = core.sends(0.0, frame(requests=children("r")))
    assert (send.command.priority, send.command.class_, names(send)) == (1, "batch", {"r"}), "2 is not listed"
    rows = children("r", priority=1, class_="batch")
    assert core.sends(ECHO_S + 0.1, frame(seq=2, requests=rows), answers=ok([send])) == []


def test_andes_does_not_flap_where_one_child_of_a_request_runs_and_another_waits() -> None:
    """It chooses among children; what comes of it must be the same whichever of them it chose."""
    core, priority, sent = Driver(load("andes")), 0, 0
    answers: list[Answer] = []
    for step in range(200):
        waits = request("r", child=1, state="queued", priority=priority)
        others = (request(f"o{n}", state="queued", arrived_at=-9.0) for n in range(8))
        rows = (request("r", output_tokens=step // 2, priority=priority), waits, *others)
        slots = Slots(active=2, total=2, running=1, held=0)
        heard = frame(
            "w1", "01A", step + 1, row("a", running=1, queued=9), requests=rows, queued=9, slots=slots
        )
        sends = core.sends(
            0.05 * step, replace(heard, kv_blocks=KvBlocks(total=120, used=20, held=0)), answers=answers
        )
        answers = ok(sends)
        for send in sends:
            if send.verb == "prioritize" and "r" in names(send):
                priority, sent = send.command.priority, sent + 1
    assert sent <= 2


# Holds


def children(name: str, *, states: str = "rr", **fields: Any) -> tuple[Any, ...]:
    """The children of a request, in order: `r` runs, `q` waits, `h` we hold."""
    kinds: dict[str, dict[str, Any]] = {
        "r": {},
        "q": {"state": "queued"},
        "h": {"state": "held", "kv": "kept", "held_by": ("controller",)},
    }
    return tuple(request(name, child=n, **kinds[state], **fields) for n, state in enumerate(states))


@pytest.mark.parametrize(("states", "verbs"), [("rr", []), ("rq", []), ("hh", ["continue"])])
def test_a_request_is_not_held_for_one_of_its_children(states: str, verbs: list[str]) -> None:
    """Nor would it be left held: the other child is to run, and both are held or neither is."""
    core = driver(holds={"w1": {("r", 0): "keep"}})
    sends = core.sends(0.0, frame(requests=children("r", states=states)))
    assert [send.verb for send in sends] == verbs


def test_a_request_whose_children_are_all_to_be_held_is_held_once() -> None:
    """One command, and nothing more while it is in force; memory is freed only if nobody wants to keep it."""
    core = driver(holds={"w1": {("r", 0): "drop", ("r", 1): "keep"}})
    (send,) = core.sends(0.0, frame(requests=children("r")))
    assert (send.verb, send.command.kv, send.command.targets.requests) == ("preempt", "keep", ("r",))
    assert core.sends(0.1, frame(seq=2, requests=children("r", states="hh")), answers=ok([send])) == []


def test_a_request_goes_on_being_held_when_one_of_its_children_has_ended() -> None:
    """Who is not listed any more has no say."""
    core = driver(holds={"w1": {("r", 0): "keep"}})
    (send,) = core.sends(0.0, frame(requests=(request("r"),)))
    assert (send.verb, names(send)) == ("preempt", {"r"})


def held(name: str, *roles: str, **fields: Any) -> Any:
    """A request that these roles hold."""
    return request(name, state="held", kv="kept", held_by=roles, **fields)


def test_holds_are_put_with_a_lease_and_renewed() -> None:
    """A hold lasts as long as the policy wants it, and never longer than a lease without us."""
    core = driver(holds={"w1": {("r1", 0): "keep"}})
    (send,) = core.sends(0.0, frame(requests=(request("r1"),)))
    assert (send.verb, send.command.kv, send.command.lease_s) == ("preempt", "keep", HOLD_LEASE_S)
    times, answers = [], ok([send])
    for tick in range(1, 201):
        sends = core.sends(
            tick * 0.05, frame(seq=tick, requests=(held("r1", "controller"),)), answers=answers
        )
        times += [tick * 0.05 for _ in sends]
        answers = ok(sends)
    assert len(times) == pytest.approx(10.0 / RENEW_S, abs=1)
    assert RENEW_S + ECHO_S < HOLD_LEASE_S, "one renewal may be lost"


def test_what_the_policy_does_not_want_held_goes_on() -> None:
    """A hold of the controller that nobody wants, be it an earlier leader's, is ended; those of others are not."""
    rows = (held("r1", "controller"), held("r2", "operator"), held("r3", "engine"), request("r4"))
    (send,) = driver().sends(0.0, frame(requests=rows))
    assert (send.verb, names(send)) == ("continue", {"r1"})


def test_an_inherited_hold_that_is_still_wanted_is_renewed_at_once() -> None:
    """A new leader does not know how long its predecessor's lease lasts."""
    core = driver(holds={"w1": {("r1", 0): "keep"}})
    (send,) = core.sends(0.0, frame(requests=(held("r1", "controller"),)))
    assert (send.verb, names(send)) == ("preempt", {"r1"})


def test_keep_becomes_drop() -> None:
    """A policy that wants the memory too says so once."""
    core = driver(holds={"w1": {("r1", 0): "keep"}})
    (send,) = core.sends(0.0, frame(requests=(request("r1"),)))
    core.core.policy.directives = Directives(holds={"w1": {("r1", 0): "drop"}})
    rows = (held("r1", "controller"),)
    (send,) = core.sends(0.1, frame(seq=2, requests=rows), answers=ok([send]))
    assert (send.verb, send.command.kv) == ("preempt", "drop")
    assert core.sends(0.2, frame(seq=3, requests=rows), answers=ok([send])) == []


def test_nobody_is_held_by_a_standby() -> None:
    """A controller without the lease decides nothing."""
    core = driver(holds={"w1": {("r1", 0): "keep"}})
    core.epoch = None
    assert core.step(0.0, frame(requests=(request("r1"),))) == []


# Caps


def test_caps_go_out_once_and_are_lifted_when_no_longer_wanted() -> None:
    """Equal caps share a command; one that the policy drops is sent as null."""
    cap = Cap(max_running=2)
    core = driver(caps={"w1": {("class", "batch"): cap, ("tenant", "acme"): cap}})
    (send,) = core.sends(0.0, frame(classes=(class_row("batch"),)))
    assert send.verb == "limit"
    assert (send.command.max_running, send.command.max_queued) == (2, None)
    assert (send.command.targets.tenants, send.command.targets.classes) == (("acme",), ("batch",))
    assert core.sends(0.1, frame(seq=2, full=False), answers=ok([send])) == []
    core.core.policy.directives = Directives(caps={"w1": {("tenant", "acme"): cap}})
    (send,) = core.sends(0.2, frame(seq=3, full=False))
    assert (send.command.targets.classes, send.command.max_running) == (("batch",), None)


def test_a_class_that_was_taken_out_of_the_table_ends_no_other_cap() -> None:
    """A cap meets a worker that has the class no more: that is no failure after which all caps are told anew."""
    cap, other = Cap(max_running=2), Cap(max_running=3)
    core = driver(caps={"w1": {("class", "batch"): cap, ("class", "default"): other}})
    both = (class_row("batch"), class_row("default"))
    sends = core.sends(0.0, frame(classes=both))
    about = {each.command.targets.classes: each for each in sends}
    answers = [
        Answer(about["batch",], ok=False, code=404),
        Answer(about["default",], ok=True),
    ]
    shown = (both[0], replace(both[1], max_running=3))
    for number in range(2, 80):
        news = core.sends(number / 10, frame(seq=number, full=False, classes=shown), answers=answers)
        assert all(each.command.targets.classes == ("batch",) for each in news)
        answers = [Answer(each, ok=False, code=404) for each in news]
    assert core.sends(20.0, frame(seq=80, classes=shown[1:]), answers=answers) == []


def test_a_class_that_a_worker_does_not_have_is_capped_when_it_comes() -> None:
    """Nothing is said about it before: the worker would refuse it."""
    core = driver(caps={"w1": {("class", "batch"): Cap(max_prefill_tokens_per_step=64)}})
    (lift,) = core.sends(0.0, frame(classes=(class_row("default"),)))
    assert lift.command.targets.classes == ("default",), "whom an earlier leader may have capped"
    batch = (class_row("batch"),)
    (send,) = core.sends(0.1, frame(seq=2, full=False, classes=batch), answers=ok([lift]))
    assert (send.verb, send.command.targets.classes) == ("limit", ("batch",))
    assert core.sends(0.2, frame(seq=3, classes=(class_row("default"),)), answers=ok([send])) == []
    (again,) = core.sends(5.0, frame(seq=4, full=False, classes=(class_row("batch"),)))
    assert again.command.targets.classes == ("batch",)


def test_a_cap_of_a_class_that_was_away_is_lifted_when_it_comes_back() -> None:
    """The worker has kept it meanwhile; the policy wants it no more."""
    core = driver(caps={"w1": {("class", "batch"): Cap(max_running=2)}})
    both = (class_row("default"), class_row("batch"))
    sends = core.sends(0.0, frame(classes=both))
    assert core.sends(0.1, frame(seq=2, classes=both[:1]), answers=ok(sends)) == []
    core.core.policy.directives = Directives()
    assert core.sends(5.0, frame(seq=3, classes=both[:1])) == []
    (lift,) = core.sends(9.0, frame(seq=4, classes=both))
    assert (lift.command.targets.classes, lift.command.max_running) == (("batch",), None)
    assert core.sends(9.1, frame(seq=5, classes=both), answers=ok([lift])) == []


def test_a_cap_that_status_shows_gone_is_put_again() -> None:
    """A worker that gave us up for a while has lifted our caps; its row says so."""
    core = driver(caps={"w1": {("tenant", "acme"): Cap(max_running=2)}})
    (send,) = core.sends(0.0, frame("w1", "01A", 1, row("acme")))
    good = row("acme", max_running=2)
    assert core.sends(ECHO_S + 0.1, frame("w1", "01A", 2, good), answers=ok([send])) == []
    assert len(core.sends(ECHO_S + 0.2, frame("w1", "01A", 3, row("acme")))) == 1


def test_caps_of_an_earlier_leader_are_lifted() -> None:
    """Whoever takes over lifts what is in force and neither it nor a table wants; once."""
    rows = (row("acme", max_running=2), row("other", max_running=3), row("free"))
    classes = (ClassStatus(class_="batch", queued=0, running=0, held=0, oldest_queued_s=0.0, max_running=1),)
    core = driver()
    core.tenants = {"other": TenantPolicy(max_running=3)}
    sends = core.sends(0.0, frame("w1", "01A", 1, *rows, classes=classes))
    (send,) = [each for each in sends if each.verb == "limit"]
    assert (send.command.targets.tenants, send.command.targets.classes) == (("acme",), ("batch",))
    later = core.sends(5.0, frame("w1", "01A", 2, *rows, classes=classes), answers=ok(sends))
    assert [each.verb for each in later if each.verb == "limit"] == []


def test_a_cap_of_an_earlier_leader_that_could_not_be_lifted_is_lifted_later() -> None:
    """Once is not enough where the worker refused: it is still capped, and nobody else knows."""
    core = driver()
    (send,) = core.sends(0.0, frame("w1", "01A", 1, row("acme", max_running=2)))
    capped = row("acme", max_running=2)
    refused = [Answer(send, ok=False, code=429)]
    assert core.sends(0.05, frame("w1", "01A", 2, capped), answers=refused) == []
    (again,) = core.sends(5.0, frame("w1", "01A", 3, capped))
    assert (again.verb, again.command.targets.tenants, again.command.max_running) == (
        "limit",
        ("acme",),
        None,
    )


def test_caps_of_an_earlier_leader_are_lifted_though_a_delta_comes_first() -> None:
    """Who starts in between hears what changes before it hears everything; what it hears then counts as well."""
    idle, batch = (
        ClassStatus(class_=name, queued=0, running=0, held=0, oldest_queued_s=0.0, max_running=most)
        for name, most in (("default", None), ("batch", 1))
    )
    core = driver()
    early = core.sends(0.0, frame("w1", "01A", 1, full=False, classes=(idle,)))
    sends = core.sends(0.05, frame("w1", "01A", 2, classes=(idle, batch)), answers=ok(early))
    assert ["batch" in each.command.targets.classes for each in sends if each.verb == "limit"] == [True]


# All of it


wishes = st.dictionaries(
    st.sampled_from(["r1", "r2", "r3"]),
    st.tuples(st.integers(-2, 2), st.sampled_from(["run", "keep", "drop"])),
)


class Obedient:
    """A worker that applies what reaches it: three requests, their priorities and our holds."""

    def __init__(self) -> None:
        self.rows = {name: request(name) for name in ("r1", "r2", "r3")}

    def apply(self, send: Send) -> None:
        """As a worker does, without leases."""
        for name in names(send):
            old = self.rows[name]
            if send.verb == "prioritize":
                self.rows[name] = replace(old, priority=send.command.priority)
            elif send.verb == "continue":
                self.rows[name] = request(name, priority=old.priority)
            else:
                dropped = "dropped" in (old.kv, "dropped" if send.command.kv == "drop" else "")
                self.rows[name] = held(name, "controller", priority=old.priority)
                self.rows[name] = replace(self.rows[name], kv="dropped" if dropped else "kept")


@settings(max_examples=60, deadline=None)
@given(st.lists(wishes, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_what_is_wanted_comes_to_be_over_a_lossy_transport(wanted: list, random) -> None:
    """Frames, commands and answers are lost at random; once they pass again, the worker has what is wanted."""
    core, worker = driver(), Obedient()
    now, seq, answers = 0.0, 0, []
    for number, wish in enumerate([*wanted, wanted[-1]]):
        core.core.policy.directives = Directives(
            priorities={"w1": {(name, 0): priority for name, (priority, _) in wish.items()}},
            holds={"w1": {(name, 0): kv for name, (_, kv) in wish.items() if kv != "run"}},
        )
        lossy = number < len(wanted)
        for _ in range(20 if lossy else 160):
            now, seq = now + 0.05, seq + 1
            heard = (
                []
                if lossy and random.random() < 0.4 and seq > 1
                else [frame(seq=seq, requests=tuple(worker.rows.values()))]
            )
            sends = core.sends(now, *heard, answers=answers)
            answers = []
            for send in sends:
                assert send.command.epoch == EPOCH
                if not (lossy and random.random() < 0.4):
                    worker.apply(send)
                    if not (lossy and random.random() < 0.4):
                        answers.append(Answer(send, ok=True))
    for name, each in worker.rows.items():
        priority, kv = wanted[-1].get(name, (each.priority, "run"))
        assert each.priority == priority
        assert (each.state == "held") == (kv != "run")
        assert kv != "drop" or each.kv == "dropped"
