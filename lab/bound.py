"""How far apart tenants come while both want more than they get, and how far VTC says that they may. Pure.

Sheng et al., OSDI'24. Service is what is charged: wp × input at admission, wq × output as it comes, ÷ the tenant's
weight. M is how many tokens a running batch can hold, and U = max(wp × longest input, wq × M).

    Theorem 4.4   |W_f(t1, t2) − W_g(t1, t2)| ≤ 2U     for any two that are backlogged from t1 to t2
    Theorem 4.8   ≥ wq × M                             for some traffic, under any scheduler that never preempts

A tenant is backlogged while it has anything queued. Called by `command`, `bench` and tests.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Final

import msgspec
import numpy as np

from coxswain.control.policy import weight_of
from coxswain.lab.life import QUEUED, RUNNING, Life
from coxswain.lab.metrics import Array
from coxswain.lab.setup import Setup
from coxswain.lab.trace import tenants

Flags = np.ndarray[Any, np.dtype[np.bool_]]
WP: Final = 1.0
WQ: Final = 2.0
SHORT_S: Final = 1e-9


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """How far tenants came apart. Weighted tokens ÷ weight."""

    most: float
    """The most by which service of two backlogged tenants differed, over any time in which both were."""
    between: tuple[str, str] | None
    """Which two; None if no two were backlogged at once."""
    bound: float
    """2U, of all workers together."""
    lower: float
    """wq × M."""
    together_s: float
    """For how long all tenants were backlogged at once, in the longest such time."""
    uneven: float | None
    """By which part the service ÷ weight of one of them was off their mean in that time; None if there was none."""


def gap(lives: Sequence[Life], setup: Setup) -> Gap:
    """Look at a run."""
    names = tenants([life.arrival for life in lives])
    weights = np.array([weight_of(setup.tables.tenants, name) for name in names])
    times = np.unique([at_s for life in lives for at_s, _ in life.states])
    before, after = served(lives, names, times)
    before, after = before / weights[:, None], after / weights[:, None]
    waits = backlogged(lives, names, times)
    most, between = 0.0, None
    for one, other in combinations(range(len(names)), 2):
        ahead_before, ahead_after = before[one] - before[other], after[one] - after[other]
        for begin, end in _runs(waits[one] & waits[other]):
            # What begins at the end, with the request that was waited for, is no longer in it.
            ahead = np.concatenate((ahead_after[begin:end], ahead_before[begin + 1 : end + 1]))
            apart = float(np.ptp(ahead))
            if apart > most:
                most, between = apart, (names[one], names[other])
    together_s, uneven = _together(waits, times, before, after)
    unit = _unit(lives, setup)
    return Gap(
        most=most, between=between, bound=2 * max(WP * _longest_input(lives), WQ * unit) / float(weights.min()),
        lower=WQ * unit, together_s=together_s, uneven=uneven,
    )  # fmt: skip


def served(lives: Sequence[Life], names: Sequence[str], times: Array) -> tuple[Array, Array]:
    """What each tenant had been charged just before and just after each time; shape (tenants, times)."""
    places = {name: place for place, name in enumerate(names)}
    before = np.zeros((len(names), len(times)))
    after = np.zeros_like(before)
    for life in lives:
        begun_s = next((at_s for at_s, state in life.states if state == RUNNING), None)
        if begun_s is None:
            continue
        place, prompt = places[life.arrival.tenant], WP * life.arrival.prompt_tokens
        first_s = float("inf") if life.first_token_s is None else life.first_token_s
        more = WQ * _after_first(life, times)
        before[place] += prompt * (times > begun_s) + WQ * (times > first_s) + more
        after[place] += prompt * (times >= begun_s) + WQ * (times >= first_s) + more
    return before, after


def _after_first(life: Life, times: Array) -> Array:
    """Output beyond the first token that it had at each time: evenly over the time in which it ran."""
    if life.first_token_s is None or life.finished_s is None:
        return np.zeros(len(times))
    ran = [
        (max(since, life.first_token_s), until)
        for since, until, state in life.spans()
        if state == RUNNING and until > life.first_token_s
    ]
    total = sum(until - since for since, until in ran)
    if total < SHORT_S:
        at_once: Array = np.where(times > life.finished_s, float(life.tokens - 1), 0.0)
        return at_once
    at_s, had, done = [], [], 0.0
    for since, until in ran:
        at_s += [since, until]
        had += [done / total, (done + until - since) / total]
        done += until - since
    part: Array = np.interp(times, at_s, had)
    return (life.tokens - 1) * part


def backlogged(lives: Sequence[Life], names: Sequence[str], times: Array) -> Flags:
    """Whether each tenant had anything queued from each time to the next; shape (tenants, times)."""
    places = {name: place for place, name in enumerate(names)}
    steps = np.zeros((len(names), len(times) + 1), dtype=int)
    for life in lives:
        for since, until, state in life.spans():
            if state == QUEUED and until > since:
                begin, end = np.searchsorted(times, (since, until))
                steps[places[life.arrival.tenant], begin] += 1
                steps[places[life.arrival.tenant], end] -= 1
    return np.cumsum(steps, axis=1)[:, :-1] > 0


def _runs(flags: Flags) -> list[tuple[int, int]]:
    """Where flags are set without a break: from the first to the place behind the last. The last is never set."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(int), [0]))))
    return [(int(begin), int(end)) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


def _together(waits: Flags, times: Array, before: Array, after: Array) -> tuple[float, float | None]:
    """The longest time in which all were backlogged, and how unevenly they were served in it."""
    everybody: Flags = np.all(waits, axis=0)
    runs = _runs(everybody)
    if not runs:
        return 0.0, None
    begin, end = max(runs, key=lambda run: times[run[1]] - times[run[0]])
    service = before[:, end] - after[:, begin]
    mean = float(service.mean())
    return float(times[end] - times[begin]), float(np.abs(service - mean).max()) / mean if mean else None


def _longest_input(lives: Sequence[Life]) -> int:
    return max(life.arrival.prompt_tokens for life in lives)


def _unit(lives: Sequence[Life], setup: Setup) -> float:
    """M, of all workers together: what the pool holds, or all slots with the longest request."""
    preset = setup.device.preset
    longest = max(life.arrival.prompt_tokens + life.arrival.output_tokens for life in lives)
    return float(setup.workers * min(preset.kv_tokens, preset.max_num_seqs * longest))
