"""Finding a policy by name and giving it parameters."""

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from coxswain.control import policy
from coxswain.control.errors import PolicyError
from coxswain.control.policies.vtc import Vtc
from coxswain.control.policy import GROUP, Parameter, available, describe, load, params_of, weight_of
from coxswain.schemas.policy import Prices, TenantPolicy


def test_shipped_policies_are_found_by_name() -> None:
    """Entry points name fcfs and vtc; settings reach the policy as its own types."""
    assert load("fcfs").name == "fcfs"
    vtc = load("vtc", ["wq=3", "cached=0.1"])
    assert isinstance(vtc, Vtc)
    assert vtc.prices == Prices(input=1.0, cached=0.1, output=3.0)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("vtcc", [], "installed: andes, colocate, edf, fcfs, strict, vtc"),
        ("vtc", ["wz=1"], "it takes wp, wq, cached, predict, preempt_gap, fill"),
        ("vtc", ["wq"], "write key=value"),
        ("vtc", ["wq=-1"], "wq=-1 does not fit: number, at least 0"),
        ("vtc", ["wq=much"], "wq=much does not fit: number"),
        ("vtc", ["fill=1.5"], "fill=1.5 does not fit: number, over 0, below 1 or none"),
        ("vtc", ["predict=foo"], r"predict=foo does not fit: average \| none"),
        ("fcfs", ["x=1"], "it takes none"),
    ],
)
def test_a_wrong_policy_or_setting_says_what_exists(name: str, settings: list[str], says: str) -> None:
    """The error names what was wrong and what would be right."""
    with pytest.raises(PolicyError, match=says):
        load(name, settings)


def test_none_is_null_where_a_parameter_may_be_that() -> None:
    """As everywhere on the command line; where it is a word of the parameter's own, it stays that word."""
    params = params_of(Vtc, ["preempt_gap=none", "fill=null", "predict=none"])
    assert params == Vtc.Params(preempt_gap=None, fill=None, predict="none")
    kinds = {each.name: (each.kind, each.default) for each in describe(available()["vtc"]).parameters}
    assert kinds["preempt_gap"] == ("number, at least 0 or none", "none")
    with pytest.raises(PolicyError, match="wq"):
        params_of(Vtc, ["wq=none"])


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


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (None, "No module named 'somebodys'"),
        ("class Odd(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("", "no attribute 'Odd'"),
        ("class Odd: pass", "no attribute 'Params'"),
        ("class Odd:\n    Params = dict", "its Params is not a msgspec.Struct"),
        (
            "import msgspec\nclass Odd:\n    class Params(msgspec.Struct):\n        x: memoryview | object",
            "not supported",
        ),
    ],
)
def test_a_policy_that_cannot_be_used_is_listed_with_the_reason(
    module: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One broken package does not hide the others, however it is broken."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "somebodys", raising=False)
    if module is not None:
        (tmp_path / "somebodys.py").write_text(module)
    found = describe(EntryPoint(name="odd", value="somebodys:Odd", group=GROUP))
    assert says in found.error


ODD = """
import msgspec
class Odd:
    name, sees = "odd", "tenants"
    class Params(msgspec.Struct): pass
    def __init__(self, params): pass
    def observe(self, fleet, tables, now): pass
    def decide(self, now): pass
"""


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("(self, params): pass", "(self, params): 1 / 0", "cannot be made: ZeroDivisionError"),
        ("(self, params): pass", "(self): pass", "cannot be made: TypeError"),
        ('"tenants"', '"tenant"', "'tenant', which is none of tenants, requests, queue"),
        ('"odd"', "None", "its name is None"),
        ('"odd"', '"x" * 129', "not a text of 1 to 128 characters"),
        ("def decide", "async def decide", "Odd.decide is not a plain function"),
        ("now): pass", "now): yield", "Odd.observe is not a plain function"),
        ("def decide", "def decides", "no attribute 'decide'"),
    ],
)
def test_a_policy_that_could_not_work_is_refused_before_it_leads(
    right: str, wrong: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would go wrong in silence, or for the whole fleet, is said at the start."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "somebodys", raising=False)
    entry = EntryPoint(name="odd", value="somebodys:Odd", group=GROUP)
    monkeypatch.setattr(policy, "available", lambda: {"odd": entry})
    (tmp_path / "somebodys.py").write_text(ODD.replace(right, wrong, 1))
    with pytest.raises(PolicyError, match=re.escape(says)):
        load("odd")


def test_a_parameter_without_a_default_is_listed_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must be given, and the list does not break on it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "somebodys.py").write_text(
        "import msgspec\nclass Odd:\n    class Params(msgspec.Struct):\n        x: int"
    )
    monkeypatch.delitem(sys.modules, "somebodys", raising=False)
    found = describe(EntryPoint(name="odd", value="somebodys:Odd", group=GROUP))
    assert found.parameters == (Parameter(name="x", kind="integer", default=""),)


def test_weight_falls_back_to_the_default_row() -> None:
    """A tenant without a row has the weight of tenant `default`, else 1, as on the workers."""
    tenants = {"default": TenantPolicy(weight=0.5), "acme": TenantPolicy(weight=4.0)}
    assert [weight_of(tenants, name) for name in ("acme", "other")] == [4.0, 0.5]
    assert weight_of({}, "acme") == 1.0
