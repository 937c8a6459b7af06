"""Counters over few tenants: what is served is credited once, to a name or to `other`, whatever restarts or changes."""

from collections import Counter, defaultdict

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coxswain.schemas import metrics as names
from coxswain.schemas.names import OTHER
from coxswain.schemas.status import ClassStatus, CommandStats
from coxswain.service.edge.tally import KEPT_S, MAX_CLASSES, TENURE_S, Tally
from tests.support.frames import frame, row

OUTPUT = names.TENANT_OUTPUT.name
TENANTS = [f"t{number}" for number in range(8)]
WORKERS = ["w1", "w2"]


class Fleet:
    """Two workers that serve what they are told, restart, and are looked at; says what was really served."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.seq = 0
        self.lives = dict.fromkeys(WORKERS, 1)
        self.here: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.truth: Counter[str] = Counter()

    def serve(self, worker: str, tenant: str, tokens: int) -> None:
        """A tenant is served so much."""
        self.here[worker][tenant] += tokens
        self.truth[tenant] += tokens

    def frame(self, worker: str):
        """A worker's full frame as of now, and when."""
        self.seq += 1
        rows = [row(name, output_tokens_total=total) for name, total in self.here[worker].items()]
        commands = CommandStats(outcomes_total={"rank": {"applied": sum(self.here[worker].values())}})
        return self.now, frame(worker, f"01{self.lives[worker]:04}", self.seq, *rows, commands=commands)

    def restart(self, worker: str) -> None:
        """A new incarnation, with totals from nothing."""
        self.lives[worker] += 1
        self.here[worker].clear()


def shown(tally: Tally) -> dict[tuple[str, str], int]:
    """Every series of output tokens, by worker and label."""
    return {
        (worker, label): served.get(OUTPUT, 0)
        for worker, life in tally.workers.items()
        for label, served in life.served.items()
    }


ACTS = st.one_of(
    st.tuples(st.just("serve"), st.sampled_from(WORKERS), st.sampled_from(TENANTS), st.integers(1, 5_000)),
    st.tuples(st.just("look"), st.floats(0.1, 2 * TENURE_S)),
    st.tuples(st.just("restart"), st.sampled_from(WORKERS)),
    st.tuples(st.just("wait"), st.floats(0.0, 1.2 * KEPT_S)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTS, max_size=60), st.integers(0, 3))
def test_what_is_served_is_counted_once_and_nothing_is_taken_back(acts, limit):
    """Whatever happens in whatever order: all series and what ended add up to what was served, and none shrinks."""
    fleet, tally, before = Fleet(), Tally(limit), {}
    for act in [*acts, ("look", 1.0)]:
        match act:
            case ("serve", worker, tenant, tokens):
                fleet.serve(worker, tenant, tokens)
            case ("wait", seconds):
                fleet.now += seconds
            case ("restart", worker):
                tally.take([fleet.frame(worker)], fleet.now)  # its last frame
                fleet.restart(worker)
            case ("look", seconds):
                fleet.now += seconds
                tally.take([fleet.frame(worker) for worker in WORKERS], fleet.now)
                series = shown(tally)
                assert sum(series.values()) + tally.dropped.get(OUTPUT, 0) == fleet.truth.total()
                assert {label for _, label in series} <= {*TENANTS, OTHER}
                assert len({label for _, label in series} - {OTHER}) <= 2 * limit
                for key, value in series.items():
                    if before.get(key, 0) > value:  # a series that ended, and begins anew
                        assert value == 0 or key not in before
                        assert key[1] != OTHER
                before = series
                # As another API server process would find it.
                tally = _through_bytes(tally)
    applied = sum(life.commands["rank", "applied"] for life in tally.workers.values())
    assert applied == fleet.truth.total()


def test_verbs_and_outcomes_that_there_are_not_make_no_series() -> None:
    """Labels are few whatever a worker says; all of them together still count everything."""
    strange = {f"verb-{n}": {f"outcome-{n}": 1} for n in range(500)} | {"abort": {"404": 2, "999": 1}}
    tally = Tally(1)
    tally.take([(1.0, frame("w1", "01A", 1, commands=CommandStats(outcomes_total=strange)))], 1.0)
    (life,) = tally.workers.values()
    assert life.commands == {(OTHER, OTHER): 500, ("abort", "404"): 2, ("abort", OTHER): 1}


def _through_bytes(tally: Tally) -> Tally:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(tally), type=Tally)


def _look(fleet: Fleet, tally: Tally, after_s: float = 15.0) -> None:
    fleet.now += after_s
    tally.take([fleet.frame("w1")], fleet.now)


def test_a_place_goes_to_who_is_served_much_more_and_for_long():
    """Tenants of about equal rates keep their series for good; one with a multiple of it gets one, after a while."""
    fleet, tally = Fleet(), Tally(2)
    for turn in range(60):
        for tenant, tokens in (("t0", 1_000), ("t1", 1_000 + 300 * (turn % 2)), ("t2", 1_150)):
            if turn or tenant != "t2":  # who comes last finds both places taken
                fleet.serve("w1", tenant, tokens)
        _look(fleet, tally)
        assert set(tally.named) == {"t0", "t1"}, turn
    for _ in range(30):
        fleet.serve("w1", "t0", 1_000)
        fleet.serve("w1", "t1", 1_200)
        fleet.serve("w1", "t2", 4_000)
        _look(fleet, tally)
    assert set(tally.named) == {"t1", "t2"}


def test_who_loses_its_place_is_shown_still_for_a_while_and_counts_as_other():
    """Its series stands still, what it is served from then on is in `other`; later the series ends."""
    fleet, tally = Fleet(), Tally(1)
    fleet.serve("w1", "t0", 100)
    _look(fleet, tally)
    for _ in range(30):
        fleet.serve("w1", "t1", 1_000)
        _look(fleet, tally)
    assert tally.label("t0") == OTHER
    assert shown(tally)["w1", "t0"] == 100
    other = shown(tally)["w1", OTHER]
    fleet.serve("w1", "t0", 7)
    _look(fleet, tally)
    assert shown(tally)["w1", "t0"] == 100
    assert shown(tally)["w1", OTHER] == other + 7
    _look(fleet, tally, KEPT_S + 1)
    assert ("w1", "t0") not in shown(tally)
    assert shown(tally)["w1", OTHER] == other + 7, "the end of a series is no service"


def test_a_new_place_begins_at_nothing():
    """Prometheus sees a series begin at 0, so that its first increment counts."""
    fleet, tally = Fleet(), Tally(1)
    fleet.serve("w1", "t0", 1)
    _look(fleet, tally)
    while "t1" not in tally.named:
        fleet.serve("w1", "t1", 1_000)
        _look(fleet, tally)
    assert shown(tally)["w1", "t1"] == 0


def test_frames_that_come_late_or_again_change_nothing():
    """A frame with an older number, or of an earlier incarnation, was counted already."""
    fleet, tally = Fleet(), Tally(1)
    fleet.serve("w1", "t0", 5)
    old = fleet.frame("w1")
    tally.take([old, old], fleet.now)
    fleet.restart("w1")
    fleet.serve("w1", "t0", 3)
    tally.take([fleet.frame("w1"), old], fleet.now)
    assert shown(tally) == {("w1", "t0"): 8}
    assert tally.workers["w1"].restarts == 1


def test_a_tenant_called_other_is_one_of_the_others():
    """Its name can be no label of its own."""
    fleet, tally = Fleet(), Tally(5)
    fleet.serve("w1", OTHER, 5)
    _look(fleet, tally)
    assert tally.named == {}
    assert shown(tally) == {("w1", OTHER): 5}


@pytest.mark.parametrize("count", [3, MAX_CLASSES + 9])
def test_classes_have_a_bounded_number_of_names(count):
    """A client that invents classes makes no series beyond the first ones."""
    names_given = [f"c{number}" for number in range(count)]
    rows = [
        ClassStatus(class_=name, queued=0, running=0, held=0, oldest_queued_s=0.0) for name in names_given
    ]
    tally = Tally(1)
    tally.take([(1.0, frame("w1", classes=tuple(rows)))], 1.0)
    labels = {tally.class_label(name) for name in names_given}
    assert len(labels) == min(count, MAX_CLASSES + 1)


def test_what_was_charged_ahead_and_given_back_is_not_counted_twice():
    """Virtual time falls when expected output did not come; charged again up to where it was, it is no news."""
    tally, charged = Tally(5), names.TENANT_CHARGED.name
    for seq, so_far in enumerate((0.0, 100.0, 40.0, 90.0, 130.0), 1):
        tally.take([(1_000.0 + seq, frame("w1", "010001", seq, row("acme", charged=so_far)))], 1_000.0 + seq)
    assert tally.workers["w1"].served["acme"][charged] == 130.0
