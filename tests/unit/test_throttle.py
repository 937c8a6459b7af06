"""How often a kind of line may be logged."""

from coxswain.common.throttle import Throttle


def test_each_thing_passes_once_per_period_and_the_rest_is_counted() -> None:
    """The same thing is held back until the period is over; what passes next of the kind says how many were."""
    now = 0.0
    throttle = Throttle(10.0, clock=lambda: now)
    assert throttle.allow("frame", "w1") == 0
    assert throttle.allow("frame", "w1") is None
    now = 9.9
    assert throttle.allow("frame", "w1") is None
    assert throttle.allow("command", "w1") == 0
    assert throttle.allow("frame", "w2") == 2
    now = 10.0
    assert throttle.allow("frame", "w1") == 0


def test_names_without_end_neither_flood_the_log_nor_fill_the_memory() -> None:
    """Of one kind only so much passes per period, whatever is invented; other kinds are not affected."""
    now = 0.0
    throttle = Throttle(10.0, most=3, clock=lambda: now)
    assert sum(throttle.allow("frame", number) is not None for number in range(10_000)) == 3
    assert sum(len(said) for said in throttle._said.values()) == 3
    assert throttle.allow("command", "w1") == 0
    now = 10.0
    assert throttle.allow("frame", "again") == 9_997
