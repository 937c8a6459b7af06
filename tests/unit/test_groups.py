"""What a class and a tenant know of who waits longest, whatever is looked at and put back in between."""

import pytest

from tests.support.fake_engine import FakeEngine


@pytest.mark.parametrize("passed_over", [2, 5, 9, 10])
def test_the_longest_wait_survives_any_number_of_looks(passed_over: int) -> None:
    """vLLM takes out all that it passes over in a step before it puts any back: the oldest stays the oldest."""
    engine = FakeEngine()
    for _ in range(10):
        engine.submit()
        engine.now += 1.0
    (group,), account = engine.core.roster.classes.values(), engine.core.tenants.account("a")
    for _ in range(80):
        engine.skip(passed_over)
        group.validate()
        account.validate()
    assert group.oldest_queued_s(engine.now) == 10.0
    assert account.oldest_since == group.oldest_since
