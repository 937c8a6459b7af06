"""Who was admitted while others waited, and why they went first: by class, by virtual time, by priority. Pure.

The reason is read from the events of both and from the class table as it is now; without the table it says only in
what the two differed. Called by `story.py` and `slow.py`.
"""

from collections.abc import Mapping
from typing import Literal

import msgspec

from coxswain.control.explain.life import Life
from coxswain.schemas import events as ev
from coxswain.schemas.policy import ClassPolicy

Why = Literal[
    "better class", "other class", "lower virtual time", "lower priority", "earlier", "other tenant"
]

Classes = Mapping[str, ClassPolicy]


class Ahead(msgspec.Struct, kw_only=True):
    """Requests of one tenant and class that were admitted first, for one reason."""

    tenant: str
    class_: str = msgspec.field(name="class")
    why: Why
    admissions: int = 0
    input_tokens: int = 0
    """That had to be computed for them."""
    least_virtual_time: float | None = None
    most_virtual_time: float | None = None
    """Of their tenant when each was admitted, its input charged."""

    def add(self, event: ev.Admitted) -> None:
        """One more."""
        self.admissions += 1
        self.input_tokens += event.uncached_input_tokens
        if event.virtual_time is not None:
            least, most = self.least_virtual_time, self.most_virtual_time
            self.least_virtual_time = event.virtual_time if least is None else min(least, event.virtual_time)
            self.most_virtual_time = event.virtual_time if most is None else max(most, event.virtual_time)


class Overtakers:
    """All that went ahead of somebody, by tenant, class and reason."""

    def __init__(self, classes: Classes) -> None:
        self._classes = classes
        self._groups: dict[tuple[str, str, Why], Ahead] = {}

    def add(self, event: ev.Admitted, waiting: Life) -> None:
        """Another request was admitted while this one waited."""
        why = reason(event, waiting, self._classes)
        tenant, class_ = event.tenant or "", event.class_ or ""
        group = self._groups.get((tenant, class_, why))
        if group is None:
            group = self._groups[tenant, class_, why] = Ahead(tenant=tenant, class_=class_, why=why)
        group.add(event)

    def groups(self) -> tuple[Ahead, ...]:
        """The largest first."""
        return tuple(sorted(self._groups.values(), key=lambda each: (-each.admissions, each.tenant)))


def reason(event: ev.Admitted, waiting: Life, classes: Classes) -> Why:
    """Why a request was admitted before the one that waits, by the rules of the queue (docs/protocol.md)."""
    if event.class_ != waiting.class_:
        its, mine = classes.get(event.class_ or ""), classes.get(waiting.class_)
        if its is None or mine is None:
            return "other class"
        # A class that comes later is admitted all the same where the better one is at its cap, or was overdue.
        its_key, my_key = (its.position, event.class_ or ""), (mine.position, waiting.class_)
        return "better class" if its_key < my_key else "other class"
    policy = classes.get(waiting.class_)
    fair = policy is None or policy.order == "fair"
    if fair and event.tenant != waiting.tenant:
        known = event.virtual_time is not None and waiting.virtual_time is not None
        return "lower virtual time" if known or policy is not None else "other tenant"
    if event.priority is not None and event.priority < waiting.priority:
        return "lower priority"
    return "earlier"
