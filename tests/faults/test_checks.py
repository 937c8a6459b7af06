"""The checks of the fault suite see what they are there for: negative controls, without any process."""

from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from coxswain.schemas import events as ev
from coxswain.schemas.status import CommandStats
from tests.faults import checks
from tests.faults.load import Asked
from tests.faults.steps import MODES, SPECIAL, one
from tests.faults.watch import Log
from tests.support import random_run
from tests.support.frames import frame, row
from tests.support.serving import Piece

WORDS = [7, 8, 9]
COUNTS = {
    "uncached_input_tokens": 1, "cached_input_tokens": 0, "recomputed_tokens": 0, "queued_s": 0.0, "ttft_s": 0.0,
    "held_s": 0.0, "run_s": 0.0,
}  # fmt: skip


def asked(*pieces: Piece, request: str = "r1", **fields: Any) -> Asked:
    """A request that should say `WORDS` and got these."""
    tokens = [token for piece in pieces for token in piece.tokens]
    finish = next((piece.finish for piece in pieces if piece.finish), None)
    stream = SimpleNamespace(pieces=pieces, tokens=tokens, finish=finish, request=request, began=0.0)
    return Asked("w1", 1, "acme", WORDS, stream, **fields)


WHOLE = Piece((7, 8, 9), 1.0, "length")


def log(*events: tuple[type[ev.Event], float, dict[str, Any]]) -> Log:
    """A log of one incarnation."""
    made = Log()
    for seq, (kind, at, fields) in enumerate(events, 1):
        envelope = {"id": str(seq), "worker": "w1", "incarnation": "01A", "seq": seq, "at": at, "step": 1}
        made.add(kind(**(envelope | {"request": "r1", "child": 0, "tenant": "acme"} | fields)))
    return made


FINISHED = (ev.Finished, 9.0, {"reason": "length", "output_tokens": 3, **COUNTS})
HELD = (ev.Held, 1.0, {"by": "operator", "kv": "keep", "reason": "command", "lease_s": 0.5})


@pytest.mark.parametrize(
    ("pieces", "fields", "verdict"),
    [
        ((WHOLE,), {}, "ok"),
        ((Piece((7,), 1.0, None),), {"left": True}, "left"),
        ((Piece((7,), 1.0, None),), {"error": "gone"}, "failed"),
        ((Piece((7, 9), 1.0, None),), {"error": "gone"}, "other tokens"),
        ((Piece((7, 8), 1.0, "length"),), {}, "2 of 3 tokens"),
        ((WHOLE, Piece((), 2.0, "length")), {}, "2 ends"),
        ((Piece((7, 8, 9), 1.0, "abort"),), {}, "finish abort"),
    ],
)
def test_a_stream_that_is_not_what_it_must_be_is_seen(pieces: Any, fields: Any, verdict: str) -> None:
    """Other tokens, too few, two ends or another reason are no good end, whatever else happened."""
    one = asked(*pieces, **fields)
    assert verdict in one.verdict
    assert bool(list(checks.ended([one], frozenset()))) == (verdict not in {"ok", "left"})
    assert bool(list(checks.ended([one], frozenset({"w1"})))) == (verdict not in {"ok", "left", "failed"})


def test_a_hold_that_outlives_its_lease_is_seen() -> None:
    """By whatever it ended at last; one that was replaced is bounded by the longest, one for room by nothing."""
    again = (ev.Held, 1.2, {"by": "controller", "kv": "keep", "reason": "command", "lease_s": 3.0})
    room = (ev.Held, 1.3, {"by": "engine", "kv": "keep", "reason": "cut-in", "lease_s": None})
    on_time = (ev.Continued, 1.6, {"by": "engine", "reason": "lease", "held_s": 0.6})
    late = (ev.Continued, 4.0, {"by": "operator", "reason": "command", "held_s": 3.0})
    assert not list(checks.leases(log(HELD, on_time), 1.0))
    assert not list(checks.leases(log(HELD, again, late), 1.0))
    assert not list(checks.leases(log(HELD, room, late), 1.0))
    assert "2.50 s after its lease" in next(checks.leases(log(HELD, late), 1.0))


def test_a_request_that_ends_twice_or_never_is_seen() -> None:
    """In the log; that one is missing counts only where no event was lost."""
    lives = {"w1": 1}
    assert not list(checks.once([asked(WHOLE)], log(FINISHED), lives, complete=True))
    assert "2 `finished`" in next(checks.once([asked(WHOLE)], log(FINISHED, FINISHED), lives, complete=False))
    assert "no `finished`" in next(checks.once([asked(WHOLE)], log(HELD), lives, complete=True))
    assert not list(checks.once([asked(WHOLE)], log(HELD), lives, complete=False))


def test_totals_that_are_not_what_clients_have_are_seen() -> None:
    """A token too many, or an end too few, of one tenant on one worker."""
    before = {"w1": frame("w1", "01A", 1, row("acme", output_tokens_total=10, finished_total=2))}
    for tokens, count, right in ((13, 3, True), (14, 3, False), (13, 2, False)):
        after = {"w1": frame("w1", "01A", 2, row("acme", output_tokens_total=tokens, finished_total=count))}
        found = list(checks.totals([asked(WHOLE)], before, after, log(), {"w1": 1}, complete=True))
        assert (not found) == right


@pytest.mark.vllm
@pytest.mark.parametrize("mode", [MODES[-1], SPECIAL[-1]], ids=["plain", "all-kinds"])
def test_random_steps_run(mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One short run of what the long form ends with; one that fails says what did not hold."""
    monkeypatch.setattr(random_run.Run, "look", broken)
    failed = one(1, mode, requests=30)
    assert failed.problem == "AssertionError: a block is lost"
    monkeypatch.undo()
    taken = one(1, mode, requests=30)
    assert taken.problem == ""
    assert taken.steps > 60 >= failed.steps
    assert taken.commands > 15


@pytest.mark.vllm
def test_a_session_that_loses_its_kv_with_its_last_token_under_way_goes_on() -> None:
    """vLLM would forget its words and never run it again, and queueing it twice ended our engine: seed 70 found it."""
    assert one(70, SPECIAL[-1], requests=120).problem == ""


def broken(_: random_run.Run) -> None:
    """Find fault."""
    raise AssertionError("a block is lost")


def test_an_answer_without_a_word_is_none() -> None:
    """vLLM gives it while it drains; otherwise, and from who was not told to end, it is a fault."""
    silent = asked()
    assert silent.verdict == "empty"
    assert not list(checks.ended([silent], frozenset({"w1"}), drains=True))
    assert list(checks.ended([silent], frozenset({"w1"})))
    assert list(checks.ended([silent], frozenset({"w2"}), drains=True))


def test_what_is_left_and_what_has_grown_is_seen() -> None:
    """A queue, a hold, memory, open files; not the commands of controllers, who do not rest."""
    assert not list(checks.empty({"w1": frame(commands=CommandStats(queue_depth=3))}))
    assert (
        len(list(checks.empty({"w1": frame(held=1, queued=2, commands=CommandStats(queue_depth=99))}))) == 3
    )
    here = psutil.Process().memory_info().rss
    before = checks.Level({}, {"w1 engine": (here, 10)})
    assert not list(checks.grown(before, checks.Level({}, {"w1 engine": (here, 12)})))
    assert len(list(checks.grown(before, checks.Level({}, {"w1 engine": (here + (65 << 20), 90)})))) == 2
