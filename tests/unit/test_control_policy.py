"""Finding a policy by name and giving it parameters."""

from importlib.metadata import EntryPoint

import pytest

from coxswain.control.errors import PolicyError
from coxswain.control.policies.vtc import Vtc
from coxswain.control.policy import GROUP, available, describe, load, weight_of
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
        ("vtcc", [], "installed: andes, colocate, edf, fcfs, strict, vtc"),
        ("vtc", ["wz=1"], "it takes wp, wq, cached, predict, preempt_gap, fill"),
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


@pytest.mark.parametrize("name", available())
def test_every_shipped_policy_says_what_it_is_and_takes(name: str) -> None:
    """Whoever lists the policies sees a sentence for each, and a default and a kind for each parameter."""
    found = describe(available()[name])
    assert found.what
    assert not found.error
    assert load(name).name == name
    for parameter in found.parameters:
        assert load(name, [f"{parameter.name}={parameter.default}"]).name == name
        assert parameter.kind


def test_a_policy_that_cannot_be_imported_is_listed_with_the_reason() -> None:
    """One broken package does not hide the others."""
    found = describe(EntryPoint(name="odd", value="no_such_module:Odd", group=GROUP))
    assert "no_such_module" in found.error


def test_weight_falls_back_to_the_default_row() -> None:
    """A tenant without a row has the weight of tenant `default`, else 1, as on the workers."""
    tenants = {"default": TenantPolicy(weight=0.5), "acme": TenantPolicy(weight=4.0)}
    assert [weight_of(tenants, name) for name in ("acme", "other")] == [4.0, 0.5]
    assert weight_of({}, "acme") == 1.0
