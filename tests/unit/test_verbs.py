"""Commands on the core: what each verb does, every refusal that the core can give, and repeated ids."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import pytest
from msgspec.structs import replace

from coxswain.schemas import commands as c
from coxswain.schemas import events as ev
from coxswain.schemas.commands import COMMANDS, Reply, Targets
from coxswain.schemas.errors import Code
from coxswain.schemas.policy import ClassPolicy, Prices, TenantPolicy, TenantRank
from coxswain.schemas.subjects import CONTROLLER, OPERATOR
from coxswain.service.scheduler import answered, tenants
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.states import State
from coxswain.service.scheduler.verbs import Commands
from tests.support.fake_engine import FakeEngine, picture

INCARNATION = "01INCARNATION"
EPOCH = (1.0, 5)


class Steered:
    """An engine and its commands, in one line each."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.commands = Commands(self.engine.core, "w1", INCARNATION)
        self._ids = 0

    def __call__(self, verb: str, *targets: Record | str, role: str = OPERATOR, **fields: Any) -> Reply:
        """Apply a command; `targets` are requests, unless `to` gives the whole of them."""
        ignored = fields.pop("ignored", ())
        self._ids += 1
        fields.setdefault("id", f"id-{self._ids}")
        names = tuple(target if isinstance(target, str) else target.request for target in targets)
        to = fields.pop("to", Targets(requests=names) if names else None)
        if to is not None:
            fields["targets"] = to
        return self.commands.apply(self.engine.now, role, verb, COMMANDS[verb](**fields), ignored)

    def controller(self, verb: str, *targets: Record | str, **fields: Any) -> Reply:
        """The same as the leader would send it."""
        return self(verb, *targets, role=CONTROLLER, **({"epoch": EPOCH} | fields))


@pytest.fixture
def steered() -> Steered:
    """An engine whose leader was heard, with nothing in it."""
    steered = Steered()
    steered.engine.lead(*EPOCH)
    return steered


# Verbs


def test_prioritize_moves_what_waits_and_what_runs(steered: Steered) -> None:
    """Priority and class change for queued and running requests alike, and the engine is told."""
    engine = steered.engine
    steered("configure", classes={"gold": ClassPolicy(position=-1)})
    running = engine.submit()
    engine.admit()
    first, second = engine.submit(), engine.submit()
    reply = steered("prioritize", second, running, priority=-3, class_="gold")
    assert (reply.outcome, reply.counts, reply.results) == ("applied", {"applied": 2}, ())
    assert list(engine.core.queue.walk()) == [second, first]
    assert (running.priority, running.class_, running.payload.place) == (-3, "gold", 0)
    again = steered("prioritize", second, priority=-3)
    assert (again.outcome, again.counts) == ("applied", {"unchanged": 1})
    engine.check()


def test_preempt_and_continue(steered: Steered) -> None:
    """A hold takes effect from the next step, says what was in flight, and ends on continue."""
    engine = steered.engine
    record = engine.submit()
    engine.admit()
    engine.flying[record] = 2
    engine.core.step = 41
    reply = steered("preempt", record, issuer="me")
    assert (reply.step, reply.worker, reply.incarnation, reply.worker_now) == (
        42,
        "w1",
        INCARNATION,
        engine.now,
    )
    assert [(each.request, each.child, each.in_flight_tokens) for each in reply.results] == [
        (record.request, 0, 2)
    ]
    assert record.state is State.HELD_KEPT
    assert steered("preempt", record).counts == {"unchanged": 1}
    assert steered("continue", record).counts == {"applied": 1}
    assert record.state is State.RUNNING
    assert steered("continue", record).results[0].detail == "not held"
    engine.check()


def test_controllers_continue_says_who_holds_on(steered: Steered) -> None:
    """A controller ends its own hold only, and hears whose hold is left or that it had none."""
    record = steered.engine.submit()
    steered("preempt", record)
    assert steered.controller("continue", record).results[0].detail == "not held by controller"
    steered.controller("preempt", record, lease_s=5.0)
    assert steered.controller("continue", record).results[0].detail == "still held by operator"
    assert record.holds.keys() == {OPERATOR}


def test_operators_continue_ends_the_controllers_hold_too(steered: Steered) -> None:
    """An operator who continues a request sees it run, whoever held it."""
    record = steered.engine.submit()
    steered.controller("preempt", record, lease_s=50.0)
    steered("preempt", record)
    reply = steered("continue", record)
    assert (reply.counts, reply.results) == ({"applied": 1}, ())
    assert record.state is State.QUEUED


def test_abort_ends_requests_and_tells_clients(steered: Steered) -> None:
    """Aborted requests are gone at once, wherever they were, and their clients are told."""
    engine = steered.engine
    running, held, waiting = engine.submit(), engine.submit(), engine.submit()
    engine.admit()
    steered("preempt", held)
    reply = steered("abort", to=Targets(all=True))
    assert reply.counts == {"applied": 3}
    assert engine.told == [running.id, held.id, waiting.id]
    assert not engine.core.roster.records
    engine.check()


def test_rank_sets_bases_weights_and_prices(steered: Steered) -> None:
    """A rank reorders tenants, settles at the old weight first, and stores tenants never seen."""
    engine = steered.engine
    first, second = engine.submit("a"), engine.submit("b")
    running = engine.submit("c")
    while running.state is not State.RUNNING:
        engine.admit()
    engine.deliver(running, 4)
    third, fourth = engine.submit("a"), engine.submit("b")
    ranks = {
        "a": TenantRank(base=50),
        "b": TenantRank(base=-50),
        "c": TenantRank(weight=2.0),
        "z": TenantRank(),
    }
    reply = steered("rank", incarnation=INCARNATION, tenants=ranks, prices=Prices(output=7))
    assert (reply.outcome, reply.counts) == ("applied", {})
    assert list(engine.core.queue.walk()) == [fourth, third]
    assert running.account.charged == running.prompt_tokens + 4 * 2
    assert (running.account.weight, engine.core.tenants.prices.output) == (2, 7)
    assert not engine.core.tenants.accounts["z"].seen
    assert {first.state, second.state} == {State.RUNNING}
    engine.check()


def test_configure_echoes_what_it_ignored(steered: Steered) -> None:
    """Tables are in force at once; fields that nobody acts on are passed on in the reply."""
    tables = {"classes": {"gold": ClassPolicy(slo_s=3.0)}, "tenants": {"a": TenantPolicy(class_="gold")}}
    reply = steered("configure", **tables, ignored=("classes.gold.borrow", "typo"))
    assert (reply.outcome, reply.ignored) == ("applied", ("classes.gold.borrow", "typo"))
    assert steered.engine.submit("a").class_ == "gold"


# Targets


def test_targets_are_a_union_resolved_now(steered: Steered) -> None:
    """Requests, tenants and classes add up, no request twice, and what arrives later is not meant."""
    engine = steered.engine
    steered("configure", classes={"gold": ClassPolicy()}, tenants={"g": TenantPolicy(class_="gold")})
    mine, theirs, golden, free = (engine.submit(tenant) for tenant in ("a", "b", "g", "c"))
    to = Targets(requests=(mine.request, mine.request), tenants=("a", "b"), classes=("gold",))
    assert steered("preempt", to=to).counts == {"applied": 3}
    late = engine.submit("a")
    assert [bool(each.holds) for each in (mine, theirs, golden, free, late)] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_command_covers_all_children_and_takes_the_bodys_id(steered: Steered) -> None:
    """One id means every child of a client's request, also as the response's body shows it."""
    children = [steered.engine.submit(id=f"{i}_x", request="x") for i in range(3)]
    assert steered("preempt", "chatcmpl-x").counts == {"applied": 3}
    assert all(child.holds for child in children)


def test_tenants_without_requests_are_never_missing(steered: Steered) -> None:
    """A tenant that nobody knows is no error: nothing is there to be changed."""
    reply = steered("preempt", to=Targets(tenants=("nobody",)))
    assert (reply.outcome, reply.counts, reply.code) == ("applied", {}, None)


def test_some_failing_is_partial(steered: Steered) -> None:
    """What can be done is done, and the reply names what could not and why."""
    record, stuck = steered.engine.submit(), steered.engine.submit()
    stuck.payload.obstacle = "its KV is being loaded"
    reply = steered("preempt", record, stuck, "nobody")
    assert (reply.outcome, reply.code) == ("partial", None)
    assert reply.counts == {"applied": 1, "not_possible": 1, "not_found": 1}
    assert {(each.request, each.outcome) for each in reply.results} == {
        ("nobody", "not_found"),
        (stuck.request, "not_possible"),
    }
    assert not stuck.holds


def test_ten_thousand_targets_in_bounded_time(steered: Steered) -> None:
    """10,000 ids are applied in one call, in well under the second that a blocked engine would be noticed."""
    engine = steered.engine
    records = [engine.submit(f"t{i % 100}") for i in range(c.MAX_TARGETS)]
    began = perf_counter()
    reply = steered("preempt", *records)
    took_s = perf_counter() - began
    assert reply.counts == {"applied": 10_000}
    assert not engine.core.queue
    assert took_s < 5  # 0.2 s where this was written; quadratic work would take minutes
    engine.check()


def test_results_are_cut_at_a_thousand(steered: Steered) -> None:
    """More results than a reply may carry are counted, not sent."""
    record = steered.engine.submit()
    reply = steered("preempt", record, *(f"missing{i}" for i in range(1_500)))
    assert (len(reply.results), reply.results_omitted) == (c.MAX_RESULTS, 500)
    assert reply.counts == {"not_found": 1_500, "applied": 1}


# Refusals


def stale(steered: Steered) -> Reply:
    """A command of a leader that was deposed."""
    return steered.controller("abort", to=Targets(all=True), epoch=(1.0, 4))


REFUSALS: dict[str, tuple[Code, str, Callable[[Steered], Reply]]] = {
    "nothing to change": (400, "needs `priority`", lambda s: s("prioritize", "r1")),
    "controller without epoch": (400, "epoch", lambda s: s("abort", "r1", role=CONTROLLER)),
    "controller without lease": (400, "lease_s", lambda s: s.controller("preempt", "r1")),
    "reserved class": (400, "'all' is reserved", lambda s: s("configure", classes={"all": ClassPolicy()})),
    "impossible range": (
        400, "priority_min",
        lambda s: s("configure", tenants={"a": TenantPolicy(priority_min=2, priority_max=1)}),
    ),
    "no such request": (404, "nobody", lambda s: s("continue", "nobody")),
    "no such requests": (404, "and 2 more", lambda s: s("abort", *"vwxyz")),
    "no such class of targets": (404, "gold", lambda s: s("abort", to=Targets(classes=("gold",)))),
    "no such class to go to": (404, "known are default", lambda s: s("prioritize", "r1", class_="gold")),
    "older epoch": (409, "another controller leads", stale),
    "older bucket": (409, "older", lambda s: s.controller("abort", "r1", epoch=(0.5, 99))),
    "other incarnation": (409, "incarnation", lambda s: s("rank", incarnation="01OTHER")),
    "too late": (410, "expired 0.500 s ago", lambda s: s("abort", "r1", expires_at=s.engine.now - 0.5)),
    "not possible": (422, "its KV is being loaded", lambda s: s("preempt", "stuck")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_says_why_and_changes_nothing(steered: Steered, name: str) -> None:
    """Each refusal has its code and a text that names the cause; nothing else changes, and the log has it."""
    code, text, refuse = REFUSALS[name]
    steered.engine.submit()
    steered.engine.submit(request="stuck").payload.obstacle = "its KV is being loaded"
    before = picture(steered.engine.core)
    reply = refuse(steered)
    assert (reply.outcome, reply.code) == ("rejected", code)
    assert text in str(reply.error)
    assert picture(steered.engine.core) == before
    assert steered.commands.stats(0).rejected_total == {str(int(code)): 1}
    (counts,) = steered.commands.stats(0).outcomes_total.values()
    assert counts == {str(int(code)): 1}
    assert steered.commands.stats(0).applied_total == 0
    told = steered.engine.seen(ev.CommandSeen)
    assert [each["code"] for each in told] == ([] if "incarnation" in text else [code])


def test_a_rank_leaves_out_tenants_for_which_no_account_is_left(
    steered: Steered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others count, as do prices, before and after the shared account exists; the reply names who was left out."""
    monkeypatch.setattr(tenants, "MAX_TENANTS", 2)
    core = steered.engine.core
    rows = {name: TenantRank(base=5.0) for name in "abc"}
    for prices in (Prices(output=3.0), Prices(output=4.0)):
        reply = steered("rank", incarnation=INCARNATION, tenants=rows, prices=prices)
        assert (reply.outcome, reply.counts) == ("partial", {"not_possible": 1})
        assert [(row.request, row.outcome) for row in reply.results] == [("c", "not_possible")]
        assert core.tenants.prices == prices
        assert {name: account.base for name, account in core.tenants.accounts.items() if account.base} == {
            "a": 5.0, "b": 5.0,
        }  # fmt: skip
        steered.engine.submit("c")
    reply = steered("rank", incarnation=INCARNATION, tenants={"a": TenantRank(base=6.0)})
    assert (reply.outcome, core.tenants.accounts["a"].base) == ("applied", 6.0)
    assert set(core.tenants.accounts) == {"a", "b", tenants.OTHER}
    steered.engine.check()


def test_no_controller_is_obeyed_before_a_leader_was_heard() -> None:
    """A restarted worker takes no controller's command until it has heard `lead`; operators are served."""
    steered = Steered()
    record = steered.engine.submit()
    assert steered.controller("preempt", record, lease_s=1.0).code == Code.STALE
    assert steered("preempt", record).outcome == "applied"
    steered.engine.lead(*EPOCH)
    assert steered.controller("preempt", record, lease_s=1.0).outcome == "applied"


def test_epochs_only_rise(steered: Steered) -> None:
    """A newer epoch is obeyed at once and fences off the older; buckets come before revisions."""
    record = steered.engine.submit()
    for epoch, code in (
        ((1.0, 6), None),
        ((1.0, 5), 409),
        ((2.0, 1), None),
        ((1.0, 99), 409),
        ((2.0, 1), None),
    ):
        assert steered.controller("continue", record, epoch=epoch).code == code
    assert steered.engine.core.epoch == (2.0, 1)


def test_a_leader_known_by_a_command_alone_has_no_name_until_its_heartbeat(steered: Steered) -> None:
    """Its predecessor's name and policy are not said of it; then it is told who leads."""
    core = steered.engine.core
    old = core.leader
    assert old is not None
    steered.controller("continue", steered.engine.submit(), epoch=(2.0, 1))
    assert (core.epoch, core.leader) == ((2.0, 1), None)
    core.heard(steered.engine.now, replace(old, epoch=(2.0, 1), controller="next"))
    reasons = [each["reason"] for each in steered.engine.seen(ev.LeaderChanged)]
    assert [reason.partition(" leads")[0] for reason in reasons] == [
        old.controller,
        "first command of its epoch",
        "next",
    ]


def test_commands_keep_a_silent_leader_alive(steered: Steered) -> None:
    """A leader whose heartbeats are lost but whose commands come is not silent."""
    record = steered.engine.submit()
    for _ in range(5):
        steered.engine.wait(4)
        assert steered.controller("preempt", record, lease_s=60.0).outcome == "applied"
    assert CONTROLLER in record.holds
    steered.engine.wait(5)
    assert not record.holds


# Repeated ids


def test_same_id_is_applied_once_and_answered_again(steered: Steered) -> None:
    """A repeat within the horizon gets the very same reply and does nothing."""
    record = steered.engine.submit()
    first = steered("preempt", record, id="once")
    steered("continue", record)
    steered.engine.wait(59)
    assert steered("preempt", record, id="once") is first
    assert not record.holds
    assert steered.commands.stats(0).applied_total == 2


@pytest.mark.parametrize(("verb", "role"), [("continue", "operator"), ("preempt", "engine")])
def test_same_id_for_something_else_is_refused(steered: Steered, verb: str, role: str) -> None:
    """An id that was used says nothing of another verb or role: it is not answered as if it had been applied."""
    record = steered.engine.submit()
    steered("preempt", record, id="once")
    reply = steered(verb, record, id="once", role=role)
    assert (reply.code, "used for `preempt` by operator" in reply.error) == (Code.MALFORMED, True)
    assert record.holds


def test_id_is_forgotten_after_its_horizon(steered: Steered) -> None:
    """60 s after a command without deadline its id is as good as new."""
    record = steered.engine.submit()
    steered("preempt", record, id="once")
    steered("continue", record)
    steered.engine.wait(60.001)
    assert steered("preempt", record, id="once").counts == {"applied": 1}
    assert record.holds


def test_repeat_at_the_very_deadline_is_still_a_repeat(steered: Steered) -> None:
    """There is no instant at which a command is neither remembered nor expired."""
    record = steered.engine.submit()
    deadline = steered.engine.now + 2
    first = steered("preempt", record, id="once", expires_at=deadline)
    steered("continue", record)
    steered.engine.now = deadline
    assert steered("preempt", record, id="once", expires_at=deadline) is first
    steered.engine.wait(0.001)
    assert steered("preempt", record, id="once", expires_at=deadline).code == Code.EXPIRED


def test_refused_id_may_be_used_again(steered: Steered) -> None:
    """A refusal is not remembered: the same command may succeed later."""
    assert steered("preempt", "x", id="again").code == Code.NOT_FOUND
    record = steered.engine.submit(request="x")
    assert steered("preempt", record, id="again").outcome == "applied"


def test_remembered_ids_are_bounded(steered: Steered, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many commands come within a minute, the oldest ids give way."""
    monkeypatch.setattr(answered, "MAX_REMEMBERED", 100)
    steered.engine.submit()
    for i in range(1_000):
        steered("continue", "r1", id=f"c{i}")
    assert len(steered.commands._answered._known) <= 101
    total = steered.commands.stats(0).applied_total
    steered("continue", "r1", id="c999")
    assert steered.commands.stats(0).applied_total == total
    steered("continue", "r1", id="c1")
    assert steered.commands.stats(0).applied_total == total + 1


def test_long_replies_cost_no_id_its_memory(steered: Steered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a bound the oldest replies lose their rows, and say how many; still nothing is done twice."""
    monkeypatch.setattr(answered, "MAX_REMEMBERED_RESULTS", 100)
    record = steered.engine.submit()
    names = [f"missing{i}" for i in range(29)]
    steered("preempt", record, id="first")
    steered("continue", record)
    for i in range(50):
        steered("prioritize", record, *names, priority=i, id=f"long{i}")
    total = steered.commands.stats(0).applied_total
    assert (steered("preempt", record, id="first").counts, record.holds) == ({"applied": 1}, {})
    again = [steered("prioritize", record, *names, priority=0, id=f"long{i}") for i in (46, 47)]
    assert (steered.commands.stats(0).applied_total, record.priority) == (total, 49)
    assert [(len(reply.results), reply.results_omitted) for reply in again] == [(0, 29), (29, 0)]
    assert [reply.counts for reply in again] == [{"applied": 1, "not_found": 29}] * 2
    steered("prioritize", record, *(f"missing{i}" for i in range(150)), priority=0, id="too long")
    assert steered.commands._answered._size == 0
    assert steered("prioritize", record, id="too long", priority=1).results_omitted == 150
    steered.engine.wait(60.001)
    steered("prioritize", record, priority=2)
    assert len(steered.commands._answered._known) == 1


def test_ignored_fields_in_remembered_replies_are_bounded(
    steered: Steered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a sender wrote beside the contract is remembered no longer than results are."""
    monkeypatch.setattr(answered, "MAX_REMEMBERED_RESULTS", 100)
    record = steered.engine.submit()
    unknown = tuple(f"field{i}" for i in range(40))
    for i in range(10):
        steered("prioritize", record, priority=i, id=f"c{i}", ignored=unknown)
    again = [steered("prioritize", record, priority=i, id=f"c{i}") for i in range(10)]
    assert ([len(reply.ignored) for reply in again], record.priority) == ([0] * 8 + [40, 40], 9)


def test_command_that_is_applied_is_told(steered: Steered) -> None:
    """The log has who asked what and what became of it; ranks, many a second, stay out of it."""
    steered("preempt", steered.engine.submit(), issuer="me", id="x1")
    steered("rank", incarnation=INCARNATION)
    (told,) = steered.engine.seen(ev.CommandSeen)
    assert told == {
        "command": "x1", "verb": "preempt", "role": OPERATOR, "issuer": "me", "outcome": "applied",
        "counts": {"applied": 1}, "reason": "",
    }  # fmt: skip


def test_reason_of_an_abort_is_told(steered: Steered) -> None:
    """Why somebody ended requests stands in the log, also where it was refused."""
    steered("abort", steered.engine.submit(), reason="runaway prompt")
    steered("abort", "nobody", reason="typing error")
    told = steered.engine.seen(ev.CommandSeen)
    assert [(each["outcome"], each["reason"]) for each in told] == [
        ("applied", "runaway prompt"),
        ("rejected", "typing error"),
    ]
