"""Strict priority between classes, with a bound on how long the others starve.

The rule of every priority scheduler: whatever waits in a better class goes first, and takes the place of running
work of worse classes (`cut_in`). Alone it starves the worst class for as long as the better ones are busy, so each
class ages: one that has had something to offer for `ageing_s` without any of it being admitted gets its head
admitted before all others, once; then its clock starts again. So in any time t, a class that always has something
waiting is admitted at least ⌊t / ageing_s⌋ times (less the step in which it becomes due), and takes no more than
that many places from better ones.

All of it is done by the workers, in the very step: this policy only writes the class table. A class's own
`ageing_s`, and whatever else operators wrote, stays.
"""

from typing import Annotated, ClassVar

import msgspec
from msgspec.structs import replace

from coxswain.control.fleet import Fleet
from coxswain.control.policy import Directives, Sees, Tables
from coxswain.schemas.policy import ClassPolicy, CutIn


class Strict:
    """Better classes first; nobody starves."""

    name: ClassVar[str] = "strict"
    sees: ClassVar[Sees] = "tenants"

    class Params(msgspec.Struct, frozen=True, kw_only=True):
        """What classes get that say nothing themselves."""

        ageing_s: Annotated[float, msgspec.Meta(gt=0, le=1e12)] = 60.0
        """A class is passed over for no longer than this."""
        cut_in: CutIn = "slots"
        """What a better class may take from running requests of worse ones; `off`: nothing."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self._tables = Tables()
        self._directives = Directives()

    def observe(self, fleet: Fleet, tables: Tables, now: float) -> None:  # noqa: ARG002
        """Only the tables matter."""
        if tables is not self._tables:
            self._tables = tables
            rows = {name: self._row(row) for name, row in tables.classes.items()}
            self._directives = Directives(classes=rows)

    def _row(self, row: ClassPolicy) -> ClassPolicy:
        return replace(
            row,
            ageing_s=self.params.ageing_s if row.ageing_s is None else row.ageing_s,
            cut_in=self.params.cut_in if row.cut_in == "off" else row.cut_in,
        )

    def decide(self, now: float) -> Directives:  # noqa: ARG002  (the protocol's signature)
        """The class table with ageing and cut-in."""
        return self._directives
