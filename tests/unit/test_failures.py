"""A policy that raises: what the control core does without it, and when another controller may try."""

from asyncio import CancelledError
from collections.abc import Mapping
from typing import Any

import pytest

from coxswain.control.core import Beat, Send
from coxswain.control.failures import LET_GO_EVERY_S, PATIENCE
from coxswain.control.policy import Directives
from coxswain.schemas.policy import ClassPolicy, TenantPolicy, TenantRank
from tests.support.control import EPOCH, Driver
from tests.support.frames import frame, request, row

STEP_S = 0.05


class Moody:
    """A policy that raises where a test says."""

    name = "moody"
    sees = "requests"

    def __init__(self, **directives: Any) -> None:
        self.raises_in = ""
        self.directives = Directives(**directives)

    def observe(self, *_: object) -> None:
        """Look at nothing."""
        if self.raises_in == "observe":
            raise KeyError("tenant-7")

    def decide(self, _: float) -> Directives:
        """What the test set; or what raises when it is looked into."""
        if self.raises_in == "decide":
            raise ZeroDivisionError
        return Directives(ranks=Broken()) if self.raises_in == "directives" else self.directives


class Broken(Mapping[str, Mapping[str, TenantRank]]):
    """A lazy mapping with a mistake in it."""

    def __getitem__(self, worker: str) -> Mapping[str, TenantRank]:
        raise IndexError(worker)

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 1


def driven(**directives: Any) -> tuple[Moody, Driver]:
    """A policy, and a core that is patient with it."""
    policy = Moody(**directives)
    return policy, Driver(policy, patient=True)


def status(number: int) -> Any:
    """A worker with one request, that a controller holds."""
    held = request("r1", state="held", kv="kept", held_by=("controller",))
    return frame("w1", "01A", number, row("a", held=1), requests=(held,), config="")


def steps(driver: Driver, count: int, first: int = 1) -> list[Send | Beat]:
    """So many steps, each with a frame, everything answered; all that goes out."""
    return [
        each
        for number in range(first, first + count)
        for each in driver.step(number * STEP_S, status(number))
    ]


@pytest.mark.parametrize("where", ["observe", "decide", "directives"])
def test_a_leader_whose_policy_raises_goes_on_leading(where: str) -> None:
    """Heartbeats go out, wherever it raised; the failure is counted, and says what was asked."""
    policy, driver = driven()
    policy.raises_in = where
    assert any(isinstance(each, Beat) for each in steps(driver, 1))
    failures = driver.core.failures
    assert (failures.total, failures.in_row) == (1, 1)
    assert failures.stage == ("observe" if where == "observe" else "decide")


@pytest.mark.parametrize("where", ["observe", "decide", "directives"])
def test_who_tests_a_policy_gets_its_exception(where: str) -> None:
    """Only the daemon is patient: in tests and in the lab a mistake is seen where it was made."""
    policy = Moody()
    policy.raises_in = where
    with pytest.raises((KeyError, ZeroDivisionError, IndexError)):
        Driver(policy).step(0.0, frame())


def test_one_failure_changes_nothing() -> None:
    """Whom it holds it still holds: the next step may be better, and the hold has its lease."""
    policy, driver = driven(holds={"w1": {("r1", 0): "keep"}})
    steps(driver, 1)
    policy.raises_in = "decide"
    sent = steps(driver, PATIENCE - 1, first=2)
    assert not [each for each in sent if isinstance(each, Send) and each.verb == "continue"]
    policy.raises_in = ""
    steps(driver, 1, first=PATIENCE + 1)
    assert driver.core.failures.in_row == 0
    assert driver.core.failures.error is None


def test_a_policy_that_keeps_failing_holds_nobody_and_its_classes_stay() -> None:
    """After a second of failures holds are continued; class tables stay its own, and operators' edits go out."""
    classes = {"default": ClassPolicy(order="priority")}
    policy, driver = driven(classes=classes, holds={"w1": {("r1", 0): "keep"}})
    steps(driver, 1)
    policy.raises_in = "observe"
    driver.tenants = {"acme": TenantPolicy(weight=2.0)}
    # Nobody answers here: a configure is sent again after 2 s.
    sent = [each for each in steps(driver, PATIENCE + 60, first=2) if isinstance(each, Send)]
    assert next(each.command.targets.requests for each in sent if each.verb == "continue") == ("r1",)
    tables = [each.command for each in sent if each.verb == "configure"]
    assert (tables[-1].classes, tables[-1].tenants) == (classes, driver.tenants)


def test_the_lease_is_given_up_after_a_second_of_failures_and_then_once_a_minute() -> None:
    """Another controller gets its chance; without one, a leader without a policy is better than none."""
    policy, driver = driven()
    policy.raises_in = "decide"
    failures = driver.core.failures
    gave_up = []
    for number in range(1, int(2.5 * LET_GO_EVERY_S / STEP_S)):
        driver.step(number * STEP_S, frame(seq=number))
        if failures.should_let_go(number * STEP_S):
            gave_up.append(number)
    assert gave_up[0] == PATIENCE
    assert [round((later - gave_up[0]) * STEP_S) for later in gave_up] == [0, 60, 120]


def test_a_standby_that_only_observes_does_not_collect_failures() -> None:
    """Odd failures on a standby, days apart, are no reason to refuse to lead; a policy that cannot even look is."""
    policy, driver = driven()
    driver.epoch = None
    for number in range(3 * PATIENCE):
        policy.raises_in = "observe" if number % 2 else ""
        driver.step(number * STEP_S, frame(seq=number))
    policy.raises_in = ""
    driver.step(9.0, frame(seq=900))
    assert driver.core.failures.in_row == 0
    policy.raises_in = "observe"
    for number in range(PATIENCE):
        driver.step(10.0 + number * STEP_S, frame(seq=1_000 + number))
    driver.epoch = EPOCH
    driver.step(20.0, frame(seq=2_000))
    assert driver.core.failures.should_let_go(20.0)


@pytest.mark.parametrize("error", [SystemExit(1), CancelledError(), GeneratorExit()])
def test_a_policy_that_exits_is_one_that_fails(error: BaseException) -> None:
    """A library that calls `sys.exit` must not end whoever leads, and its successor, and the next one."""
    policy, driver = driven()
    policy.decide = lambda _: (_ for _ in ()).throw(error)  # type: ignore[method-assign]
    assert any(isinstance(each, Beat) for each in steps(driver, 1))
    assert driver.core.failures.in_row == 1


def test_what_was_said_before_it_raised_goes_out() -> None:
    """It counts as told: operators' tables would never reach the workers while the ranks of a policy raise."""
    policy, driver = driven()
    policy.raises_in = "directives"
    driver.tenants = {"acme": TenantPolicy(weight=2.0)}
    sent = [each for each in steps(driver, 1) if isinstance(each, Send)]
    assert [(each.verb, each.command.tenants) for each in sent] == [("configure", driver.tenants)]


@pytest.mark.parametrize("table", ["classes", "tenants"])
def test_no_policy_writes_into_the_operators_tables(table: str) -> None:
    """It is told so; what it would have put there goes to nobody."""
    policy, driver = driven()
    driver.tenants = {"acme": TenantPolicy(weight=2.0)}

    def observe(_fleet: object, tables: Any, _now: float) -> None:
        getattr(tables, table)["acme"] = TenantPolicy(weight=9.0)

    policy.observe = observe  # type: ignore[method-assign]
    steps(driver, 1)
    assert isinstance(driver.core.failures.error, TypeError)


@pytest.mark.parametrize("said", [None, {}, "everything"])
def test_what_is_no_directives_is_said_to_be_none(said: Any) -> None:
    """Also what an `async def` returns."""
    policy, driver = driven()
    policy.directives = said
    steps(driver, 1)
    assert f"returned {type(said).__name__}" in str(driver.core.failures.error)


def test_classes_that_a_policy_breaks_later_are_those_it_wanted_when_it_worked() -> None:
    """What rules while it fails is a copy: it may go on changing its own, or raise when that is read."""
    classes = {"default": ClassPolicy(order="priority")}
    policy, driver = driven(classes=classes)
    steps(driver, 1)
    policy.raises_in = "decide"
    classes["default"] = None  # type: ignore[assignment]
    steps(driver, PATIENCE + 5, first=2)
    assert driver.core.failures.instead == Directives(classes={"default": ClassPolicy(order="priority")})
