"""The controller's reader: it leaves out rows that were read before, and never one that was not."""

from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from coxswain.control import reader as module
from coxswain.control.fleet import Fleet
from coxswain.control.reader import MAX_UNREAD, ImpostorError, Reader, TenantSeen
from coxswain.schemas.commands import encode
from coxswain.schemas.status import Frame, TenantStatus
from tests.support.frames import frame, row

TENANTS = ("a", "b", "c")
Message = tuple[bytes, Frame]


def _life(incarnation: str, happenings: list[tuple[str, int]]) -> list[list[Message]]:
    """Frames as a worker of this incarnation writes them, the parts of each together; the last of them is full."""
    totals: dict[str, float] = {}
    bases: dict[str, float] = {}
    queued: dict[str, int] = {}
    frames: list[list[Message]] = []
    revision = said = 0
    unsaid: dict[str, bool] = {}
    rebased: set[str] = set()

    def say(names: Any, *, full: bool) -> None:
        served = [] if full else [name for name in sorted(names) if not unsaid[name]]
        order = [*sorted(set(names) - set(served)), *served]
        rows = [
            row(name, base=bases.get(name, 0.0), charged=totals[name], queued=queued[name]) for name in order
        ]
        parts = max(1, len(rows)) if said % 4 == 3 else 1
        shares = [rows[part::parts] for part in range(parts)]
        charged = {name: totals[name] for name in served} if parts == 1 else {}
        told = {name: bases[name] for name in charged if name in rebased}
        whole = [
            frame("w1", incarnation, said, *share, full=full, part=part, parts=parts, revision=revision)
            for part, share in enumerate(shares)
        ]
        frames.append([(encode(replace(each, charged=charged, bases=told)), each) for each in whole])

    for kind, which in [*happenings, ("full", 0)]:
        if kind in {"serve", "admit"}:
            name, unsaid_yet = TENANTS[which // 2], which % 2
            unsaid[name] = unsaid.get(name, False) or kind == "admit" or name not in totals
            totals[name] = totals.get(name, 0.0) + 1.0
            queued[name] = queued.get(name, 0) + (kind == "admit") & 1
            if unsaid_yet:
                continue
            kind = "delta"  # noqa: PLW2901
        if kind == "rank":
            if (name := TENANTS[which // 2]) in totals:
                bases[name] = bases.get(name, 0.0) + 10.0
                rebased.add(name)
                unsaid.setdefault(name, False)
            continue
        if kind == "alive":
            said += 1
            sign = frame("w1", incarnation, said, full=False)
            frames.append([(encode(sign), sign)])
            continue
        if kind != "beat" or unsaid or not revision:
            said, revision = said + 1, revision + 1
            say(unsaid, full=False)
            unsaid.clear()
            rebased.clear()
        if kind != "delta":
            said += 1
            say(totals, full=True)
    return frames


happenings = st.lists(
    st.tuples(
        st.sampled_from(["serve", "serve", "admit", "admit", "rank", "delta", "full", "beat", "alive"]),
        st.integers(0, 5),
    ),
    min_size=20,
    max_size=40,
)


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "accounts"])
@settings(max_examples=150, deadline=None)
@given(
    st.lists(happenings, min_size=1, max_size=2),
    st.randoms(use_true_random=False),
    st.sampled_from([0.0, 0.1, 0.4]),
)
def test_what_is_left_out_was_known(
    rows: bool, lives: list[list[tuple[str, int]]], random: Any, hostility: float
) -> None:
    """Whatever is lost, repeated, late or reordered: to read as little as one may is to read all."""
    read, whole = Fleet(rows=rows), Fleet(rows=rows)
    reader = Reader(read)
    messages: list[Message] = []
    for number, life in enumerate(lives):
        for parts in _life(f"01{number}", life):
            messages += parts
    sent = [each for each in messages if random.random() >= hostility]
    for _ in range(int(hostility * len(messages))):
        sent.insert(random.randint(0, len(sent)), random.choice(messages))
    for _ in range(int(hostility * len(sent))):
        place = random.randrange(len(sent))
        sent.insert(min(len(sent), place + random.randint(0, 4)), sent.pop(place))
    now = 0.0
    for payload, each in sent:
        # Of a live worker a lower incarnation is a rival; of one that was silent for long, its successor.
        now += random.choice([0.01, 0.01, 4.0])
        assert read.merge(reader.read("w1", payload), now) == whole.merge(each, now)
        read.validate()
        if whole.workers["w1"].complete:
            assert read.workers["w1"].tenants == whole.workers["w1"].tenants
            assert read.workers["w1"].waiting == whole.workers["w1"].waiting
        assert {name: cost for name, cost in read.served.items() if cost} == {
            name: cost for name, cost in whole.served.items() if cost
        }
        assert read.workers["w1"].complete == whole.workers["w1"].complete


class Listener(Reader):
    """A reader, and the fleet into which all that it read was merged."""

    def __init__(self, *, rows: bool = True) -> None:
        self.fleet = Fleet(rows=rows)
        super().__init__(self.fleet)

    def read(self, worker: str, payload: bytes) -> Frame:
        """Merged already."""
        heard = super().read(worker, payload)
        self.fleet.merge(heard, 0.0)
        return heard


def _steady(reader: Listener, monkeypatch: pytest.MonkeyPatch, *, lose: int | None = None) -> list[int]:
    """How many rows were decoded of each of ten full frames of a hundred tenants, one of which changes in between."""
    decoded: list[int] = []
    real = module.decode_frame
    monkeypatch.setattr(
        reader, "_decode", lambda data: (heard := real(data), decoded.append(len(heard.tenants)))[0]
    )
    rows = {f"t{number:03}": row(f"t{number:03}") for number in range(100)}
    counts = []
    for revision in range(1, 11):
        rows["t000"] = row("t000", charged=float(revision))
        if revision != lose:
            reader.read(
                "w1", encode(frame("w1", "01A", 2 * revision, rows["t000"], full=False, revision=revision))
            )
        decoded.clear()
        reader.read("w1", encode(frame("w1", "01A", 2 * revision + 1, *rows.values(), revision=revision)))
        counts.append(sum(decoded))
    return counts


def test_full_frames_are_read_once_while_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first, the hundred rows of a full frame are not decoded again."""
    assert _steady(Listener(), monkeypatch) == [100] + [0] * 9


def test_a_lost_delta_makes_the_next_full_frame_news(monkeypatch: pytest.MonkeyPatch) -> None:
    """The full frame after a loss is read whole, and the ones after it are not."""
    assert _steady(Listener(), monkeypatch, lose=6) == [100, 0, 0, 0, 0, 100, 0, 0, 0, 0]


def _delta(seq: int, *others: str, **served: float) -> bytes:
    """A delta with its number as its revision, and as the lift of others than were served."""
    rows = *(row(name, lift=float(seq)) for name in others), *(row(n, charged=c) for n, c in served.items())
    return encode(frame("w1", "01A", seq, *rows, full=False, charged=served, revision=seq))


def test_of_a_delta_are_read_rows_of_which_more_than_a_charge_is_new() -> None:
    """They come first; the others' charges are all that an account is made of, so long as all before was read."""
    reader = Listener(rows=False)
    odd = 'x","tenants":[{"tenant":"y'
    names = ("a", "b", odd, "y")
    reader.read("w1", encode(frame("w1", "01A", 1, *map(row, names), revision=1)))
    for seq, others in enumerate([("a",), (), (odd, "y"), ("b", "y")], 2):
        served = {name: float(seq) for name in names if name not in others}
        heard = reader.read("w1", _delta(seq, *others, **served))
        assert ([each.tenant for each in heard.tenants], heard.charged) == ([*others], served)
        known = reader.fleet.workers["w1"].tenants
        assert {name: known[name].charged for name in served} == served
        assert {known[name].lift for name in others} == {float(seq)} or not others


def test_a_base_that_is_told_in_short_is_known() -> None:
    """Of a tenant that a delta tells no charge of, it is not: that one's row was read."""
    reader = Listener(rows=False)
    reader.read("w1", encode(frame("w1", "01A", 1, row("a"), row("b", base=1.0), revision=1)))
    rows = row("b", base=2.0, queued=1), row("a", base=-7.0, charged=3.0)
    said = frame("w1", "01A", 2, *rows, full=False, charged={"a": 3.0}, bases={"a": -7.0}, revision=2)
    assert [each.tenant for each in reader.read("w1", encode(said)).tenants] == ["b"]
    known = reader.fleet.workers["w1"].tenants
    assert {name: (each.base, each.virtual_time) for name, each in known.items()} == {
        "a": (-7.0, -4.0),
        "b": (2.0, 2.0),
    }


def test_after_a_lost_delta_all_rows_are_read() -> None:
    """Until the next full frame a row may be other than is known, whatever its worker last said of it."""
    reader = Listener(rows=False)
    reader.read("w1", encode(frame("w1", "01A", 1, row("a"), row("b"), revision=1)))
    assert len(reader.read("w1", _delta(2, a=2.0, b=2.0)).tenants) == 0
    for seq in (4, 5):
        assert len(reader.read("w1", _delta(seq, a=float(seq), b=float(seq))).tenants) == 2
    reader.read("w1", encode(frame("w1", "01A", 6, row("a", charged=5.0), row("b", charged=5.0), revision=5)))
    full = reader.fleet.workers["w1"]
    assert (full.tenants["a"].charged, full.tenants["b"].charged) == (5.0, 5.0)


def test_after_a_part_of_a_delta_is_lost_all_rows_are_read() -> None:
    """The next delta follows it by its revision; what the part said of its rows is not known all the same."""
    reader = Listener(rows=False)
    reader.read("w1", encode(frame("w1", "01A", 1, row("a"), row("b"), revision=1)))
    reader.read("w1", encode(frame("w1", "01A", 2, row("a"), full=False, parts=2, revision=2)))
    assert len(reader.read("w1", _delta(3, a=3.0, b=3.0)).tenants) == 2


@pytest.mark.parametrize("kept", ["rows", "accounts"])
def test_who_keeps_rows_reads_all_of_a_delta(kept: str) -> None:
    """A charge tells nothing of output: to a policy that looks at that, short words are no news."""
    reader = Listener(rows=kept == "rows")
    reader.read("w1", encode(frame("w1", "01A", 1, row("a"), revision=1)))
    assert len(reader.read("w1", _delta(2, a=2.0)).tenants) == (kept == "rows")


def test_a_delta_that_is_written_otherwise_is_read_whole() -> None:
    """With fields in another order, more spaces, or no row of whom it tells a charge: nothing of it is left out."""
    payload = _delta(2, "b", a=2.0)
    fields = msgspec.json.decode(payload)
    reordered = {"tenants": fields["tenants"], **fields}
    spaced = payload.replace(b'{"tenant":', b'{ "tenant":')
    nobody = payload.replace(b'"charged":{"a"', b'"charged":{"z"')
    full = payload.replace(b'"full":false', b'"full":true')
    for other in (encode(reordered), spaced, nobody, full):
        reader = Listener(rows=False)
        reader.read("w1", encode(frame("w1", "01A", 1, row("a"), row("b"), revision=1)))
        assert len(reader.read("w1", other).tenants) == 2


@pytest.mark.parametrize("parts", [1, 2])
def test_a_delta_that_came_after_a_lost_one_makes_up_for_nothing(parts: int) -> None:
    """With a delta lost, or a part of one, the next delta does not make the full frame after it known."""
    reader = Listener()
    known = frame("w1", "01A", 1, row("a"), row("b"), revision=1)
    lost = frame("w1", "01A", 2, row("a", charged=5.0), full=False, part=parts - 1, parts=parts, revision=2)
    first_part = replace(lost, part=0, tenants=())
    for each in (known, first_part) if parts == 2 else (known,):
        reader.read("w1", encode(each))
    reader.read("w1", encode(frame("w1", "01A", 3, row("b", charged=1.0), full=False, revision=3)))
    full = frame("w1", "01A", 4, row("a", charged=5.0), row("b", charged=1.0), revision=3)
    assert reader.read("w1", encode(full)) == full


@pytest.mark.parametrize("came", [0, 1])
def test_a_delta_of_which_a_part_is_lost_makes_the_next_full_frame_news(came: int) -> None:
    """It says that nothing happened since that delta: true, but only one half of the delta is known."""
    reader = Listener()
    rows = row("a", charged=5.0), row("b", charged=1.0)
    reader.read("w1", encode(frame("w1", "01A", 1, row("a"), row("b"), revision=1)))
    part = frame("w1", "01A", 2, rows[came], full=False, part=came, parts=2, revision=2)
    reader.read("w1", encode(part))
    full = frame("w1", "01A", 3, *rows, revision=2)
    assert reader.read("w1", encode(full)) == full
    reader.read("w1", encode(replace(full, seq=4)))
    assert {name: each.charged for name, each in reader.fleet.workers["w1"].tenants.items()} == {
        "a": 5.0,
        "b": 1.0,
    }


def _alive(reader: Listener, seq: int) -> None:
    reader.read("w1", encode(frame("w1", "01A", seq, full=False)))


def test_a_heartbeat_without_revision_says_nothing_of_what_was_read() -> None:
    """A sleeping worker of many tenants sends them between its full frames: what was known is, what was lost is not."""
    reader = Listener()
    full = frame("w1", "01A", 1, row("a", charged=1.0), revision=1)
    reader.read("w1", encode(full))
    _alive(reader, 2)
    assert not reader.read("w1", encode(replace(full, seq=3))).tenants
    _alive(reader, 5)  # of 4, a delta with revision 2, nothing came
    full = frame("w1", "01A", 6, row("a", charged=2.0), revision=2)
    assert reader.read("w1", encode(full)) == full
    part = frame("w1", "01A", 7, row("b", charged=1.0), full=False, part=1, parts=2, revision=3)
    reader.read("w1", encode(part))
    _alive(reader, 8)
    full = frame("w1", "01A", 9, row("a", charged=3.0), row("b", charged=1.0), revision=3)
    assert reader.read("w1", encode(full)) == full


def test_what_was_read_while_another_process_had_the_name_is_not_known() -> None:
    """It was read in vain: after the other fell silent, a late frame must not make what was refused count as known."""
    fleet = Fleet()
    reader = Reader(fleet)

    def hear(now: float, each: Frame) -> bool:
        return fleet.merge(reader.read("w1", encode(each)), now)

    first = frame("w1", "01A", 1, row("a", charged=1.0), revision=1)
    news = row("a", charged=5.0)
    assert hear(0.0, frame("w1", "01B", 1, row("a"), revision=1))
    assert not hear(1.0, first)
    assert not hear(2.0, frame("w1", "01A", 2, news, full=False, revision=2))
    assert hear(9.0, first)
    assert hear(9.1, frame("w1", "01A", 3, news, revision=2))
    assert fleet.workers["w1"].tenants["a"].charged == 5.0


def test_a_full_frame_is_read_now_and_then_whatever_it_says() -> None:
    """One in 600 is read whole although it repeats what is known: what a delta left out is not lost for ever."""
    reader = Listener()
    read = [
        reader.read("w1", encode(frame("w1", "01A", seq, row("a"), revision=1)))
        for seq in range(3 * MAX_UNREAD)
    ]
    gaps = [seq for seq, each in enumerate(read) if each.full]
    assert gaps[0] == 0
    assert {later - before for before, later in pairwise(gaps[1:])} == {MAX_UNREAD + 1}


def test_frames_of_other_writers_are_read_whole() -> None:
    """No revision, or another order of fields: nothing is promised, so nothing is left out."""
    plain = frame("w1", "01A", 1, row("a"))
    fields = msgspec.json.decode(encode(frame("w1", "01A", 1, row("a"), revision=1)))
    reordered = encode({"tenants": fields.pop("tenants"), **fields})
    for payload in (encode(plain), reordered):
        reader = Listener()
        assert all(reader.read("w1", payload).full for _ in range(3))


def test_nobody_speaks_for_another_worker() -> None:
    """A frame on one worker's subject that claims to be of another is refused, and changes nothing for that one."""
    reader = Listener()
    reader.read("w1", encode(frame("w1", "01A", 1, row("a"), revision=1)))
    for forged in (frame("w1", "01A", 2, full=False, revision=2), frame("w1", "01A", 2, revision=1)):
        with pytest.raises(ImpostorError, match="it claims to be of worker 'w1'"):
            reader.read("w2", encode(forged))
    assert reader.read("w1", encode(frame("w1", "01A", 2, row("a"), revision=1))).tenants == ()


def test_of_a_row_is_read_what_an_account_is_made_of() -> None:
    """Fields that are read of a tenant are those of its status, with the same names, kinds and defaults."""
    said = {each.encode_name: each for each in msgspec.structs.fields(TenantStatus)}
    for each in msgspec.structs.fields(TenantSeen):
        assert (each.name, each.type, each.default) == (
            (known := said[each.encode_name]).name,
            known.type,
            known.default,
        )
