"""Who gets how much under vtc: those who return from idleness, those who split themselves up, those who never come."""

from collections.abc import Iterable

import pytest

from coxswain.control.core import ControlCore, Inputs
from coxswain.control.policies.vtc import Vtc
from coxswain.schemas.names import DEFAULT
from coxswain.schemas.policy import TenantPolicy
from tests.support.frames import SmallWorker

INPUT, OUTPUT, SLOTS = 10, 5, 4
U = 2 * SLOTS * OUTPUT
"""wq × tokens of a full batch: what a worker may owe at any time (VTC, lemma 4.3)."""


class Fleet:
    """Workers under one controller, heard and told every turn."""

    def __init__(self, count: int, tenants: dict[str, TenantPolicy] | None = None) -> None:
        self.workers = [SmallWorker(f"w{number}", slots=SLOTS) for number in range(count)]
        self._tenants = tenants or {}
        self._core = ControlCore(Vtc(Vtc.Params()), "c", lambda: "id", cadence_s=0.0)
        self._now = 0.0
        self._answers: list = []
        self.turns(1)

    def arrive(self, tenant: str, times: int) -> None:
        """So many requests of a tenant, on every worker."""
        for worker in self.workers:
            worker.arrive(tenant, INPUT, OUTPUT, times=times)

    def turns(self, count: int) -> None:
        """Let frame periods pass."""
        for _ in range(count):
            self._now += 0.05
            for worker in self.workers:
                worker.step()
                self._core.hear(self._now, worker.frame())
            inputs = Inputs(classes={}, tenants=self._tenants, epoch=(1.0, 1), answers=self._answers)
            outgoing = self._core.step(self._now, inputs)
            self._answers = [answer for worker in self.workers for answer in worker.obey(outgoing)]

    def served(self, tenants: Iterable[str]) -> float:
        """Weighted tokens of these, so far."""
        accounts = [worker.account(tenant) for worker in self.workers for tenant in tenants]
        return sum(account.input_tokens + 2 * account.output_tokens for account in accounts)


@pytest.mark.parametrize("workers", [1, 4])
def test_a_client_that_returns_gets_its_share_and_nothing_for_its_absence(workers: int) -> None:
    """Away for hundreds of requests, then backlogged: half of the service from then on, within the bound."""
    fleet = Fleet(workers)
    fleet.arrive("there", 4_000)
    fleet.arrive("away", 1)
    fleet.turns(500)
    before = {name: fleet.served([name]) for name in ("there", "away")}
    assert before["there"] > 50 * U
    fleet.arrive("away", 4_000)
    fleet.turns(300)
    since = {name: fleet.served([name]) - before[name] for name in before}
    assert abs(since["away"] - since["there"]) <= 2 * U * workers
    assert since["away"] > 5 * U * workers


def test_idle_tenants_cost_nobody_anything() -> None:
    """A hundred that came once and never again leave the shares of those that are there as they would be."""
    fleet = Fleet(2)
    for number in range(100):
        fleet.workers[number % 2].arrive(f"gone-{number}", 1, 1)
    fleet.turns(40)
    assert not any(worker.busy for worker in fleet.workers)
    for name in ("a", "b"):
        fleet.arrive(name, 2_000)
    fleet.turns(300)
    one, other = fleet.served(["a"]), fleet.served(["b"])
    assert abs(one - other) <= 4 * U
    steps = 300 * 2 * SLOTS
    assert one + other == pytest.approx(steps / OUTPUT * (INPUT + 2 * OUTPUT), rel=0.05)


SYBILS = [f"sybil-{number}" for number in range(3)]


@pytest.mark.parametrize(
    ("tables", "part"),
    [
        pytest.param({}, 3 / 4, id="three identities are three tenants"),
        pytest.param({name: TenantPolicy(weight=1 / 3) for name in SYBILS}, 1 / 2, id="weights divided"),
        pytest.param(
            {DEFAULT: TenantPolicy(weight=1 / 3), "honest": TenantPolicy(weight=1.0)},
            1 / 2,
            id="strangers weigh less",
        ),
    ],
)
def test_what_a_tenant_gets_that_splits_itself_up(tables: dict[str, TenantPolicy], part: float) -> None:
    """As many shares as it has identities, unless weights say what they are worth together."""
    fleet = Fleet(2, tables)
    for name in ("honest", *SYBILS):
        fleet.arrive(name, 3_000)
    fleet.turns(600)
    sybils, honest = fleet.served(SYBILS), fleet.served(["honest"])
    assert sybils / (sybils + honest) == pytest.approx(part, rel=0.05)
