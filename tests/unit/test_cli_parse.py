"""How the words of the user become values."""

from collections.abc import Callable
from typing import Any

import pytest

from coxswain.control.cli import parse


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("30", 30.0), ("1.5s", 1.5), ("10m", 600.0), ("1h30m", 5400.0), ("2d", 172_800.0)],
)
def test_durations_are_read_with_their_units(text: str, seconds: float) -> None:
    """A duration is a number with a unit, several of them, or bare seconds."""
    assert parse.duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        (parse.duration_s, ""),
        (parse.duration_s, "3x"),
        (parse.duration_s, "-5s"),
        (parse.duration_s, "1h30"),
        (parse.duration_s, "s"),
        (parse.positive_duration_s, "0s"),
        (parse.lease_s, "25h"),
        (parse.tenant_weight, "acme"),
        (parse.tenant_weight, "acme=0"),
        (parse.tenant_weight, "acme=nan"),
        (parse.tenant_weight, "=1"),
        (parse.tenant_number, "acme=inf"),
        (parse.count_or_none, "-1"),
        (parse.count_or_none, "1.5"),
        (parse.priority, "2147483648"),
        (parse.priority, "high"),
        (parse.class_name, "Chat"),
        (parse.worker_name, "all"),
        (parse.worker_or_all, "a.b"),
        (parse.tokens, "chat,a b"),
        (parse.tenant, "x" * 129),
        (parse.request, ""),
        (parse.kind, "heldd"),
    ],
)
def test_wrong_words_are_refused_with_a_reason(parser: Callable[[str], Any], text: str) -> None:
    """Whatever does not fit is a `ValueError` that says more than nothing."""
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        parser(text)


def test_tenant_names_may_contain_equals_signs() -> None:
    """The last `=` separates, because a tenant may be any text."""
    assert parse.tenant_weight("a=b=2.5") == ("a=b", 2.5)


def test_none_lifts_a_cap() -> None:
    """The word `none` and a number are told apart."""
    assert parse.count_or_none("none") is None
    assert parse.count_or_none("0") == 0
    assert parse.duration_or_none_s("none") is None
    assert parse.positive_or_none_s("2m") == 120.0


def test_bases_may_be_negative() -> None:
    """A base of virtual time may lie below zero."""
    assert parse.tenant_number("acme=-12.5") == ("acme", -12.5)


def test_class_lists_are_split_at_commas() -> None:
    """Empty text means no classes at all."""
    assert parse.tokens("chat, batch") == ("chat", "batch")
    assert parse.tokens("") == ()
