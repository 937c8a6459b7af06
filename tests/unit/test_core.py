"""The steering core: what it counts, charges and decides, and that no order of events breaks it."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coxswain.schemas import events as ev
from coxswain.schemas.policy import ClassPolicy, Prices, TenantPolicy
from coxswain.service.scheduler.record import MAX_STORY, Record
from coxswain.service.scheduler.states import State
from tests.support.fake_engine import FakeEngine, picture
from tests.support.happenings import OPERATIONS, act, rank


def positions(fields: dict[str, Any]) -> int:
    """What the device computed for a request, by what its `finished` event says."""
    generated = fields["output_tokens"] - fields["generations"]
    spared = fields["uncomputed_input_tokens"]
    return int(
        fields["uncached_input_tokens"] - spared + fields["recomputed_tokens"] + fields["discarded_tokens"]
        + generated
    )  # fmt: skip


# Any order of events


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(OPERATIONS, min_size=60, max_size=60),
    st.sampled_from([(1_000, 10**9), (2, 60), (0, 40)]),
)
def test_no_order_of_events_breaks_the_core(
    operations: list[tuple[int, int, int]], room: tuple[int, int]
) -> None:
    """Whatever happens in whatever order, in much room or little, invariants hold; charges and recompute are exact.

    Charges: what was delivered at the prices and weights of then, and what is expected beyond it at those of now.
    """
    spare, blocks = room
    engine = FakeEngine(slots=3, spare=spare, blocks=blocks)
    core = engine.core
    lifts: dict[str, float] = {}
    for operation in operations:
        act(engine, *operation)
        engine.check()
        engine.core.ledger.settle_all()
        for name, account in engine.core.tenants.accounts.items():
            assert account.charged - account.ahead == pytest.approx(engine.owed[name], abs=1e-6)
            owed = account.meter.owed() * core.tenants.prices.output / account.weight
            assert account.ahead == pytest.approx(owed, abs=1e-6)
            assert account.lift >= lifts.get(name, 0.0)
            lifts[name] = account.lift
        for record in engine.core.roster.records.values():
            assert record.recomputed_tokens == engine.recomputed[record]
    for record in list(engine.core.roster.records.values()):
        engine.finish(record)
    engine.check()
    core.ledger.settle_all()
    assert not any(account.ahead or account.meter.expected for account in core.tenants.accounts.values())
    assert not core.roster.records
    assert not core.roster.held
    assert core.deadline() is None or core.leader is not None
    assert core.ledger.recomputed_total == sum(engine.recomputed.values())
    accounts = core.tenants.accounts.values()
    assert sum(account.finished for account in accounts) == engine.made
    ended = {record: fields for record, kind, fields in engine.events if kind is ev.Finished}
    assert {record: positions(fields) for record, fields in ended.items()} == {
        record: engine.computed[record] for record in ended
    }
    for total in ("uncomputed_input_tokens", "discarded_tokens", "restored_tokens", "reloaded_tokens"):
        assert sum(fields[total] for fields in ended.values()) == sum(
            getattr(account, total) for account in accounts
        )


# Charging


def test_charge_is_tokens_times_price_over_weight_of_the_moment() -> None:
    """Weights and prices count for what comes after them: nothing is charged again, nothing is forgiven."""
    engine = FakeEngine()
    record = engine.submit(prompt=10)
    engine.admit(cached=4)
    account = record.account
    assert account.charged == 6  # input 1, cached 0
    engine.deliver(record, 5)
    rank(engine, "a", weight=4.0)
    assert account.charged == 6 + 5 * 2
    engine.deliver(record, 2)
    engine.core.ledger.settle_all()
    engine.core.tenants.prices = Prices(input=9, cached=9, output=8)
    assert account.charged == 16 + 2 * 2 / 4
    engine.deliver(record, 1)
    engine.finish(record)
    engine.core.ledger.settle_all()
    assert account.charged == 17 + 8 / 4
    assert (account.uncached_input_tokens, account.cached_input_tokens, account.output_tokens) == (6, 4, 8)


def test_skip_refunds_what_the_admission_charged() -> None:
    """A head that vLLM takes and puts back a thousand times costs nothing and keeps its place."""
    engine = FakeEngine()
    record = engine.submit("a", prompt=1_000)
    engine.submit("b").account.charge(5)
    rank(engine, "a", weight=3.0)
    record.account.charge(0.1)
    charged = record.account.charged
    for _ in range(1_000):
        assert engine.core.queue.peek() is record
        engine.skip()
        assert record.account.charged == pytest.approx(charged, rel=1e-12)
    assert (record.cached_tokens, record.uncached_tokens, record.charged_input) == (0, 0, 0)
    engine.check()


def test_charge_at_admission_counts_for_the_next_pick_of_the_same_step() -> None:
    """A flooding tenant's first long prompt puts it behind the others before the step's second pick."""
    engine = FakeEngine()
    engine.submit("a", prompt=100)
    engine.submit("a", prompt=100)
    polite = engine.submit("b", prompt=10)
    engine.admit()
    assert engine.admit() is polite


def test_admission_that_finds_more_in_the_cache_is_charged_what_it_was() -> None:
    """What was expected from the cache is corrected by what was there when the step was made."""
    engine = FakeEngine()
    record = engine.submit(prompt=100)
    engine.core.queue.pop()
    engine.core.admitting(record, 0)
    assert record.account.charged == 100
    engine.core.admitted(engine.now, record, 64)
    assert record.account.charged == 36
    assert (record.account.uncached_input_tokens, record.account.cached_input_tokens) == (36, 64)
    engine.core.validate()


def test_output_that_is_expected_is_charged_at_admission_and_settled_at_the_end() -> None:
    """Algorithm 3 of VTC: nothing as expected tokens come, more beyond them, and what did not come is given back."""
    engine = FakeEngine()
    short, long = engine.submit("a", prompt=10), engine.submit("a", prompt=10)
    rank(engine, "a", expected_output=8)
    account = short.account
    engine.admit()
    assert account.charged == 10 + 8 * 2
    engine.admit()
    assert account.charged == 2 * (10 + 8 * 2)
    engine.deliver(short, 3)
    engine.deliver(long, 8)
    engine.core.ledger.settle_all()
    assert account.charged == 2 * (10 + 8 * 2)
    engine.deliver(long, 5)
    engine.finish(short)
    engine.core.ledger.settle_all()
    assert account.charged == (10 + 3 * 2) + (10 + 13 * 2)
    engine.check()


def test_what_is_expected_counts_for_the_next_pick_of_the_same_step() -> None:
    """Equal prompts: whose outputs are expected to be long stands behind after one, not after a frame period."""
    engine = FakeEngine()
    for tenant in ("long", "long", "short", "short", "short"):
        engine.submit(tenant, prompt=10)
    rank(engine, "long", expected_output=10)
    assert [engine.admit().account.name for _ in range(5)] == ["long", "short", "short", "short", "long"]


def test_an_expectation_that_is_the_first_is_of_what_runs_too() -> None:
    """Charged late, they would let their tenant in again and again before its turn. A later one is for who comes."""
    engine = FakeEngine()
    first, over = engine.submit("a", prompt=10), engine.submit("a", prompt=10)
    account = first.account
    for _ in range(2):
        engine.admit()
    engine.deliver(first, 3)
    engine.deliver(over, 9)
    rank(engine, "a", expected_output=8)
    assert account.charged == (10 + 8 * 2) + (10 + 9 * 2)
    rank(engine, "a", expected_output=100)
    assert account.charged == (10 + 8 * 2) + (10 + 9 * 2)
    engine.finish(first)
    engine.finish(over)
    engine.core.ledger.settle_all()
    assert account.charged == 2 * 10 + (3 + 9) * 2
    engine.check()


def test_who_returns_does_not_pay_for_what_others_have_yet_to_be_given() -> None:
    """It is lifted to what the next tenant was given: what that one is charged ahead it gets while this one waits."""
    engine = FakeEngine()
    for _ in range(3):
        engine.submit("busy", prompt=10)
    rank(engine, "busy", expected_output=50)
    first = engine.admit()
    engine.deliver(first, 20)
    engine.core.ledger.settle_all()
    assert first.account.virtual_time == 10 + 50 * 2
    back = engine.submit("back", prompt=10)
    assert back.account.virtual_time == 10 + 20 * 2
    assert engine.admit() is back
    engine.check()


def test_who_returns_keeps_what_it_is_charged_ahead_itself() -> None:
    """It has emptied its queue, not its place: what still runs of it counts beyond the level of the others."""
    engine = FakeEngine()
    engine.submit("back", prompt=10)
    engine.submit("busy", prompt=10).account.charge(40)
    rank(engine, "back", expected_output=50)
    runs = engine.admit()
    assert runs.account.virtual_time == 10 + 50 * 2
    engine.deliver(runs, 5)
    engine.core.ledger.settle_all()
    engine.submit("back", prompt=10)
    assert runs.account.virtual_time == 40 + 45 * 2
    engine.check()


def test_a_skip_gives_back_what_was_expected() -> None:
    """A head that vLLM takes and puts back is charged nothing, and its tenant keeps its place."""
    engine = FakeEngine()
    record = engine.submit("a", prompt=10)
    engine.submit("b").account.charge(5)
    rank(engine, "a", expected_output=50)
    for _ in range(3):
        assert engine.core.queue.peek() is record
        engine.skip()
        assert (record.account.charged, record.account.ahead) == (0, 0)
        engine.check()


def test_what_is_given_back_moves_the_tenant_forward() -> None:
    """A refund makes virtual time fall, which the heaps must be told: the tenant is before others again."""
    engine = FakeEngine()
    first = engine.submit("a", prompt=10)
    engine.submit("b").account.charge(20)
    engine.submit("a", prompt=10)
    rank(engine, "a", expected_output=50)
    assert engine.admit() is first
    assert engine.core.queue.peek().account.name == "b"
    engine.finish(first)
    engine.core.ledger.settle_all()
    assert engine.core.queue.peek().account.name == "a"
    engine.check()


def test_recomputed_input_is_not_charged_again() -> None:
    """A request that lost its KV pays for its prompt once."""
    engine = FakeEngine(chunk=100)
    record = engine.submit(prompt=50)
    engine.admit()
    engine.compute(record)
    charged = record.account.charged
    engine.run_short(record)
    engine.admit()
    engine.core.ledger.settle_all()
    assert record.account.charged == charged + 2  # the token that had been delivered


# What was computed twice


def test_recompute_is_counted_over_repeated_drops() -> None:
    """Each position counts as often as it was computed again, also when the work is lost half-way."""
    engine = FakeEngine()
    record = engine.submit(prompt=200)
    engine.admit()
    engine.compute(record, 100)
    for kept_by_cache, computed in ((0, 40), (16, 30), (0, 150)):
        engine.run_short(record)
        engine.admit(cached=kept_by_cache)
        engine.compute(record, computed)
    engine.core.ledger.settle_all()
    assert record.recomputed_tokens == 40 + 30 + 100
    assert engine.recomputed[record] == record.recomputed_tokens == engine.core.ledger.recomputed_total
    assert record.account.recomputed_tokens == record.recomputed_tokens
    assert engine.core.ledger.preempted_total == 3


def test_hold_with_kept_kv_recomputes_nothing() -> None:
    """Held ten times in mid-sentence and continued, nothing is computed twice."""
    engine = FakeEngine()
    record = engine.submit(prompt=20, tokens=40)
    for _ in range(10):
        engine.step()
        engine.core.holds.hold(engine.now, record, "operator", "keep", None, "")
        engine.step()
        engine.core.holds.release(engine.now, record, ["operator"], "operator", "command")
    engine.finish(record)
    assert engine.core.ledger.recomputed_total == 0
    assert engine.core.ledger.preempted_total == 0


# Life


def test_times_of_a_request_add_up() -> None:
    """Queued, running and held seconds are told apart and together are the request's life."""
    engine = FakeEngine()
    record = engine.submit(prompt=1)
    engine.wait(3)
    engine.admit()
    engine.wait(2)
    engine.deliver(record)
    engine.core.holds.hold(engine.now, record, "operator", "keep", None, "")
    engine.wait(5)
    engine.core.holds.release(engine.now, record, ["operator"], "operator", "command")
    engine.wait(1)
    engine.run_short(record)
    engine.wait(4)
    engine.core.holds.hold(engine.now, record, "operator", "keep", None, "")
    engine.wait(6)
    engine.finish(record, "abort")
    (told,) = engine.seen(ev.Finished)
    assert (told["queued_s"], told["held_s"], told["run_s"]) == (3 + 4, 5 + 6, 2 + 1)
    assert told["ttft_s"] == 5


@pytest.mark.parametrize(
    "state", [State.QUEUED, State.RUNNING, State.HELD_NONE, State.HELD_KEPT, State.HELD_DROPPED]
)
def test_request_may_finish_in_any_state(state: State) -> None:
    """Wherever a request is when it ends, nothing of it stays behind."""
    engine = FakeEngine()
    record = engine.submit(prompt=30)
    if state not in (State.QUEUED, State.HELD_NONE):
        engine.admit()
        engine.compute(record)
    if state.value.startswith("held"):
        kv = "drop" if state is State.HELD_DROPPED else "keep"
        engine.core.holds.hold(engine.now, record, "operator", kv, engine.now + 9, "")
    assert record.state is state
    engine.finish(record)
    engine.check()
    assert engine.core.deadline() is None
    assert not engine.core.roster.families
    account = record.account
    assert (account.queued, account.running, account.held, account.finished) == (0, 0, 0, 1)
    assert record.id not in engine.core.roster.records


def test_first_token_is_told_once_and_also_of_a_request_that_ends_with_it() -> None:
    """Time to first token is known even when the first token is the last."""
    engine = FakeEngine()
    record = engine.submit()
    engine.admit()
    engine.wait(2)
    record.outputs.append(7)
    engine.finish(record)
    assert [fields["ttft_s"] for fields in engine.seen(ev.FirstToken)] == [2]


def test_children_are_numbered_and_go_one_by_one() -> None:
    """All children of a client's request are found under its id until the last has ended."""
    engine = FakeEngine()
    children = [engine.submit(id=f"{i}_cmpl-x", request="x") for i in range(3)]
    assert [record.child for record in children] == [0, 1, 2]
    engine.finish(children[1])
    assert list(engine.core.roster.families["x"]) == [children[0], children[2]]
    assert engine.submit(id="3_cmpl-x", request="x").child == 3
    engine.check()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(OPERATIONS, min_size=30, max_size=80))
def test_every_delivered_token_is_counted_once(operations: list[tuple[int, int, int]]) -> None:
    """Whatever happens to requests, their tenants were delivered what is in their lists, no more and no less."""
    engine = FakeEngine(slots=3)
    for operation in operations:
        act(engine, *operation)
        engine.core.ledger.validate()
    engine.core.ledger.settle_all()
    delivered = Counter[Any]()
    for record, kind, _ in engine.events:
        if kind is ev.Queued and record is not None:
            delivered[record.account] += len(record.outputs)
    assert {account: account.output_tokens for account in delivered} == delivered


def test_session_is_charged_over_all_its_turns() -> None:
    """A streaming session's output becomes prompt at each turn, and each token is charged once."""
    engine = FakeEngine(chunk=100)
    record = engine.submit(prompt=10)
    engine.admit()
    engine.deliver(record, 3)
    core = engine.core
    record.payload.num_computed_tokens = 12 + 1
    core.turn_ended(record, 1)
    record.payload.num_computed_tokens = 12  # of the last token nothing is computed: vLLM forgets it
    core.next_turn_begins(record)
    record.outputs.clear()
    core.next_turn(record, 12 + 5)
    record.payload.num_computed_tokens = 17 + 1
    engine.deliver(record, 2)
    engine.finish(record)
    core.ledger.settle_all()
    assert record.account.charged == (10 + 5) + (3 + 2) * 2
    assert record.account.output_tokens == 5
    (fields,) = engine.seen(ev.Finished)
    assert (fields["output_tokens"], fields["generations"], fields["discarded_tokens"]) == (5, 2, 1)
    assert positions(fields) == 10 + 2 + 1 + 5 + 1


def test_session_that_waits_for_input_is_queued_with_its_kv() -> None:
    """Between turns a session counts as queued, and coming back recomputes nothing."""
    engine = FakeEngine(chunk=100)
    record = engine.submit(prompt=10)
    engine.admit()
    engine.compute(record)
    engine.core.waits_again(engine.now, record)
    assert (record.state, record.account.queued) == (State.QUEUED, 1)
    engine.core.admitting(record, 0)
    engine.core.admitted(engine.now, record, 10)
    engine.core.ledger.settle_all()
    assert record.recomputed_tokens == 0
    engine.core.validate()


def test_story_is_bounded_and_keeps_its_beginning_and_end() -> None:
    """A request's own story never grows past its bound; the middle gives way."""
    engine = FakeEngine()
    record = engine.submit()
    for priority in range(1, 1_000):
        engine.core.reprioritize(engine.now, record, priority, None, "operator")
    lines = record.told()
    assert len(lines) == MAX_STORY
    assert lines[0].kind == "queued"
    assert "to_priority=999" in lines[-1].detail


# Classes and tables


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("", "own"), ("own", "own"), ("other-allowed", "other-allowed"), ("gold", "own"), ("unknown", "own")],
)
def test_class_is_what_was_asked_for_and_may_be_had(asked: str, expected: str) -> None:
    """A tenant gets its own class or one that its row allows; anything else is its own."""
    engine = FakeEngine()
    engine.core.configure(
        {name: ClassPolicy() for name in ("own", "other-allowed", "gold")},
        {"a": TenantPolicy(class_="own", classes=("other-allowed", "unknown"))},
    )
    assert engine.submit(asked_class=asked).class_ == expected


def test_tenant_whose_class_is_not_there_is_in_default() -> None:
    """A row may name a class that nobody defined: its requests run in `default`."""
    engine = FakeEngine()
    engine.core.configure({}, {"a": TenantPolicy(class_="nowhere")})
    assert engine.submit().class_ == "default"


def test_class_set_by_command_outlives_tables() -> None:
    """A command's class stays through new tables; while it is undefined, it is as if never set."""
    engine = FakeEngine()
    core = engine.core
    gold, silver = {"gold": ClassPolicy(position=-1)}, {"silver": ClassPolicy()}
    core.configure(gold | silver, {})
    record = engine.submit()
    core.reprioritize(engine.now, record, None, "gold", "operator")
    core.configure(gold, {"a": TenantPolicy(class_="silver")})
    assert record.class_ == "gold"
    core.configure(silver, {})
    assert record.class_ == "default"
    core.configure(silver, {"a": TenantPolicy(class_="silver")})
    assert record.class_ == "silver"
    core.configure(gold, {})
    assert record.class_ == "gold"
    engine.check()


def test_new_tables_reach_the_engine_and_reorder_what_waits() -> None:
    """Positions, orders and weights count at once for everything that is here."""
    engine = FakeEngine()
    first, second = engine.submit("a"), engine.submit("b")
    assert engine.core.queue.peek() is first
    engine.core.configure({"vip": ClassPolicy(position=-5)}, {"b": TenantPolicy(class_="vip", weight=7)})
    assert engine.core.queue.peek() is second
    assert (second.account.weight, second.payload.place, first.payload.place) == (7, 0, 1)
    engine.check()


def test_configure_with_what_is_in_force_changes_nothing() -> None:
    """The same tables again are recognised by their digest and leave a later rank's weight alone."""
    engine = FakeEngine()
    engine.submit()
    tables: tuple[Any, Any] = ({"gold": ClassPolicy()}, {"a": TenantPolicy(weight=2)})
    assert engine.core.configure(*tables)
    rank(engine, "a", weight=5.0)
    before = picture(engine.core)
    assert not engine.core.configure({"gold": ClassPolicy()}, {"a": TenantPolicy(weight=2)})
    assert picture(engine.core) == before
    assert engine.core.tenants.account("a").weight == 5


def test_priority_is_clamped_to_the_tenants_range() -> None:
    """A client's priority cannot leave what its tenant's row allows."""
    engine = FakeEngine()
    engine.core.configure({}, {"a": TenantPolicy(priority_min=-1, priority_max=5)})
    assert [engine.submit(priority=asked).priority for asked in (-9, 0, 9)] == [-1, 0, 5]


def test_tables_are_applied_in_time_linear_in_what_waits() -> None:
    """New tables with 5,000 requests in the queue ask the engine once per request."""
    engine = FakeEngine()
    calls: list[Record] = []
    for i in range(5_000):
        engine.submit(f"t{i % 50}")
    engine.reprioritized = calls.append  # type: ignore[method-assign]
    engine.core.configure({"gold": ClassPolicy()}, {"default": TenantPolicy(class_="gold")})
    assert len(calls) == 5_000
    assert all(record.class_ == "gold" for record in calls)
    engine.check()


# What events tell of the order


def test_a_request_tells_whom_it_met_when_it_joined_the_queue() -> None:
    """How many waited, whose turn it was, and the virtual times that say why."""
    engine = FakeEngine(slots=1)
    engine.core.configure({"gold": ClassPolicy(position=-1)}, {"b": TenantPolicy(class_="gold")})
    for tenant in ("a", "a", "b", "a"):
        engine.submit(tenant, prompt=10)
    met = [fields for _, kind, fields in engine.events if kind is ev.Queued]
    assert met[0] == {
        "prompt_tokens": 10,
        "waiting": 0,
        "tenant_waiting": 0,
        "running": 0,
        "virtual_time": 0.0,
    }
    engine.admit()
    engine.admit()
    engine.submit("a", prompt=5)
    met = [fields for _, kind, fields in engine.events if kind is ev.Queued]
    assert met[3]["waiting"] == 3
    assert met[3]["tenant_waiting"] == 2
    assert (met[3]["next_request"], met[3]["next_tenant"], met[3]["next_class"]) == ("r3", "b", "gold")
    assert (met[4]["running"], met[4]["next_request"], met[4]["next_priority"]) == (2, "r2", 0)
    assert met[4]["virtual_time"] == met[4]["next_virtual_time"] == 10.0
    admitted = [fields for _, kind, fields in engine.events if kind is ev.Admitted]
    assert [(each["virtual_time"], each["waiting"]) for each in admitted] == [(10.0, 3), (10.0, 2)]
