"""How often a kind of line may be logged."""

from coxswain.service.bus.throttle import Throttle


def test_once_per_period_and_counts_the_rest() -> None:
    """The first passes, the following are held back and counted until the period is over."""
    throttle = Throttle(10.0)
    assert throttle.allow("a", 0.0) == 0
    assert throttle.allow("a", 1.0) is None
    assert throttle.allow("a", 9.9) is None
    assert throttle.allow("b", 9.9) == 0
    assert throttle.allow("a", 10.0) == 2


def test_memory_is_bounded() -> None:
    """A peer that invents keys does not make it grow without end."""
    throttle = Throttle(10.0)
    for number in range(10_000):
        throttle.allow(str(number), 0.0)
    assert len(throttle._keys) <= 257
