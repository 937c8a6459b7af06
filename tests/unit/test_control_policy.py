"""Finding a policy by name and giving it parameters."""

import pytest

from coxswain.control.errors import PolicyError
from coxswain.control.policies.vtc import Vtc
from coxswain.control.policy import load, weight_of
from coxswain.schemas.policy import Prices, TenantPolicy


def test_shipped_policies_are_found_by_name() -> None:
    """Entry points name fcfs and vtc; settings reach the policy as its own types."""
    assert load("fcfs").name == "fcfs"
    policy = load("vtc", ["wq=3", "cached=0.1"])
    assert isinstance(policy, Vtc)
    assert policy.prices == Prices(input=1.0, cached=0.1, output=3.0)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("vtcc", [], "installed: fcfs, vtc"),
        ("vtc", ["wz=1"], "it takes wp, wq, cached"),
        ("vtc", ["wq"], "write key=value"),
        ("vtc", ["wq=-1"], ">= 0.0"),
        ("vtc", ["wq=much"], "wq"),
        ("fcfs", ["x=1"], "it takes none"),
    ],
)
def test_a_wrong_policy_or_setting_says_what_exists(name: str, settings: list[str], says: str) -> None:
    """The error names what was wrong and what would be right."""
    with pytest.raises(PolicyError, match=says):
        load(name, settings)


def test_weight_falls_back_to_the_default_row() -> None:
    """A tenant without a row has the weight of tenant `default`, else 1, as on the workers."""
    tenants = {"default": TenantPolicy(weight=0.5), "acme": TenantPolicy(weight=4.0)}
    assert [weight_of(tenants, name) for name in ("acme", "other")] == [4.0, 0.5]
    assert weight_of({}, "acme") == 1.0
