"""The steering core charges: when, to whom, at which prices, and what it gives back or had computed twice."""

import pytest

from coxswain.schemas.policy import Prices
from tests.support.fake_engine import FakeEngine
from tests.support.happenings import rank


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


def test_what_was_delivered_counts_in_the_next_look_at_the_queue() -> None:
    """Nobody settles all tenants for it: whose turn it is was charged to the last token, and so is who is lifted."""
    engine = FakeEngine()
    for tenant in ("a", "b", "a", "b"):
        engine.submit(tenant)
    first, second = engine.admit(), engine.admit()
    assert engine.core.queue.peek().account.name == "a"
    engine.deliver(first, 3)
    assert engine.core.queue.peek().account.name == "b"
    engine.deliver(second, 5)
    assert engine.core.queue.peek().account.name == "a"
    assert engine.submit("c").account.lift == first.account.virtual_time == 16 + 3 * 2


def test_output_that_was_expected_is_not_charged_twice_whoever_looks_first() -> None:
    """It was charged at admission: between its delivery and the next step the tenant's rank is what it was."""
    engine = FakeEngine()
    record = engine.submit("a", prompt=10)
    rank(engine, "a", expected_output=8)
    engine.admit()
    account = record.account
    assert account.rank == (10 + 8 * 2, "a")
    engine.deliver(record, 3)
    assert account.rank == (10 + 8 * 2, "a")
    engine.core.ledger.settle_ahead()
    assert (account.rank, account.level) == ((10 + 8 * 2, "a"), 10 + 3 * 2)


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
    engine.core.queue.take(engine.core.queue.peek())
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
