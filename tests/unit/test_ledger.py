"""What the ledger counts when a KV connector promised what it could not load."""

import pytest

from coxswain.schemas import events as ev
from coxswain.service.scheduler.record import Record
from tests.support.fake_engine import FakeEngine
from tests.unit.test_core import positions


def fail_load(engine: FakeEngine, record: Record, begin: int, valid: int) -> None:
    """As vLLM: the step that began at `begin` is thrown away, the request goes back to what is valid."""
    stood = record.payload.num_computed_tokens
    record.payload.num_computed_tokens = engine.kv[record] = engine.furthest[record] = valid
    engine.core.ledger.load_failed(record, begin, stood - begin)


@pytest.mark.parametrize("valid", [0, 16, 48])
@pytest.mark.parametrize("dropped", [False, True], ids=["first", "reloaded"])
def test_every_position_is_counted_when_a_load_fails(valid: int, dropped: bool) -> None:
    """The step that built on it is discarded, and what was promised is computed after all, as recompute."""
    engine = FakeEngine(chunk=8)
    record = engine.submit(prompt=100, tokens=6)
    if dropped:
        engine.admit()
        engine.compute(record, 100)
        engine.core.evict(engine.now, record, "test")
        engine.core.queue.take(engine.core.queue.peek())
        engine.core.admitting(record, 0)
        del engine.waiting[record]
        engine.running[record] = None
        record.payload.num_computed_tokens = engine.kv[record] = 64
        engine.core.admitted(engine.now, record, 64, 64)
    else:
        engine.admit(cached=64)
    engine.compute(record, 8)
    fail_load(engine, record, 64, valid)
    engine.core.validate()
    while record in engine.running:
        engine.step()
    (ended,) = engine.seen(ev.Finished)
    assert positions(ended) == engine.computed[record]
    assert ended["discarded_tokens"] == 8
    assert ended["recomputed_tokens"] == (100 if dropped else 64) - valid


def test_request_that_fails_with_its_load_is_counted_too() -> None:
    """Ended by vLLM because of it: what was computed is discarded, the rest was never computed."""
    engine = FakeEngine()
    record = engine.submit(prompt=100)
    engine.admit(cached=64)
    engine.compute(record, 8)
    fail_load(engine, record, 64, 16)
    engine.finish(record, "error")
    (ended,) = engine.seen(ev.Finished)
    assert positions(ended) == engine.computed[record] == 8
    assert ended["discarded_tokens"] == 8


def draft(engine: FakeEngine, record: Record, *, looked_at: bool) -> None:
    """A step with three drafts, of which none is accepted; somebody may look at totals while it is under way."""
    request, stood = record.payload, record.payload.num_computed_tokens
    request.num_computed_tokens = stood + 4
    engine.computed[record] += 4
    if looked_at:
        engine.core.ledger.settle_all()
    engine.core.ledger.reject_drafts(record, 3)
    request.num_computed_tokens = engine.kv[record] = engine.furthest[record] = stood + 1
    engine.deliver(record)


def lose_and_resume(engine: FakeEngine, record: Record) -> None:
    """Its KV is lost and computed anew, up to its last token."""
    engine.core.evict(engine.now, record, "test")
    engine.admit()
    engine.compute(record, record.prompt_tokens + len(record.outputs))


@pytest.mark.parametrize("looked_at", [False, True], ids=["at-rest", "in-flight"])
@pytest.mark.parametrize("end", ["at once", "later", "after another loss"])
def test_drafts_that_are_rejected_where_kv_was_lost_are_counted_once(looked_at: bool, end: str) -> None:
    """What a lost step had guessed is guessed again, wrongly, and computed again or never: all of it adds up."""
    engine = FakeEngine()
    record = engine.submit(prompt=16, tokens=100)
    engine.admit()
    engine.compute(record, 16)
    record.payload.num_computed_tokens += 4  # a step with drafts is under way as its KV is lost
    engine.computed[record] += 4
    engine.core.evict(engine.now, record, "test")
    engine.deliver(record)
    engine.admit()
    engine.compute(record, 18)
    draft(engine, record, looked_at=looked_at)
    if end == "after another loss":
        lose_and_resume(engine, record)
        draft(engine, record, looked_at=looked_at)
    for _ in range(0 if end == "at once" else 5):
        draft(engine, record, looked_at=looked_at)
    engine.core.validate()
    engine.finish(record, "length")
    (ended,) = engine.seen(ev.Finished)
    assert positions(ended) == engine.computed[record]
