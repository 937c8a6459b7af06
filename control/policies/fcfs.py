"""First come, first served: what vLLM does by itself, and the baseline of every comparison.

Every class is ordered by priority, then arrival, across tenants; with equal priorities that is arrival order.
"""

from collections.abc import Mapping
from typing import ClassVar

import msgspec

from coxswain.control.fleet import Fleet
from coxswain.control.policy import Directives
from coxswain.schemas.policy import TenantPolicy


class Fcfs:
    """No tenant counts for more or less than another; no counters, no ranks."""

    name: ClassVar[str] = "fcfs"

    class Params(msgspec.Struct, frozen=True, kw_only=True):
        """It takes none."""

    def __init__(self, params: Params) -> None:
        self.params = params

    def observe(self, fleet: Fleet, tenants: Mapping[str, TenantPolicy], now: float) -> None:
        """Nothing that happens changes the order."""

    def decide(self, now: float) -> Directives:  # noqa: ARG002  (the protocol's signature)
        """Priority order in every class."""
        return Directives(order="priority")
