"""Accounts of tenants: they say of the order of tenants what whole rows say, and nothing of it is lost on the way."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from coxswain.control import accounts as module
from coxswain.control.accounts import Accounts
from coxswain.control.fleet import Fleet
from coxswain.control.reader import Reader
from coxswain.schemas.commands import encode
from coxswain.schemas.names import DEFAULT
from coxswain.schemas.status import Frame, TenantStatus
from tests.support.frames import frame, row

TENANTS = ("a", "b", "c")
NUMBERS = (
    "base", "charged", "lift", "virtual_time", "weight", "expected_output", "max_running", "max_queued",
)  # fmt: skip

rows = st.builds(
    row,
    st.sampled_from(TENANTS),
    queued=st.integers(0, 2),
    running=st.integers(0, 1),
    held=st.sampled_from([0, 0, 1]),
    class_=st.sampled_from(["default", "default", "chat"]),
    base=st.integers(-3, 3).map(float),
    charged=st.integers(0, 3).map(float),
    lift=st.integers(0, 1).map(float),
    weight=st.sampled_from([1.0, 1.0, 4.0]),
    expected_output=st.sampled_from([0.0, 0.0, 7.0]),
    uncached_input_tokens_total=st.integers(0, 2),
    cached_input_tokens_total=st.sampled_from([0, 1, 2**62]),
    max_running=st.sampled_from([None, None, 0, 3]),
    max_queued=st.sampled_from([None, None, 5]),
)
frames = st.lists(
    st.tuples(
        st.sampled_from(["w1", "w1", "w2"]),
        st.sampled_from([0, 0, 0, 1]),
        st.lists(rows, max_size=3, unique_by=lambda each: each.tenant),
        st.booleans(),
        st.booleans(),
    ),
    max_size=20,
)


def _numbers(each: Any) -> tuple[Any, ...]:
    return tuple(getattr(each, name) for name in NUMBERS)


def _same(kept: Fleet, whole: Fleet) -> None:
    """Whatever a policy that looks at tenants can ask."""
    assert {name: cost for name, cost in kept.served.items() if cost} == {
        name: cost for name, cost in whole.served.items() if cost
    }
    assert kept.presence.waiting == whole.presence.waiting
    assert kept.busy() == whole.busy()
    assert list(kept.presence.moved) == list(whole.presence.moved)
    # Of a tenant that is listed no more the class is not kept; `default` is in every table anyway.
    assert kept.presence.classes | {DEFAULT} == whole.presence.classes | {DEFAULT}
    for worker, view in whole.workers.items():
        tenants = kept.workers[worker].tenants
        assert {name: _numbers(each) for name, each in tenants.items()} == {
            name: _numbers(each) for name, each in view.rows.items()
        }
        assert tenants.spent(TENANTS) == view.tenants.spent(TENANTS)
        theirs = kept.changed.get(worker, {})
        assert list(theirs) == list(whole.changed.get(worker, {}))
        for name, old in whole.changed.get(worker, {}).items():
            now, before = tenants.get(name), theirs[name]
            assert (before is None) == (old is None)
            if now is None:  # of an incarnation that ended
                continue
            if old is not None:
                assert _numbers(before) == _numbers(old)
            if name not in kept.workers[worker].waiting:
                # That a tenant which waits had something admitted is told when it waits no more.
                assert module.admitted(now, before) >= module.admitted(view.rows[name], old)


def _risen(new: TenantStatus, old: TenantStatus) -> TenantStatus:
    """Totals of input fall in no incarnation: of a tenant that waits they are not looked at again and again."""
    names = ("uncached_input_tokens_total", "cached_input_tokens_total")
    return replace(new, **{name: max(getattr(new, name), getattr(old, name)) for name in names})


@pytest.mark.parametrize("places", [module.MAX_SHARED, 2])
@settings(max_examples=100, deadline=None)
@given(frames)
def test_accounts_say_what_rows_say(places: int, said: list[Any]) -> None:
    """Frames in any order, full or not, of workers that restart: who keeps numbers only knows the same of the order.

    Also if no more of a row is read than that takes.
    """
    kept, whole = Fleet(rows=False), Fleet()
    read = Reader(kept).read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_SHARED", places)
        totals: dict[tuple[str, int, str], TenantStatus] = {}
        for seq, (worker, life, news, full, settle) in enumerate(said):
            risen = [_risen(new, totals.get((worker, life, new.tenant), new)) for new in news]
            totals.update(((worker, life, new.tenant), new) for new in risen)
            each = frame(worker, f"01{life}", seq, *risen, full=full)
            assert kept.merge(read(worker, encode(each)), seq * 0.1) == whole.merge(each, seq * 0.1)
            for fleet in (kept, whole):
                fleet.age(seq * 0.1)
                fleet.validate()
            _same(kept, whole)
            if settle:
                kept.settle()
                whole.settle()


def _accounts(places: dict[str, int], *said: TenantStatus) -> Accounts:
    accounts = Accounts(places)
    for _ in accounts.put(said, dict.fromkeys(TENANTS, 0.0)):
        pass
    return accounts


def test_a_full_frame_says_who_is_idle_now() -> None:
    """A tenant whose last request just ran has the same numbers as before: that it was busy makes it news."""
    accounts = _accounts({}, row("a", running=1), row("b"), row("c", running=1))
    said = [row("a"), row("b"), row("c")]
    assert [each.tenant for each in accounts.differing(said, {"a"})] == ["a"]
    fleet = Fleet(rows=False)
    fleet.merge(frame("w1", "01A", 1, row("a", running=1)), 0.0)
    fleet.age(0.0)
    assert fleet.busy() == {"a"}
    fleet.merge(frame("w1", "01A", 2, row("a")), 0.1)
    fleet.validate()
    assert fleet.busy() == set()


def test_what_other_workers_know_is_not_known_here() -> None:
    """Workers share places, and neither tenants nor numbers."""
    places: dict[str, int] = {}
    mine = _accounts(places, row("a", charged=5.0))
    other = _accounts(places, row("b", charged=7.0))
    assert (list(mine), list(other), list(places)) == (["a"], ["b"], ["a", "b"])
    assert "a" not in other
    assert (mine.spent(["b"]), other.spent(["a", "b", "c"])) == ([0.0], [0.0, 7.0, 0.0])


def test_charges_alone_are_counted_as_rows_are() -> None:
    """Of who is known here they are the news; who is known to nobody is none, and who only to others is that here."""
    places: dict[str, int] = {}
    accounts = _accounts(places, row("a", charged=5.0, base=2.0, lift=1.0, queued=1))
    _accounts(places, row("b", charged=7.0))
    served = dict.fromkeys(TENANTS, 0.0)
    accounts.charge({"a": 8.0, "b": 1.0, "nobody": 3.0}, served)
    accounts.charge({"a": 9.0}, served)
    accounts.rebase({"b": 1.0, "nobody": 3.0})
    assert served == {"a": 4.0, "b": 1.0, "c": 0.0}
    assert _numbers(accounts["a"])[:4] == (2.0, 9.0, 1.0, 12.0)
    accounts.rebase({"a": -2.0})
    assert _numbers(accounts["a"])[:4] == (-2.0, 9.0, 1.0, 8.0)
    assert (list(accounts), list(places)) == (["a"], ["a", "b"])


def test_what_a_tenant_was_told_is_as_its_account_says() -> None:
    """It is looked up a thousand times in a step, without the rest of the account."""
    said = row("a", base=2.0, charged=5.0), row("b", base=3.0, weight=4.0, expected_output=7.0, max_running=1)
    accounts = _accounts({}, *said)
    _accounts(accounts._places, row("c"))
    for name in ("a", "b"):
        rank, account = accounts.rank(name), accounts[name]
        assert rank is not None
        assert (rank.base, rank.weight, rank.expected_output) == (
            account.base,
            account.weight,
            account.expected_output,
        )
    assert (accounts.rank("c"), accounts.rank("nobody")) == (None, None)


def test_terms_that_a_tenant_has_no_more_are_forgotten() -> None:
    """Few tenants have a weight, a cap or an expectation, so they are kept apart; who loses them is as the others."""
    places: dict[str, int] = {}
    said = [row("a", queued=1, weight=4.0, max_running=2), row("a", queued=1)]
    assert _accounts(places, said[0])["a"].weight == 4.0
    after = _accounts(places, *said)["a"]
    assert (after.weight, after.max_running) == (1.0, None)


def test_places_are_not_shared_beyond_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hundred workers with ten thousand tenants each of their own, each has room for its own."""
    monkeypatch.setattr(module, "MAX_SHARED", 10)
    places = {f"elsewhere-{number}": number for number in range(9)}
    accounts = _accounts(places, *(row(name, charged=float(ord(name)), queued=1) for name in TENANTS))
    assert len(places) == 10
    assert {name: each.charged for name, each in accounts.items()} == {
        name: float(ord(name)) for name in TENANTS
    }
    assert accounts.waiting() == set(TENANTS)
    assert len(accounts._charged) == len(TENANTS)


def test_to_places_of_ones_own_a_worker_moves_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tenant that comes after that has the next place: to copy all columns for each would cost the square."""
    monkeypatch.setattr(module, "MAX_SHARED", 10)
    moves: list[int] = []
    move = Accounts._move
    monkeypatch.setattr(Accounts, "_move", lambda self: (moves.append(len(self)), move(self))[1])
    accounts = Accounts({})
    served = dict.fromkeys((f"t{number}" for number in range(14)), 0.0)
    for name in served:
        list(accounts.put([row(name, queued=1)], served))
    assert moves == [10]
    assert list(accounts) == list(served)


def test_an_admission_that_cost_nothing_is_seen_in_the_next_full_frame() -> None:
    """Input may be free, and the delta that told of it lost: the total of an idle tenant is all that says so."""
    fleet = Fleet(rows=False)
    for seq, tokens in ((1, 10), (3, 25), (5, 25)):
        fleet.merge(frame("w1", "01A", seq, row("a", uncached_input_tokens_total=tokens)), seq * 0.1)
        news = {name: module.admitted(fleet.workers["w1"].tenants[name], old)
                for name, old in fleet.changed["w1"].items()}  # fmt: skip
        assert news == ({} if seq == 5 else {"a": True})
        fleet.settle()


def test_a_frame_is_kept_without_its_rows() -> None:
    """What a worker says of itself stays until the next frame; rows would be looked for in memory once more then."""
    fleet = Fleet(rows=False)
    said: Frame = frame("w1", "01A", 1, row("a"), queued=3)
    fleet.merge(said, 0.0)
    kept = fleet.workers["w1"]
    assert (kept.frame.queued, kept.frame.tenants, list(kept.tenants), len(kept.rows)) == (3, (), ["a"], 0)
