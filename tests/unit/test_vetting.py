"""A policy that wants what no worker would take: that is left out and said, and everybody else has what is wanted."""

import math
from fractions import Fraction
from typing import Any

import pytest
from msgspec.structs import replace

from coxswain.control import vetting as module
from coxswain.control.core import Answer, Send
from coxswain.control.errors import PolicyError
from coxswain.control.failures import PATIENCE
from coxswain.control.policy import Cap, Directives, each_class
from coxswain.schemas.commands import decode, encode
from coxswain.schemas.policy import ClassPolicy, Prices, TenantPolicy, TenantRank, digest
from tests.support.control import Driver, Fixed
from tests.support.frames import frame, request, row

NAN = math.nan
GOOD = {"good": TenantRank(base=50.0)}
STEP_S = 0.05


class Fleet:
    """A worker that reads commands as real ones do, and a patient controller of it."""

    def __init__(self, policy: Any, **tables: Any) -> None:
        self.driver = Driver(policy, patient=True)
        self.driver.classes = tables.get("classes", {})
        self.failures = self.driver.core.failures
        self.config = digest({}, {})
        self.now = 0.0
        self._answers: list[Answer] = []

    def steps(self, count: int = 1) -> list[Any]:
        """The commands of so many steps, each answered; one that a worker would refuse raises."""
        got: list[Any] = []
        for _ in range(count):
            self.now += STEP_S
            rows = row("acme", queued=1), row("good", queued=1)
            requests = request("r1", "acme"), request("r2", "good")
            heard = frame("w1", "01A", round(self.now / STEP_S), *rows, requests=requests, config=self.config)
            sends = self.driver.sends(self.now, heard, answers=self._answers)
            self._answers = [Answer(send, ok=True) for send in sends]
            got += [self._read(send) for send in sends]
        return got

    def _read(self, send: Send) -> Any:
        command, _ = decode(send.verb, encode(send.command))
        if send.verb == "configure":
            self.config = digest(command.classes, command.tenants)  # type: ignore[attr-defined]
        return command


def fleet(**directives: Any) -> Fleet:
    """One whose policy wants this."""
    return Fleet(Fixed(**directives))


BAD_RANKS = [
    *(TenantRank(weight=weight) for weight in (0.0, -1.0, NAN, math.inf, 1e-7, 1e10)),
    *(TenantRank(base=base) for base in (NAN, -1e300, math.inf, 10**400, "1", None, Fraction(9))),
    *(TenantRank(expected_output=expected) for expected in (-1.0, NAN, 1e300)),
    {"base": 7.0, "weight": None},
    None,
]


@pytest.mark.parametrize("bad", BAD_RANKS, ids=repr)
def test_a_rank_that_no_worker_would_take_keeps_nobody_elses_from_it(bad: Any) -> None:
    """The row is left out and said; in the same command go all others."""
    made = fleet(ranks={"w1": {"acme": bad, **GOOD}})
    (rank,) = made.steps()
    assert rank.tenants == GOOD
    assert made.failures.total == 1
    assert "rank of tenant 'acme'" in str(made.failures.error)


@pytest.mark.parametrize("name", ["", "é" * 100, "a" * 129, "\ud800", 7, b"a"])
def test_so_does_one_for_a_tenant_that_cannot_be(name: Any) -> None:
    """Names come from workers, which may say anything of their tenants."""
    made = fleet(ranks={"w1": {name: TenantRank(base=9.0), **GOOD}})
    (rank,) = made.steps()
    assert rank.tenants == GOOD
    assert made.failures.total == 1


def test_of_what_is_wrong_the_first_is_told() -> None:
    """What comes after it may be no more than its consequence."""
    made = fleet(ranks={"w1": {"first": TenantRank(weight=0.0), "second": None, **GOOD}})
    (rank,) = made.steps()
    assert rank.tenants == GOOD
    assert "tenant 'first'" in str(made.failures.error)


@pytest.mark.parametrize("prices", [Prices(output=NAN), Prices(input=-1.0)])
def test_bad_prices_are_not_told_and_ranks_are(prices: Prices) -> None:
    """Workers keep those they have."""
    made = fleet(prices=prices, ranks={"w1": GOOD})
    (rank,) = made.steps()
    assert (rank.prices, rank.tenants) == (None, GOOD)
    assert made.failures.total == 1


@pytest.mark.parametrize("priority", [2**40, 10**30, NAN, 1.5, "1", True])
def test_a_bad_priority_keeps_none_from_the_others(priority: Any) -> None:
    """Nor does a worker's refusal make them wait."""
    made = fleet(priorities={"w1": {("r1", 0): priority, ("r2", 0): 1}})
    (command,) = made.steps()
    assert (command.priority, command.targets.requests) == (1, ("r2",))
    assert made.failures.total == 1


def test_moves_holds_and_caps_are_looked_at_one_by_one() -> None:
    """A class that is no token, a kind of hold that there is not, a cap below nothing: the good ones go out."""
    cap = Cap(max_running=1)
    made = fleet(
        moves={"w1": {("r1", 0): "Not A Token", ("r2", 0): "chat"}},
        holds={"w1": {("r1", 0): "maybe", ("r2", 0): "keep"}},
        caps={"w1": {("tenant", "acme"): Cap(max_running=-1), ("tenant", "good"): cap, ("rack", "x"): cap}},
    )
    move, hold, limit = made.steps()
    assert (move.class_, move.targets.requests) == ("chat", ("r2",))
    assert (hold.kv, hold.targets.requests) == ("keep", ("r2",))
    assert (limit.max_running, limit.targets.tenants) == (1, ("good",))
    assert made.failures.total == 1


def test_a_class_row_that_no_worker_would_take_is_the_operators_and_tables_go_on() -> None:
    """Of a class that only the policy knows there is none. Operators' edits reach the workers, and it is said on."""
    ours = {"chat": ClassPolicy(position=3), "batch": ClassPolicy(position=4)}
    rows = {"chat": replace(ours["chat"], quantum_s=NAN), "batch": replace(ours["batch"], order="priority")}
    made = Fleet(
        Fixed(classes={**rows, "own": ClassPolicy(slo_s=-1.0), "No Token": ClassPolicy()}), classes=ours
    )
    (first,) = made.steps()
    assert first.classes == {"chat": ours["chat"], "batch": rows["batch"]}
    assert made.steps(3) == []
    assert made.failures.total == 4
    made.driver.tenants = {"acme": TenantPolicy(weight=2.0)}
    (edited,) = made.steps()
    assert edited.tenants == made.driver.tenants


def test_more_classes_than_a_command_may_have_are_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker refuses a table with a row too many whole: then it has the operators', and tables go on."""
    monkeypatch.setattr(module, "MAX_ROWS", 3)
    ours = {"chat": ClassPolicy(position=3)}
    made = Fleet(Fixed(classes={f"c{number}": ClassPolicy() for number in range(4)}), classes=ours)
    (configure,) = made.steps()
    assert configure.classes == ours
    assert "4 rows, at most 3" in str(made.failures.error)
    made.driver.core.policy.directives = Directives(
        classes={f"c{number}": ClassPolicy() for number in range(3)}
    )
    (configure,) = made.steps()
    assert list(configure.classes) == ["c0", "c1", "c2"]


def test_names_that_were_found_good_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that moves a request to a class of another name in every step has each looked at, not each kept."""
    monkeypatch.setattr(module, "MAX_ROWS", 3)
    vetting = module.Vetting(patient=True)
    names = [f"c{number}" for number in range(5)]
    for name in names + names:
        assert vetting.class_("r1", name) == name
    assert len(vetting._classes) == 3
    assert vetting.class_("r1", "No Token") is None


def test_a_whole_number_in_a_class_row_is_configured_once() -> None:
    """A worker reads 30 as 30.0, and says so by its digest: that of the controller must be the same."""
    made = fleet(classes=each_class({"chat": ClassPolicy()}, ageing_s=30))
    assert len(made.steps(80)) == 1
    assert made.failures.total == 0


def test_what_is_left_out_costs_neither_the_lease_nor_what_else_is_wanted() -> None:
    """A policy whose rows are wrong at every step leads on: a worker that lies could bring about as much."""
    made = fleet(ranks={"w1": {"acme": TenantRank(weight=0.0), **GOOD}}, holds={"w1": {("r2", 0): "keep"}})
    sent = made.steps(2 * PATIENCE)
    assert not made.failures.should_let_go(made.now)
    assert "continue" not in [type(each).__name__.lower() for each in sent]
    assert made.failures.total > 1


def test_it_works_again_once_nothing_was_wrong_for_a_second() -> None:
    """Rows are looked at when they would be sent: between two looks it does not work, and is not said to."""
    made = fleet(ranks={"w1": {"acme": TenantRank(weight=0.0)}})
    made.steps(2)
    made.driver.core.policy.directives = Directives()
    made.steps(PATIENCE - 1)
    assert not made.failures.works
    made.steps()
    assert made.failures.works


def test_who_tests_a_policy_is_told_at_once() -> None:
    """In tests and in the lab what is wrong raises."""
    with pytest.raises(PolicyError, match=r"rank of tenant 'acme'.*weight"):
        Driver(Fixed(ranks={"w1": {"acme": TenantRank(weight=0.0)}})).step(0.0, frame())
