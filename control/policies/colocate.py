"""Interactive first, batch on what is left: two kinds of traffic on the same workers.

Offline work fills an engine, and every request of it that runs costs online requests three times: it has a slot, it
has KV blocks, and its prefill lengthens the step that an arriving request waits for. So, for every class behind the
best one:

    slots and blocks    the best class cuts in (`cut_in: kv`): it never waits for batch to end;
    steps               while the best class is there, and `linger_s` longer, batch prefills at most `prefill_tokens`
                        per step, so that whoever arrives waits for a short step and not for a long prefill; and
                        nothing in the step in which one begins, so that it does not compute batch's prompt as well;
    idle capacity       outside of that nothing binds batch: it borrows (`borrow`) whatever its caps leave unused,
                        and no cap is added here, so that it gets what strict priority would leave it.

The budget per step is what trades the one for the other: an arriving request waits for at most the step at hand,
whose length grows with the prefill in it. `prefill_tokens: null` makes this strict priority with cut-in.

Workers do all of it, in the very step; this policy only writes the class table, and operators' own caps, budgets
and ageing stay. So does `stand_aside`, which is worth setting for batch where launching a step takes the engine's
thread long: on an H200 it took a quarter off the median time to first token, for a tenth of the batch
(docs/results/gpu.md). The lab's devices launch in no time.
"""

from typing import Annotated, ClassVar

import msgspec
from msgspec.structs import replace

from coxswain.control.fleet import Fleet
from coxswain.control.policy import Directives, Sees, Tables
from coxswain.schemas.policy import ClassPolicy, Count, CutIn, NotNegative


class Colocate:
    """The class with the lowest position is interactive; all others are batch."""

    name: ClassVar[str] = "colocate"
    sees: ClassVar[Sees] = "tenants"

    class Params(msgspec.Struct, frozen=True, kw_only=True):
        """How much batch may get in the way."""

        prefill_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None = 64
        """Prefill tokens of each batch class per step while interactive requests are there."""
        linger_s: NotNegative = 1.0
        """For how long after that: the next one comes soon."""
        cut_in: CutIn = "kv"
        """What interactive requests may take from running batch."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self._tables = Tables()
        self._directives = Directives()

    def observe(self, fleet: Fleet, tables: Tables, now: float) -> None:  # noqa: ARG002
        """Only the tables matter."""
        if tables is self._tables:
            return
        self._tables = tables
        best = min(row.position for row in tables.classes.values())
        rows = {
            name: self._interactive(row) if row.position == best else self._batch(row)
            for name, row in tables.classes.items()
        }
        self._directives = Directives(classes=rows)

    def _interactive(self, row: ClassPolicy) -> ClassPolicy:
        return replace(row, cut_in=self.params.cut_in if row.cut_in == "off" else row.cut_in)

    def _batch(self, row: ClassPolicy) -> ClassPolicy:
        budget: Count | None = row.max_prefill_tokens_per_step
        return replace(
            row,
            borrow=True,
            max_prefill_tokens_per_step=self.params.prefill_tokens if budget is None else budget,
            linger_s=row.linger_s or self.params.linger_s,
        )

    def decide(self, now: float) -> Directives:  # noqa: ARG002  (the protocol's signature)
        """The class table with cut-in for the one and budgets for the others."""
        return self._directives
