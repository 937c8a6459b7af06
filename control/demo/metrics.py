"""What is measured, as arithmetic: service, the service gap, percentiles. Pure; called by the acts.

Service is VTC's (Sheng et al., OSDI'24, arXiv 2401.00588, section 4.1): full prompt tokens at admission,
price 1, and delivered output tokens, price 2. Cached prompt tokens count in full, whatever they cost in
virtual time.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from coxswain.schemas.status import TenantStatus

INPUT_PRICE: Final = 1
OUTPUT_PRICE: Final = 2


class Standing(NamedTuple):
    """One tenant at one moment: how many requests wait, and its service so far."""

    queued: int
    service: int


class Sample(NamedTuple):
    """All tenants at one moment (Unix s), as a status frame says."""

    at: float
    tenants: Mapping[str, Standing]


class Gap(NamedTuple):
    """How far apart two tenants' service came while both were backlogged."""

    largest: int
    """In weighted tokens."""
    began_at: float
    ended_at: float
    """Unix s of the first and last sample with both backlogged."""

    @property
    def lasted_s(self) -> float:
        """How long both were backlogged."""
        return self.ended_at - self.began_at


NOBODY: Final = Standing(queued=0, service=0)


def service(row: TenantStatus) -> int:
    """A tenant's service since the worker started, in weighted tokens."""
    prompt = row.uncached_input_tokens_total + row.cached_input_tokens_total
    return INPUT_PRICE * prompt + OUTPUT_PRICE * row.output_tokens_total


def sample(at: float, rows: Iterable[TenantStatus]) -> Sample:
    """The sample that a worker's tenant rows give."""
    return Sample(at, {row.tenant: Standing(row.queued, service(row)) for row in rows})


def service_gap(samples: Iterable[Sample], one: str, other: str) -> Gap | None:
    """The largest absolute difference of service between two tenants while both are backlogged.

    A tenant is backlogged while at least one request of it waits. Both counts are zeroed when both first are;
    the first sample in which either no longer is ends it, and does not count.

    Returns:
        None if they never were backlogged together.
    """
    start: tuple[Standing, Standing] | None = None
    gap: Gap | None = None
    for at, tenants in samples:
        first, second = tenants.get(one, NOBODY), tenants.get(other, NOBODY)
        if not (first.queued and second.queued):
            if gap is not None:
                break
            continue
        if start is None or gap is None:
            start, gap = (first, second), Gap(0, at, at)
        difference = abs((first.service - start[0].service) - (second.service - start[1].service))
        gap = Gap(max(gap.largest, difference), gap.began_at, at)
    return gap


def growth(samples: Sequence[Sample], tenant: str) -> int:
    """A tenant's service between the first sample and the last."""
    if not samples:
        return 0
    return samples[-1].tenants.get(tenant, NOBODY).service - samples[0].tenants.get(tenant, NOBODY).service


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that at least `percent` of them do not exceed (nearest rank).

    Raises:
        ValueError: if there are no values.
    """
    if not values:
        raise ValueError("no values, no percentile")
    ranked = sorted(values)
    return ranked[max(0, math.ceil(percent / 100 * len(ranked)) - 1)]
