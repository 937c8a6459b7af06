"""How long a request's output will be: what predictive policies ask. Pure; called by `policies`.

The moving average is that of VTC's authors (OSDI'24, artifact: vtc_pred_len_req_queue.py). The oracle knows, which
only a laboratory can arrange; it shows what better prediction could bring.
"""

from collections.abc import Mapping
from typing import Protocol

from coxswain.schemas.status import RequestStatus


class Predictor(Protocol):
    """Expects lengths, and learns from requests that ended."""

    def expect(self, row: RequestStatus) -> float:
        """Output tokens that the request will have had in the end; 0 if there is no telling."""

    def learn(self, row: RequestStatus) -> None:
        """A request ended; `row` is the last that was heard of it."""


class MovingAverage:
    """Per tenant p = (4p + length) / 5, beginning with the first length."""

    def __init__(self) -> None:
        self._expected: dict[str, float] = {}

    def expect(self, row: RequestStatus) -> float:
        """The tenant's average so far; 0 before any of its requests ended."""
        return self._expected.get(row.tenant, 0.0)

    def learn(self, row: RequestStatus) -> None:
        """Move the tenant's average."""
        old = self._expected.get(row.tenant)
        self._expected[row.tenant] = (
            float(row.output_tokens) if old is None else (4.0 * old + row.output_tokens) / 5.0
        )


class Oracle:
    """True lengths, known beforehand.

    Args:
        lengths: output tokens by request.
    """

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self._lengths = lengths

    def expect(self, row: RequestStatus) -> float:
        """The true length; 0 for a request that it was not told of."""
        return float(self._lengths.get(row.request, 0))

    def learn(self, row: RequestStatus) -> None:
        """There is nothing to learn."""
