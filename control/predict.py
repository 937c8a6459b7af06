"""How long output will be, as far as experience tells: what predictive policies ask. Pure; called by `policies`.

The moving average is that of VTC's authors (OSDI'24, artifact: vtc_pred_len_req_queue.py).
"""

from coxswain.schemas.status import RequestStatus


class MovingAverage:
    """Per tenant p = (4p + length) / 5, beginning with the first length."""

    def __init__(self) -> None:
        self._expected: dict[str, float] = {}

    def expect(self, tenant: str) -> float:
        """Output tokens of a request of the tenant: its average so far; 0 before any of its requests ended."""
        return self._expected.get(tenant, 0.0)

    def learn(self, row: RequestStatus) -> None:
        """A request ended, and `row` is the last that was heard of it: move its tenant's average."""
        old = self._expected.get(row.tenant)
        self._expected[row.tenant] = (
            float(row.output_tokens) if old is None else (4.0 * old + row.output_tokens) / 5.0
        )
