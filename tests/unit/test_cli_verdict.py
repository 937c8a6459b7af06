"""From the replies of several workers to one exit code."""

from typing import Any

import pytest

from coxswain.control.cli.exits import Exit
from coxswain.control.cli.verdict import MAX_PROBLEMS, judge, outcome, skew_s
from coxswain.schemas.commands import Reply, TargetResult, Targets


def _reply(worker: str = "w1", **fields: Any) -> Reply:
    plain = {"id": "c1", "incarnation": "i", "worker_now": 0.0, "step": 8, "outcome": "applied"}
    return Reply(**{**plain, "worker": worker, **fields})


def _unknown(worker: str) -> Reply:
    return _reply(worker, outcome="rejected", code=404, error="no such request")


def _partial(worker: str, *missing: str) -> Reply:
    results = tuple(TargetResult(request=name, outcome="not_found") for name in missing)
    return _reply(
        worker, outcome="partial", counts={"applied": 1, "not_found": len(missing)}, results=results
    )


ONE = Targets(requests=("r1",))
TWO = Targets(requests=("r1", "r2"))


def test_one_worker_that_has_the_request_is_enough() -> None:
    """A 404 of the others is no failure, and is not shown."""
    verdict = judge("held", "request", ONE, [_reply(counts={"applied": 1}), _unknown("w2")])
    assert verdict.code is Exit.DONE
    assert verdict.lines == ("w1: held 1 request from step 8",)
    assert verdict.problems == ()


def test_a_request_that_nobody_has_is_not_found() -> None:
    """Workers that say the same are named in one line."""
    verdict = judge("held", "request", ONE, [_unknown("w1"), _unknown("w2")])
    assert verdict.code is Exit.NOT_FOUND
    assert verdict.problems == ("w1, w2 refused (404): no such request",)


def test_requests_spread_over_workers_are_one_whole() -> None:
    """Each worker misses what the other has; together nothing is missing."""
    verdict = judge("held", "request", TWO, [_partial("w1", "r2"), _partial("w2", "r1")])
    assert verdict.code is Exit.DONE
    assert verdict.missing == ()


def test_what_no_worker_has_makes_it_partial() -> None:
    """The request that is missing everywhere is named."""
    verdict = judge("held", "request", TWO, [_partial("w1", "r2"), _unknown("w2")])
    assert verdict.code is Exit.PARTIAL
    assert verdict.missing == ("r2",)
    assert "r2" in verdict.problems[0]


def test_a_missing_class_is_called_a_class() -> None:
    """A class that no worker knows is not taken for a request."""
    targets = Targets(requests=("r1",), classes=("chat",))
    [problem] = judge("held", "request", targets, [_partial("w1", "chat")]).problems
    assert problem.startswith("no class chat on w1")


def test_a_refusal_by_all_is_a_refusal() -> None:
    """Code and text of the refusal are shown; a 404 beside it does not soften it."""
    refusal = _reply(outcome="rejected", code=422, error="loading remote KV")
    verdict = judge("held", "request", ONE, [refusal, _unknown("w2")])
    assert verdict.code is Exit.REFUSED
    assert verdict.problems == ("w1 refused (422): loading remote KV",)


def test_a_refusal_by_some_is_partial() -> None:
    """What was applied elsewhere stays applied, and the exit code says that it is not all."""
    refusal = _reply("w2", outcome="rejected", code=429, error="queue full")
    verdict = judge("held", "request", Targets(all=True), [_reply(counts={"applied": 2}), refusal])
    assert verdict.code is Exit.PARTIAL
    assert verdict.lines == ("w1: held 2 requests from step 8",)
    assert verdict.problems == ("w2 refused (429): queue full",)


def test_targets_that_cannot_be_changed_now_are_partial() -> None:
    """A `not_possible` target is shown with the worker's reason."""
    failed = TargetResult(request="r2", outcome="not_possible", detail="loading remote KV", child=1)
    reply = _reply(outcome="partial", counts={"applied": 1, "not_possible": 1}, results=(failed,))
    verdict = judge("held", "request", TWO, [reply])
    assert verdict.code is Exit.PARTIAL
    assert verdict.problems == ("w1: not possible for r2 (child 1): loading remote KV",)


def test_nothing_that_matches_is_done_and_said() -> None:
    """A tenant without requests is no error, but the user is told that nothing happened."""
    verdict = judge("held", "request", Targets(tenants=("acme",)), [_reply()])
    assert verdict.code is Exit.DONE
    assert verdict.lines == ("nothing to do: no request matched",)


def test_tokens_in_flight_are_announced() -> None:
    """Tokens that still reach the client are counted in the line."""
    result = TargetResult(request="r1", outcome="applied", in_flight_tokens=1)
    [line] = judge("held", "request", ONE, [_reply(counts={"applied": 1}, results=(result,))]).lines
    assert line.endswith("1 token in flight still to arrive")


def test_results_left_out_are_judged_by_counts() -> None:
    """More failures than a reply lists still make it partial."""
    targets = Targets(requests=tuple(f"r{number}" for number in range(3_000)))
    counts = {"applied": 1_000, "not_found": 2_000}
    replies = [_reply("w1", outcome="partial", counts=counts, results_omitted=2_000), _unknown("w2")]
    assert judge("held", "request", targets, replies).code is Exit.PARTIAL


def test_problem_lines_are_bounded() -> None:
    """A thousand failures do not scroll the screen away."""
    failed = tuple(TargetResult(request=f"r{number}", outcome="not_possible") for number in range(500))
    reply = _reply(outcome="partial", counts={"applied": 1, "not_possible": 500}, results=failed)
    problems = judge("held", "request", Targets(all=True), [reply]).problems
    assert len(problems) == MAX_PROBLEMS + 1
    assert problems[-1].startswith("… and 490 more")


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (Exit.DONE, "applied"),
        (Exit.PARTIAL, "partial"),
        (Exit.REFUSED, "rejected"),
        (Exit.NOT_FOUND, "rejected"),
    ],
)
def test_the_outcome_follows_the_wire(code: Exit, word: str) -> None:
    """The JSON output uses the protocol's three words."""
    reply = {
        Exit.DONE: [_reply()],
        Exit.PARTIAL: [_partial("w1", "r1")],
        Exit.REFUSED: [_reply(outcome="rejected", code=409)],
        Exit.NOT_FOUND: [_unknown("w1")],
    }[code]
    verdict = judge("held", "request", TWO, reply)
    assert verdict.code is code
    assert outcome(verdict) == word


@pytest.mark.parametrize(("worker_now", "skew"), [(10.5, 0.0), (13.0, 2.0), (7.0, -3.0)])
def test_only_what_the_round_trip_cannot_explain_is_skew(worker_now: float, skew: float) -> None:
    """Between asking at 10 and the answer at 11 a clock may say anything in between."""
    assert skew_s(worker_now, 10.0, 11.0) == skew
