"""From the replies of several workers to one answer for the user.

Pure: no clock, no NATS, no terminal. A command to `all` reaches workers that do not have the request; their
404 is no failure as long as another worker has it. Called by `steer.py`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from coxswain.control.cli.exits import Exit
from coxswain.control.cli.words import plural
from coxswain.schemas.commands import Reply, TargetResult, Targets
from coxswain.schemas.errors import Code

MAX_PROBLEMS: Final = 10
"""Problem lines shown for people; `--json` has all."""
_FOUND: Final = ("applied", "unchanged", "not_possible")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a command came to, over all workers that answered."""

    code: Exit
    lines: tuple[str, ...] = ()
    """What was done, for stdout."""
    problems: tuple[str, ...] = ()
    """What was not done and why, for stderr."""
    missing: tuple[str, ...] = ()
    """Named requests and classes that no worker knows, where some were found."""


def judge(done: str, noun: str, targets: Targets | None, replies: Sequence[Reply]) -> Verdict:
    """The exit code and the words for `replies` (at least one).

    Args:
        done: the verb as a participle, "held"; for commands about no requests all that was done.
        noun: what was counted, "request".
        targets: what the command named; None for commands about no requests.
        replies: one per worker.
    """
    accepted = [reply for reply in replies if reply.outcome != "rejected"]
    refused = [reply for reply in replies if reply.outcome == "rejected" and reply.code != Code.NOT_FOUND]
    missing = _missing(targets, replies) if targets and accepted else ()
    failed = [
        (reply.worker, result)
        for reply in accepted
        for result in reply.results
        if result.outcome == "not_possible"
    ]
    if not accepted:
        code = Exit.REFUSED if refused else Exit.NOT_FOUND
        return Verdict(code=code, problems=_bounded(_refusals(refused or replies)))
    problems = _refusals(refused)
    problems += [_failed_line(worker, result) for worker, result in failed]
    problems += _missing_lines(targets, missing, replies)
    if targets is None:  # then replies count nothing: who accepted did all of it
        lines = [f"{reply.worker}: {done} from step {reply.step}" for reply in accepted]
    else:
        lines = [line for reply in accepted if (line := _done_line(done, noun, reply))]
    partial = bool(refused or failed or missing or _short(targets, accepted))
    return Verdict(
        code=Exit.PARTIAL if partial else Exit.DONE,
        lines=tuple(lines) or (f"nothing to do: no {noun} matched",),
        problems=_bounded(problems),
        missing=missing,
    )


def outcome(verdict: Verdict) -> str:
    """The verdict in the wire's words."""
    return {Exit.DONE: "applied", Exit.PARTIAL: "partial"}.get(verdict.code, "rejected")


def _missing(targets: Targets, replies: Sequence[Reply]) -> tuple[str, ...]:
    """Named requests and classes that every worker says it does not have."""
    named = dict.fromkeys((*targets.requests, *targets.classes))
    for reply in replies:
        if reply.code == Code.NOT_FOUND:
            continue
        unknown = {result.request for result in reply.results if result.outcome == "not_found"}
        if reply.outcome == "rejected":  # refused for another reason: it says nothing about who exists
            unknown = set()
        named = {name: None for name in named if name in unknown}
    return tuple(named)


def _short(targets: Targets | None, accepted: Sequence[Reply]) -> bool:
    """Whether results left out of a reply hide failures that no list shows: then the counts decide."""
    if targets is None or not any(reply.results_omitted for reply in accepted):
        return False
    counts = sum((Counter(reply.counts) for reply in accepted), Counter[str]())
    return counts["not_possible"] > 0 or sum(counts[name] for name in _FOUND) < targets.count


def _done_line(done: str, noun: str, reply: Reply) -> str:
    applied, unchanged = reply.counts.get("applied", 0), reply.counts.get("unchanged", 0)
    if not applied and not unchanged:
        return ""
    parts = []
    if applied:
        parts.append(f"{done} {plural(applied, noun)} from step {reply.step}")
    if unchanged:
        parts.append(f"{unchanged} unchanged")
    if in_flight := sum(result.in_flight_tokens for result in reply.results):
        parts.append(f"{plural(in_flight, 'token')} in flight still to arrive")
    return f"{reply.worker}: {', '.join(parts)}"


def _refusals(refused: Sequence[Reply]) -> list[str]:
    """One line per reason, in the workers' own words, with who said it."""
    said: dict[tuple[int | None, str], list[str]] = {}
    for reply in refused:
        said.setdefault((reply.code, reply.error or "no reason given"), []).append(reply.worker)
    return [f"{', '.join(workers)} refused ({code}): {reason}" for (code, reason), workers in said.items()]


def _failed_line(worker: str, result: TargetResult) -> str:
    child = "" if result.child is None else f" (child {result.child})"
    return f"{worker}: not possible for {result.request}{child}: {result.detail or 'no reason given'}"


def _missing_lines(targets: Targets | None, missing: tuple[str, ...], replies: Sequence[Reply]) -> list[str]:
    where = replies[0].worker if len(replies) == 1 else f"any of {len(replies)} workers"
    requests = frozenset(targets.requests if targets else ())
    return [
        f"no request {name} on {where}: finished, or never there (`cox requests` lists them)"
        if name in requests
        else f"no class {name} on {where} (`cox classes` lists them)"
        for name in missing
    ]


def _bounded(problems: list[str]) -> tuple[str, ...]:
    if len(problems) <= MAX_PROBLEMS:
        return tuple(problems)
    rest = len(problems) - MAX_PROBLEMS
    return (*problems[:MAX_PROBLEMS], f"… and {rest} more (--json shows all)")


def skew_s(worker_now: float, asked_at: float, answered_at: float) -> float:
    """By how many s a worker's clock is ahead of ours (negative: behind) beyond what the way explains."""
    if worker_now > answered_at:
        return worker_now - answered_at
    return min(0.0, worker_now - asked_at)
