"""The steering core: its invariants in any order of events, the life of a request, and what events tell."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coxswain.schemas import events as ev
from coxswain.schemas.policy import ClassPolicy, TenantPolicy
from coxswain.service.scheduler.record import MAX_STORY
from coxswain.service.scheduler.states import State
from tests.support.fake_engine import FakeEngine
from tests.support.happenings import OPERATIONS, act


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


def test_a_request_that_comes_looks_at_no_virtual_time() -> None:
    """Its event tells its own tenant's and the next one's as of the same moment: the last admission or frame."""
    engine = FakeEngine(slots=1)
    engine.submit("a", prompt=10)
    engine.submit("a", prompt=10)
    running = engine.admit()
    engine.deliver(running, 3)
    engine.submit("a")
    met = engine.seen(ev.Queued)[-1]
    assert met["virtual_time"] == met["next_virtual_time"] == 10.0
    assert running.account.rank[0] == 10.0 + 3 * engine.core.tenants.prices.output
    engine.submit("a")
    assert engine.seen(ev.Queued)[-1]["virtual_time"] == running.account.virtual_time > 10.0
