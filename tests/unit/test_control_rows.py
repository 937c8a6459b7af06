"""Rows of a table as KV delivers them."""

from coxswain.control.rows import Rows
from coxswain.schemas.names import tenant_key, tenant_of_key
from coxswain.schemas.policy import TenantPolicy


def _rows() -> Rows[TenantPolicy]:
    return Rows(TenantPolicy, tenant_of_key)


def test_the_last_good_row_stays_when_a_bad_one_comes() -> None:
    """A row that does not decode, or contradicts itself, is refused with a reason and changes nothing."""
    rows, key = _rows(), tenant_key("acme")
    rows.put(key, b'{"weight": 2}')
    for bad in (
        b'{"weight": -1}',
        b"not json",
        b"\xff",
        b'{"class": "\xff"}',
        b'{"a":' * 50_000,
        b'{"priority_min": 5, "priority_max": 1}',
        b"[]",
    ):
        rows.put(key, bad)
        assert rows.good["acme"].weight == 2.0
        assert "last good row stays" in rows.refused["acme"]
    rows.put(key, b'{"weight": 3}')
    assert (rows.good["acme"].weight, rows.refused) == (3.0, {})


def test_a_deleted_row_is_gone_and_so_is_its_refusal() -> None:
    """Deleting clears the row and whatever was wrong with it."""
    rows, key = _rows(), tenant_key("acme")
    rows.put(key, b"{}")
    rows.put(key, b"nonsense")
    rows.put(key, None)
    assert (rows.good, rows.refused) == ({}, {})


def test_a_key_that_is_no_tenant_is_named() -> None:
    """A key that somebody wrote by hand is refused under its own name, and does no harm."""
    rows = _rows()
    rows.put("=", b"{}")
    assert (rows.good, list(rows.refused)) == ({}, ["="])
    rows.put("=", None)
    assert rows.refused == {}


def test_reading_again_drops_what_the_bucket_no_longer_holds() -> None:
    """After a reconnection, rows that are no longer there go; bad ones still keep their last good row."""
    rows = _rows()
    rows.put(tenant_key("kept"), b'{"weight": 2}')
    rows.put(tenant_key("gone"), b"{}")
    rows.begin()
    rows.put(tenant_key("kept"), b"broken meanwhile")
    rows.end()
    assert {name: each.weight for name, each in rows.good.items()} == {"kept": 2.0}
    assert list(rows.refused) == ["kept"]
