"""What is reported of a run, as VTC's authors define it, so that figures can stand beside theirs. Pure.

Source: VTC-artifact, fair_bench/plot/{visualize,plot_revision}.py.

Service of a request is prompt + 2 × output tokens, spread evenly between its first token and its end. At 19 moments
x = 28.5 s × i, i = 1 … 19, in the window of 60 s around x + 30 s:

    s_j     what tenant j was served in the window, per second
    r_j     what the requests of j that arrived in the window cost, per second
    diff    the sum over tenants of  min(max_k s_k − s_j, |r_j − s_j|)

reported as its maximum, mean and variance over the moments. So `diff` grows with the number of tenants that got less
than another and less than they asked for. Requests that were refused count nowhere but in n.

Beyond theirs: percentiles of first-token latency per tenant, time held, and how often requests lost their place.
"""

from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np

from coxswain.lab.life import Life
from coxswain.lab.trace import tenants

WINDOW_S: Final = 60.0
HORIZON_S: Final = 600.0
WARM_UP_S: Final = 30.0
TICKS: Final = tuple((HORIZON_S - WARM_UP_S) / 20 * i for i in range(1, 20))
"""Seconds; windows lie around these plus `WARM_UP_S`."""

Array = np.ndarray[Any, np.dtype[np.float64]]
"""Seconds or weighted tokens; shapes are said where they are made."""


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """First-token latency of a tenant's requests, seconds."""

    n: int
    done: int
    mean_s: float | None
    p50_s: float | None
    p99_s: float | None


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """A run in figures."""

    n: int
    """Requests that came."""
    done: int
    """Requests that were delivered in full."""
    total_s: float
    """From the beginning of the traffic to the last token."""
    max_diff: float
    """Weighted tokens per second, as are the next; the variance is in their square."""
    avg_diff: float
    var_diff: float
    acc_max: float
    """The largest difference of accumulated service between two tenants at any of the moments, weighted tokens."""
    acc_last: float
    throughput: float
    """Prompt and output tokens of all that is done, per second of `total_s`."""
    tenants: dict[str, Latency]
    held_s: float
    """How long requests were held, together."""
    preempted: int
    """How often running requests lost their place."""


def measure(lives: Sequence[Life]) -> Metrics:
    """The figures of a run."""
    done = [life for life in lives if life.done]
    total_s = max((life.finished_s or 0.0 for life in done), default=0.0)
    diffs = service_diffs(done) if done else np.zeros(len(TICKS))
    accumulated = acc_diffs(done) if done else np.zeros(len(TICKS))
    tokens = sum(life.arrival.prompt_tokens + life.tokens for life in done)
    return Metrics(
        n=len(lives),
        done=len(done),
        total_s=total_s,
        max_diff=float(diffs.max()),
        avg_diff=float(diffs.mean()),
        var_diff=float(diffs.var()),
        acc_max=float(accumulated.max()),
        acc_last=float(accumulated[-1]),
        throughput=tokens / total_s if total_s else 0.0,
        tenants={
            name: latency([life for life in lives if life.arrival.tenant == name])
            for name in tenants([life.arrival for life in lives])
        },
        held_s=sum(
            until - since for life in lives for since, until, state in life.spans() if state == "held"
        ),
        preempted=sum(life.preempted for life in lives),
    )


def latency(lives: Sequence[Life]) -> Latency:
    """First-token latency of those that are done."""
    waits = [life.ttft_s for life in lives if life.done and life.ttft_s is not None]
    return Latency(
        n=len(lives),
        done=len(waits),
        mean_s=float(np.mean(waits)) if waits else None,
        p50_s=float(np.percentile(waits, 50)) if waits else None,
        p99_s=float(np.percentile(waits, 99)) if waits else None,
    )


def service_diffs(done: Sequence[Life], ticks: Sequence[float] = TICKS) -> Array:
    """`diff` at each moment, weighted tokens per second; shape (ticks,)."""
    ends = np.asarray(ticks) + WARM_UP_S + WINDOW_S / 2
    served = service_rates(done, ends - WINDOW_S, ends)
    asked = asked_rates(done, ends - WINDOW_S, ends)
    behind = served.max(axis=0) - served
    result: Array = np.minimum(behind, np.abs(asked - served)).sum(axis=0)
    return result


def acc_diffs(done: Sequence[Life], ticks: Sequence[float] = TICKS) -> Array:
    """The largest difference between two tenants of what they were served since the warm-up, weighted tokens."""
    ends = np.asarray(ticks) + WARM_UP_S
    served = _overlaps(done, np.full(len(ends), WARM_UP_S), ends)
    result: Array = served.max(axis=0) - served.min(axis=0)
    return result


def service_rates(lives: Sequence[Life], begins: Array, ends: Array) -> Array:
    """What each tenant was served per second in each window; shape (tenants, windows), tenants by name."""
    return _overlaps(lives, begins, ends) / (ends - begins)


def asked_rates(lives: Sequence[Life], begins: Array, ends: Array) -> Array:
    """What each tenant's arrivals in each window cost, per second; shape (tenants, windows)."""
    at = np.array([life.arrival.at_s for life in lives])[:, None]
    cost = np.array([float(life.arrival.cost) for life in lives])[:, None]
    return _by_tenant(lives, np.where((begins <= at) & (at <= ends), cost, 0.0)) / (ends - begins)


def _overlaps(lives: Sequence[Life], begins: Array, ends: Array) -> Array:
    """Service in each window, every request's spread evenly from first token to end; shape (tenants, windows)."""
    first = np.array([_or_nan(life.first_token_s) for life in lives])[:, None]
    last = np.array([_or_nan(life.finished_s) for life in lives])[:, None]
    cost = np.array([float(life.arrival.cost) for life in lives])[:, None]
    length = last - first
    # As theirs: what ended in the first second, or in the moment of its first token, is left out.
    counts = (last >= 1.0) & (length >= 1e-5)
    overlap = np.clip(np.minimum(ends, last) - np.maximum(begins, first), 0.0, None)
    part = np.divide(overlap, length, out=np.zeros_like(overlap), where=counts)
    return _by_tenant(lives, cost * part)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _by_tenant(lives: Sequence[Life], values: Array) -> Array:
    """Sums over each tenant's requests; (requests, windows) to (tenants, windows)."""
    names = {name: place for place, name in enumerate(tenants([life.arrival for life in lives]))}
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, [names[life.arrival.tenant] for life in lives], values)
    return sums
