"""First come, first served: what vLLM does by itself, and the baseline of every comparison.

Every class is ordered by priority, then arrival, across tenants; with equal priorities that is arrival order.
"""

from typing import ClassVar

import msgspec

from coxswain.control.fleet import Fleet
from coxswain.control.policy import Directives, Sees, Tables, each_class


class Fcfs:
    """No tenant counts for more or less than another; no counters, no ranks."""

    name: ClassVar[str] = "fcfs"
    sees: ClassVar[Sees] = "tenants"

    class Params(msgspec.Struct, frozen=True, kw_only=True):
        """It takes none."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self._directives = Directives()

    def observe(self, fleet: Fleet, tables: Tables, now: float) -> None:  # noqa: ARG002
        """Nothing that happens changes the order, but there may be a new class."""
        self._directives = Directives(classes=each_class(tables.classes, order="priority"))

    def decide(self, now: float) -> Directives:  # noqa: ARG002  (the protocol's signature)
        """Priority order in every class."""
        return self._directives
