"""How often the control side may log what others cause."""

from coxswain.control.logs import Seldom


def test_each_thing_is_said_once_per_period() -> None:
    """The same thing is held back until the period is over; another is not."""
    now = 0.0
    seldom = Seldom(every_s=10.0, clock=lambda: now)
    assert seldom.may("frame", "w1")
    assert seldom.may("frame", "w2")
    now = 9.9
    assert not seldom.may("frame", "w1")
    now = 10.0
    assert seldom.may("frame", "w1")


def test_names_without_end_neither_flood_the_log_nor_fill_the_memory() -> None:
    """Of one kind only so much is said per period, whatever is invented; other kinds are not affected."""
    now = 0.0
    seldom = Seldom(every_s=10.0, most=3, clock=lambda: now)
    assert sum(seldom.may("frame", number) for number in range(10_000)) == 3
    assert sum(len(said) for said in seldom._said.values()) == 3
    assert seldom.may("command", "w1")
    now = 10.0
    assert seldom.may("frame", "again")
