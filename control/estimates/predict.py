"""How long output will be, as far as experience tells: what predictive policies ask. Pure; called by `policies`.

The moving average is that of VTC's authors (OSDI'24, artifact: vtc_pred_len_req_queue.py). Theirs expects nothing of a
tenant that is not known yet; here it is taken for one like the others, or it would be let in once more than they.
"""

from collections import OrderedDict
from typing import Final

from coxswain.schemas.status import RequestStatus

KNOWN: Final = 65_536
"""Tenants with an average of their own: as many as a worker has accounts. Of more, those of whom a request ended last;
the others are taken for one like these."""


class MovingAverage:
    """Per tenant p = (4p + length) / 5, beginning with the first length.

    Args:
        known: tenants to remember at most.
    """

    def __init__(self, known: int = KNOWN) -> None:
        self._known = known
        self._expected: OrderedDict[str, float] = OrderedDict()
        """Who was heard of longest ago first."""
        self._sum = 0.0

    def expect(self, tenant: str) -> float:
        """Output tokens of a request of the tenant: its average so far, or the mean of all tenants' before it has one.

        0 before any request ended.
        """
        found = self._expected.get(tenant)
        return self._sum / max(1, len(self._expected)) if found is None else found

    def learn(self, row: RequestStatus) -> None:
        """A request ended, and `row` is the last that was heard of it: move its tenant's average."""
        old = self._expected.pop(row.tenant, None)
        new = float(row.output_tokens) if old is None else (4.0 * old + row.output_tokens) / 5.0
        self._expected[row.tenant] = new
        self._sum += new - (old or 0.0)
        if len(self._expected) > self._known:
            _, forgotten = self._expected.popitem(last=False)
            self._sum -= forgotten
