"""What the HTTP edge reads of status frames, and each engine as last heard. Pure; used by `caps.py`."""

import msgspec

from coxswain.schemas.names import DEFAULT, OTHER
from coxswain.schemas.parts import Assembler


class TenantSeen(msgspec.Struct, frozen=True):
    """What the edge reads of a tenant's row."""

    tenant: str
    class_: str = msgspec.field(name="class", default=DEFAULT)
    queued: int = 0
    running: int = 0
    held: int = 0
    finished_total: int = 0
    oldest_queued_s: float = 0.0
    max_queued: int | None = None
    classes: tuple[str, ...] = ()

    @property
    def arrived_total(self) -> int:
        """How many of its requests the engine was ever given."""
        return self.queued + self.running + self.held + self.finished_total


class ClassSeen(msgspec.Struct, frozen=True):
    """What the edge reads of a class's row."""

    class_: str = msgspec.field(name="class")
    queued: int
    oldest_queued_s: float
    max_queued: int | None = None


class EdgeFrame(msgspec.Struct, frozen=True):
    """What the edge reads of a status frame: the rest, requests above all, is not even decoded."""

    worker: str
    incarnation: str
    seq: int
    full: bool
    part: int
    parts: int
    state: str
    tenants: tuple[TenantSeen, ...] = ()
    classes: tuple[ClassSeen, ...] = ()


class View:
    """One engine as last heard."""

    def __init__(self, incarnation: str) -> None:
        self.incarnation = incarnation
        self.heard_at = 0.0
        self.draining = False
        self.tenants: dict[str, TenantSeen] = {}
        self.classes: dict[str, ClassSeen] = {}
        self.seq = -1
        self._assembler: Assembler[EdgeFrame] = Assembler()

    @property
    def overflows(self) -> bool:
        """Whether the engine has no accounts left: a tenant that has none comes in the row of `OTHER`."""
        other = self.tenants.get(OTHER)
        return other is not None and other.arrived_total > 0

    def row(self, tenant: str) -> TenantSeen | None:
        """The row in which a tenant's requests are: its own, else the one that is shared by those without."""
        return self.tenants.get(tenant) or (self.tenants.get(OTHER) if self.overflows else None)

    def merge(self, frame: EdgeFrame, now: float) -> dict[str, int]:
        """Take a frame; how many requests of each tenant it has that were not known before. Older ones: none."""
        if frame.seq < self.seq:
            return {}
        self.seq = frame.seq
        self.heard_at = now
        self.draining = frame.state == "draining"
        whole = self._assembler.add(frame) if frame.full else frame
        if whole is None:
            return {}
        if whole.full:
            self.classes = {}
        self.classes.update((row.class_, row) for row in whole.classes)
        # In place: there may be tens of thousands, and twenty frames a second with a few.
        arrived = {}
        for row in whole.tenants:
            known = self.tenants.get(row.tenant)
            self.tenants[row.tenant] = row
            if (count := row.arrived_total - (known.arrived_total if known else 0)) > 0:
                arrived[row.tenant] = count
        return arrived
