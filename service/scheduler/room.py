"""Who gets room: cut-in, return, reclaim. Pure.

`plan` is called before every step. In the order in which they should run it looks at those that would like to:
heads of the waiting queue, and requests that the engine itself holds until there is room (victims of a cut-in,
and released requests that found none). Whoever finds room gets it; whoever does not, and outranks work that runs,
takes the room of the worst of that work, if its class may (`cut_in`).

* Outranks: its class comes first, or in a `priority` class its priority is lower. Never inside a `fair` class.
* Victims: as few as will do, the worst first, none that is protected (`quantum_s`, `cooldown_s`, ageing), and
  none at all if all together would not do. They are held while spare slots last or can be had by parking what is
  held; where KV blocks are short, or no slot can be had so, they are preempted, if the class is `kv`.
* Held requests give way before running ones, least urgent first: their slots by parking, their KV by dropping.

* Caps are exact: what runs beyond one that was lowered is held, as far as it can be. What runs on borrowed room gives
  way to whatever waits within its caps, whether its class may cut in or not.

Acts through `Holds` and the port `Engine`. No policy.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Final

from coxswain.schemas.subjects import ENGINE
from coxswain.service.scheduler.engine import Engine
from coxswain.service.scheduler.groups import ClassGroup
from coxswain.service.scheduler.holds import WITH_KV, Holds
from coxswain.service.scheduler.limits import Limits, Over
from coxswain.service.scheduler.queue import SteeredQueue
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.roster import Roster
from coxswain.service.scheduler.states import HELD_KEPT, QUEUED, RUNNING

CUTS: Final = ("slots", "kv")
"""Values of `cut_in` that may take room."""
NOBODY: Final = (None, False)
MOST: Final = 32
"""Requests that one step makes room for; the next step goes on."""
STUCK_S: Final = 0.1
"""How long nobody looks again for whom to stop where nobody over a cap could be held, and the same run still."""

Key = tuple[int, int, float]
"""(class place, priority where it counts across tenants, arrival): lower is more urgent."""


class Room:
    """Makes room on one engine.

    Args:
        engine: who has the room.
        roster: where requests are.
        queue: who waits.
        holds: how requests are held and go on.
        limits: how many may run.
        evict: the core's way to preempt a running request: (now, record, reason).
    """

    def __init__(
        self,
        engine: Engine,
        roster: Roster,
        queue: SteeredQueue,
        holds: Holds,
        limits: Limits,
        evict: Callable[[float, Record, str], None],
    ) -> None:
        self._engine = engine
        self._roster = roster
        self._queue = queue
        self._holds = holds
        self._limits = limits
        self._evict = evict
        self._cutting: list[ClassGroup] = []
        """Classes that may cut in."""
        self.orders_running = False
        """Whether running requests get the step's tokens in rank order, not in that of their admission."""
        self._backs: list[Record] = []
        self._backs_version = -1
        self._overdue_at = float("inf")
        self._stuck: tuple[int, list[Over]] = (0, [])
        """`Limits.changes`, and who was over a cap, when more had to stop than could."""
        self._stuck_until = 0.0
        self._now = 0.0
        """When the step at hand began: reclaim happens inside it, where no clock is passed."""

    def set_classes(self, groups: dict[str, ClassGroup]) -> None:
        """Put class policies in force."""
        self._cutting = [group for group in groups.values() if group.policy.cut_in in CUTS]
        self.orders_running = any(
            policy.cut_in != "off"
            or policy.borrow
            or policy.stand_aside
            or policy.max_prefill_tokens_per_step is not None
            for policy in (group.policy for group in groups.values())
        )
        self.ranks_changed()

    def ranks_changed(self) -> None:
        """A class or priority changed: the order of those that wait for room may have."""
        self._backs_version = -1

    # Rank

    def key(self, record: Record) -> Key:
        """How urgent a request is; comparable across everything that waits, runs or is held."""
        fair = record.group.policy.order == "fair"
        return record.group.place, 0 if fair else record.priority, record.arrived_at

    def outranks(self, one: Record, other: Record) -> bool:
        """Whether `one` may take the room of `other`: a better class, or a better priority where that counts."""
        return self.key(one)[:2] < self.key(other)[:2]

    def protect(self, now: float, record: Record) -> None:
        """A request begins to run, or goes on: for its class's quantum nobody cuts in on it, longer after a cut-in."""
        policy = record.group.policy
        protected_s = max(policy.quantum_s, policy.cooldown_s if record.was_cut else 0.0)
        record.protected_until = now + protected_s if protected_s else 0.0
        record.was_cut = False

    # Before a step

    def plan(self, now: float) -> None:
        """Let those go on who have room, and make room for those who may take it."""
        self._now = now
        returning = self._holds.returning
        if not (self._cutting or returning or self._roster.kept or self._limits.exceeded):
            return  # every step comes here
        if self._limits.exceeded and (now >= self._stuck_until or self._excess() != self._stuck):
            self._stop_excess(now)
        if self._roster.kept and (self._queue or returning):
            self._park_surplus()
        if returning or self._limits.lent or self._queue.offers(self._cutting):
            self._place(now)

    def _stop_excess(self, now: float) -> None:
        """Hold what runs beyond its caps and may not borrow, the worst first; it goes on when there is room.

        Who cannot be held (a streaming session) is passed over: the others are as many fewer. Where there are no others
        they run on, maybe for hours, and not every step looks through all that run for them. Whose KV cannot be kept
        loses it: a cap is exact.
        """
        engine = self._engine

        def able() -> Iterator[Record]:
            running = chain(engine.released(), engine.worst_running())
            return (record for record in running if engine.obstacle(record, "drop") is None)

        for record, group in self._limits.to_stop(able):
            kv = "keep" if engine.obstacle(record, "keep") is None else "drop"
            self._holds.hold(now, record, ENGINE, kv, None, f"over the cap of {group.name}")
        self._stuck = self._excess()
        if any(excess > borrowed for _, excess, borrowed in self._stuck[1]):
            self._stuck_until = now + STUCK_S

    def _excess(self) -> tuple[int, list[Over]]:
        return self._limits.changes, list(self._limits.over())

    def _place(self, now: float) -> None:
        """See to the first that would like to run, in their order, until one finds no room."""
        engine = self._engine
        backs, heads = iter(self._waiting_for_room(now)), self._queue.offered()
        back, (head, borrows) = next(backs, None), next(heads, NOBODY)
        slots, tokens, claimed = engine.free_slots(), engine.step_tokens(), 0
        for _ in range(MOST):
            if back is not None and (head is None or self._returns_before(back, head)):
                if self._limits.room(back) or back.state not in WITH_KV:
                    if back.state in WITH_KV:
                        if not self._find_room(back, slots, claimed):
                            return
                        slots -= 1
                    back.aged |= self._overdue(back)
                    self._holds.release(now, back, (ENGINE,), ENGINE, "room")
                back = next(backs, None)
            elif head is None or tokens <= 0:
                return
            else:
                if engine.ready(head):
                    if not self._find_room(head, slots, claimed, borrows=borrows):
                        return
                    slots -= 1
                    claimed += engine.needs(head, engine.free_blocks())
                    tokens -= head.prompt_tokens
                head, borrows = next(heads, NOBODY)

    def _waiting_for_room(self, now: float) -> list[Record]:
        """Those that only the engine holds, the most urgent first."""
        if self._backs_version != self._holds.returning_version or now >= self._overdue_at:
            self._backs_version = self._holds.returning_version
            alone = [record for record in self._holds.returning if len(record.holds) == 1]
            self._backs = sorted(alone, key=lambda record: (not self._overdue(record), self.key(record)))
            soon = [self._ages_at(record) for record in alone if not self._overdue(record)]
            self._overdue_at = min(soon, default=float("inf"))
        return self._backs

    def _ages_at(self, record: Record) -> float:
        ageing_s = record.group.policy.ageing_s
        return float("inf") if ageing_s is None else record.held_since + ageing_s

    def _overdue(self, record: Record) -> bool:
        return self._now >= self._ages_at(record)

    def _returns_before(self, back: Record, head: Record) -> bool:
        """What has begun goes on before what has not, where neither outranks the other."""
        return self._overdue(back) or not self.outranks(head, back)

    def _find_room(self, record: Record, slots: int, claimed: int, *, borrows: bool = False) -> bool:
        """Whether there is room for this request in the step at hand, made if need be."""
        engine = self._engine
        if record.state is HELD_KEPT and not engine.resumable(record):
            if not engine.parkable(record):
                return False
            self._holds.park(self._now, record, "goes on by admission")
        free = engine.free_blocks() - claimed
        short = engine.needs(record, free) - free
        if slots > 0 and short <= 0:
            return True
        return not borrows and self._cut_in(record, slots <= 0, short)

    # Cut-in

    def _cut_in(self, record: Record, needs_slot: bool, short: int) -> bool:
        """Take what is missing from held requests and, worst first, from running ones; or nothing, and False."""
        mode = record.group.policy.cut_in
        if mode not in CUTS and not self._limits.lent:
            return False
        dropped, short = self._enough(self._giving_way(record), short)
        victims = self._victims(record)
        preempted: list[Record] = []
        if short > 0:
            if mode != "kv":
                return False
            preempted, short = self._enough(victims, short)
            if short > 0:
                return False
        victim = next(victims, None) if needs_slot and not preempted else None
        if needs_slot and not preempted and victim is None:
            return False
        why = f"cut-in for {record.request}"
        for held in dropped:
            self._holds.drop_kv(self._now, held, why)
        for running in preempted:
            running.was_cut = True
            self._evict(self._now, running, why)
        return victim is None or self._take_slot(victim, mode, why)

    def _enough(self, candidates: Iterator[Record], short: int) -> tuple[list[Record], int]:
        """The first candidates that free `short` blocks, less those not needed after all; and what is missing."""
        chosen: list[tuple[Record, int]] = []
        while short > 0 and (record := next(candidates, None)) is not None:
            if frees := self._engine.frees(record):
                chosen.append((record, frees))
                short -= frees
        needed = []
        for record, frees in reversed(chosen):
            if frees <= -short:
                short += frees
            else:
                needed.append(record)
        return needed[::-1], short

    def _victims(self, record: Record) -> Iterator[Record]:
        """Running requests that this one may cut in on: who borrows, then whom it outranks, the worst first."""
        worst_running, seen = self._engine.worst_running, set()
        for running in self._limits.borrowers(worst_running()):
            seen.add(running)
            if self._may_stop(running):
                yield running
        if record.group.policy.cut_in in CUTS:
            for running in worst_running():
                if not self.outranks(record, running):
                    return
                if running not in seen and self._may_stop(running):
                    yield running

    def _may_stop(self, running: Record) -> bool:
        """Whether nothing protects a running request from being a victim."""
        protected = running.aged or running.protected_until > self._now
        return not protected and self._engine.obstacle(running, "keep") is None

    def _take_slot(self, victim: Record, mode: str, why: str) -> bool:
        """Have the slot of a running request; False if it takes another step or two until it is free."""
        engine = self._engine
        while engine.spare_slots() <= 0 and self._park_one(why):
            pass
        victim.was_cut = True
        if engine.spare_slots() <= 0 and engine.parks and not engine.in_transit(victim):
            # With no slot to spare, and nothing of it in flight, its own slot is free at once.
            self._holds.hold(self._now, victim, ENGINE, "keep", None, why)
            return self._park_one(why)
        if engine.spare_slots() > 0:
            self._holds.hold(self._now, victim, ENGINE, "keep", None, why)
            return True
        if mode == "kv":
            self._evict(self._now, victim, why)
            return True
        if engine.parks and engine.spare_slots() == 0:  # only one at a time is on its way out
            self._holds.hold(self._now, victim, ENGINE, "keep", None, why)
        return False

    # Reclaim

    def _park_surplus(self) -> None:
        """Kept requests beyond the spare slots cost others theirs: park them, or drop them where nobody parks."""
        engine, wanted = self._engine, len(self._queue) - self._queue.blocked + len(self._holds.returning)
        while engine.spare_slots() < 0 and engine.free_slots() < wanted:
            if self._park_one("its slot is needed"):
                continue
            if engine.parks:
                return  # in flight still: the next step can
            self._holds.drop_kv(self._now, max(self._roster.kept, key=self.key), "its slot is needed")

    def _park_one(self, why: str) -> bool:
        """Park the least urgent request that can be."""
        able = [record for record in self._roster.kept if self._engine.parkable(record)]
        if not able:
            return False
        self._holds.park(self._now, max(able, key=self.key), why)
        return True

    def give_way(self, asker: Record) -> bool:
        """Inside a step, blocks are short for `asker`: drop the least urgent held KV; False if none may go."""
        able = self._giving_way(asker)
        if asker.state is QUEUED:
            free = self._engine.free_blocks()
            enough, short = self._enough(able, self._engine.needs(asker, free) - free)
            able = iter(enough if short <= 0 else ())
        record = next(able, None)
        if record is None:
            return False
        self._holds.drop_kv(self._now, record, f"blocks are needed for {asker.request}")
        return True

    def _giving_way(self, asker: Record) -> Iterator[Record]:
        """Held requests whose KV this one may have, least urgent first.

        What only the engine holds goes on as soon as there is room, so it gives way to what runs and to what
        outranks it; what others hold may stay held for ever, so it gives way to everything.
        """
        held = [*self._roster.kept, *self._roster.parked]
        running = asker.state is RUNNING
        able = [
            record
            for record in held
            if record is not asker
            and (running or self.outranks(asker, record) or record.holds.keys() != {ENGINE})
            and self._engine.frees(record)
        ]
        yield from sorted(able, key=self.key, reverse=True)
