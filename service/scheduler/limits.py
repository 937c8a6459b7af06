"""Limits: which caps are in force on tenants and classes, and who is over them. Pure.

In force is the strictest of the table's row and of what each role set with `limit`. A tenant need not be known to be
limited; those that come later are affected. A controller's limits end with its leader's silence, as its holds do.
`verbs.py` sets them, `roster.py` tells of every change of a count that has a cap, the vLLM shell asks who is over.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Literal, NamedTuple

from coxswain.schemas import events as ev
from coxswain.schemas.commands import MAX_TARGETS
from coxswain.schemas.subjects import CONTROLLER
from coxswain.service.scheduler.groups import NO_CAPS, Caps, ClassGroup, Group
from coxswain.service.scheduler.queue import SteeredQueue
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.tenants import Account, Tenants

MAX_LIMITS: Final = MAX_TARGETS
"""Tenants and classes on which one role may have limits at a time."""


class Target(NamedTuple):
    """What a limit is about."""

    kind: Literal["tenant", "class"]
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


class Over(NamedTuple):
    """A tenant or class of which more run than may."""

    group: Group
    excess: int
    """How many more."""
    borrowed: int
    """How many of these may stay until something within its caps needs the room; the rest must stop at once."""


class Limits:
    """All limits of one worker.

    Args:
        queue: told when a tenant comes to its cap or under it.
        tenants: told too; tells of each account that it makes.
        tell: the core's way to say what happened.
    """

    def __init__(self, queue: SteeredQueue, tenants: Tenants, tell: Callable[..., None]) -> None:
        self._queue = queue
        self._tenants = tenants
        self._tell = tell
        tenants.on_new = self.put_in_force
        self._classes: dict[str, ClassGroup] = {}
        self._stored: dict[str, dict[Target, Caps]] = defaultdict(dict)
        """By role."""
        self._over: dict[Group, None] = {}
        self._prefill: dict[Group, None] = {}
        """Those with a cap on their prompt tokens per step."""
        self.changes = 0
        """How often a cap, or what runs of something with a cap, changed."""

    # What is set

    def stored(self, role: str, target: Target) -> Caps:
        """What a role set."""
        return self._stored[role].get(target, NO_CAPS)

    def obstacle(self, role: str, targets: Iterable[Target]) -> str | None:
        """Why a role may not set limits on these as well, or None."""
        new = [target for target in targets if target not in self._stored[role]]
        if len(self._stored[role]) + len(new) > MAX_LIMITS:
            return f"a worker keeps limits on at most {MAX_LIMITS} tenants and classes per role: lift some"
        return None

    def limit(self, now: float, role: str, target: Target, caps: Caps) -> bool:
        """Set a role's limits on a target; False if that changed nothing."""
        before = self.stored(role, target)
        if caps == before:
            return False
        if caps == NO_CAPS:
            del self._stored[role][target]
        else:
            self._stored[role][target] = caps
        self._renew(target)
        self._tell(
            now, None, ev.Limited, by=role, detail=f"{target}: {caps.difference(before)}",
            **{"tenant" if target.kind == "tenant" else "class_": target.name},
        )  # fmt: skip
        return True

    def fail_over(self, now: float) -> None:
        """The leader is silent: end the limits of controllers."""
        if ended := self._stored.pop(CONTROLLER, {}):
            for target in ended:
                self._renew(target)
            detail = f"failover: its limits on {len(ended)} ended"
            self._tell(now, None, ev.Limited, by=CONTROLLER, detail=detail)

    def _renew(self, target: Target) -> None:
        if target.kind == "tenant":
            account = self._tenants.account(target.name)
            account.seen = True  # whoever looks at status should find it
            account.touch()
            self.put_in_force(account)
        elif target.name in self._classes:
            self.put_in_force(self._classes[target.name])

    # What is in force

    def set_classes(self, classes: dict[str, ClassGroup]) -> None:
        """Other classes are in force; their counts are theirs already."""
        for group in self._classes.values():
            self._over.pop(group, None)
            self._prefill.pop(group, None)
        self._classes = classes
        for group in classes.values():
            self.put_in_force(group)

    def put_in_force(self, group: Group) -> None:
        """Give a tenant or class the caps that apply to it now."""
        if isinstance(group, Account):
            target = Target("tenant", group.name)
            caps = Caps(group.policy.max_running, group.policy.max_queued)
        else:
            assert isinstance(group, ClassGroup)
            target = Target("class", group.name)
            caps = Caps(group.policy.max_running, group.policy.max_queued)
        for stored in self._stored.values():
            caps = caps.strictest(stored.get(target, NO_CAPS))
        if caps != group.caps:
            group.put_caps(caps)
            if caps.max_prefill_tokens_per_step is None:
                self._prefill.pop(group, None)
            else:
                self._prefill[group] = None
            self._put(group)

    def _put(self, group: Group) -> None:
        if not isinstance(group, Account):
            self.counted(group)
            return
        group.touch()
        was_shut, floor = group.shut, self._tenants.floor()
        self.counted(group)
        if was_shut and not group.shut and floor is not None:
            # Its cap kept it back, not the others: what it could not use is not saved up, as with idleness.
            group.lift_to(floor)

    def counted(self, group: Group) -> None:
        """The cap of a group changed, or how many of one with a cap run."""
        self.changes += 1
        if group.excess:
            self._over[group] = None
        else:
            self._over.pop(group, None)
        if isinstance(group, Account) and self._queue.room_changed(group):
            self._tenants.room_changed(group)

    # What follows

    def room(self, record: Record) -> bool:
        """Whether one more like it may run within the caps."""
        return not record.account.full and not record.group.full

    @property
    def bounds_prefill(self) -> bool:
        """Whether anybody has a cap on prompt tokens per step."""
        return bool(self._prefill)

    def prefill(self) -> dict[Group, int]:
        """Prompt tokens that a step may compute, of each tenant and class with a cap on them."""
        return {group: group.max_prefill_tokens_per_step or 0 for group in self._prefill}

    @property
    def exceeded(self) -> bool:
        """Whether more run of anything than may."""
        return bool(self._over)

    @property
    def lent(self) -> bool:
        """Whether anything runs on borrowed room; O(number of tenants and classes that are over)."""
        return any(group.borrowing for group in self._over)

    def over(self) -> Iterator[Over]:
        """Tenants and classes of which more run than may; O(number of them)."""
        for group in self._over:
            yield Over(group, group.excess, min(group.excess, group.borrowing))

    def borrowers(self, running: Iterable[Record]) -> Iterator[Record]:
        """The first of the running that borrow their room, of each tenant and class as many as are over its cap."""
        taken: Counter[Group] = Counter()
        for record in running if self.lent else ():
            account, group = record.account, record.group
            if group.policy.borrow and (account.excess > taken[account] or group.excess > taken[group]):
                taken.update((account, group))
                yield record

    def to_stop(self, running: Callable[[], Iterable[Record]]) -> list[tuple[Record, Group]]:
        """Running requests that are over a cap which they may not exceed, worst first, and whose."""
        stop: dict[Record, Group] = {}
        for group, excess, borrowed in self.over():
            mine = [
                record
                for record in (running() if excess > borrowed else ())
                if group in (record.account, record.group)
            ]
            already = sum(record in stop for record in mine)
            for record in mine:
                if already >= excess - borrowed:
                    break
                if record not in stop and not record.group.policy.borrow:
                    stop[record] = group
                    already += 1
        return list(stop.items())

    def validate(self) -> None:
        """Check every invariant; for tests."""
        groups: list[Group] = [*self._tenants.accounts.values(), *self._classes.values()]
        assert set(self._over) == {group for group in groups if group.excess}
        assert all(len(stored) <= MAX_LIMITS for stored in self._stored.values())
        for group in groups:
            before = group.caps
            self.put_in_force(group)
            assert group.caps == before, group
            assert 0 <= group.borrowing <= group.running, group
