"""The steering core's engine as a small in-memory model: who runs, who waits, whose KV is there.

Honest rather than obliging: it fails on what a real engine could not do (hold what does not run, drop KV
that is not there), and keeps its own count of what was computed twice and of what everybody owes, so that the
core's can be compared with it. It calls the core as the vLLM shell does. Time is a number that tests move.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from coxswain.schemas import events as ev
from coxswain.schemas.policy import Lead
from coxswain.service.scheduler.core import SteeringCore
from coxswain.service.scheduler.record import Hold, Record
from coxswain.service.scheduler.states import State


class Work:
    """What the engine knows of a request's progress: positions whose KV is computed."""

    def __init__(self, tokens: int) -> None:
        self.num_computed_tokens = 0
        self.tokens = tokens
        """Output tokens after which it ends."""
        self.place = 0
        self.obstacle: str | None = None


class FakeEngine:
    """An engine that computes `chunk` positions of each running request per step.

    Args:
        slots: requests that may run at once.
        chunk: positions of one request that a step computes.
        leader_lease_s: how long a leader may be silent.
        spare: slots beyond, for what is held.
        blocks: KV blocks, of one position each.
    """

    def __init__(
        self,
        slots: int = 4,
        chunk: int = 8,
        leader_lease_s: float = 5.0,
        spare: int = 1_000,
        blocks: int = 10**9,
    ) -> None:
        self.now = 1_000.0
        self.slots = slots
        self.spare = spare
        self.blocks = blocks
        self.parks = True
        self.budget = 10**9
        """Positions that a step may compute, as the core is told; this model's own steps know no bound."""
        self.chunk = chunk
        self.again: dict[Record, None] = {}
        """Released from a park: they run from the next step, before anything that waits."""
        self.events: list[tuple[Record | None, type[ev.Event], dict[str, Any]]] = []
        self.running: dict[Record, None] = {}
        self.waiting: dict[Record, None] = {}
        self.kv: dict[Record, int] = {}
        """Positions in the KV cache, of requests that have any."""
        self.furthest: dict[Record, int] = {}
        self.recomputed: Counter[Record] = Counter()
        """Positions computed again after they had been computed once: this model's own count."""
        self.computed: Counter[Record] = Counter()
        """Positions computed, each as often as it was."""
        self.owed: dict[str, float] = defaultdict(float)
        """What each tenant should have been charged: every token at the price and weight when it came."""
        self.slotless: dict[Record, None] = {}
        """Parked."""
        self.by_admission: set[Record] = set()
        """Kept ones that can only go on through admission."""
        self.unkeepable: set[Record] = set()
        """Those that lose their KV when they are held."""
        self.flying: Counter[Record] = Counter()
        self.told: list[str] = []
        """Ids of requests whose clients were told of an abort."""
        self.made = 0
        self.core = SteeringCore(self, self._emit, leader_lease_s=leader_lease_s)

    def _emit(self, _now: float, record: Record | None, kind: type[ev.Event], fields: dict[str, Any]) -> None:
        self.events.append((record, kind, fields))

    # What clients and the device do

    def submit(self, tenant: str = "a", *, prompt: int = 16, tokens: int = 8, **fields: Any) -> Record:
        """A request arrives and is queued."""
        self.made += 1
        name = f"r{self.made}"
        known = {"id": name, "request": name, "asked_class": "", "priority": 0, "arrived_at": self.now}
        record = Record(tenant=tenant, prompt_tokens=prompt, outputs=[], **(known | fields))
        self.core.arrive(self.now, record, Work(tokens))
        self.enqueue(record)
        return record

    def admit(self, cached: int = 0) -> Record:
        """Let the head of the queue run."""
        record = self.core.queue.peek()
        self.core.queue.take(record)
        self.core.admitting(record, cached)
        del self.waiting[record]
        self.running[record] = None
        if record not in self.furthest:
            self.furthest[record] = 0
            prices = self.core.tenants.prices
            self._owe(record, (record.prompt_tokens - cached) * prices.input + cached * prices.cached)
        record.payload.num_computed_tokens = self.kv[record] = cached
        self.core.admitted(self.now, record, cached)
        return record

    def skip(self, count: int = 1) -> None:
        """Take heads of the queue and put them back, newest first, as vLLM does with what cannot run now."""
        skipped = []
        while self.core.queue and len(skipped) < count:
            skipped.append(self.core.queue.peek())
            self.core.queue.take(skipped[-1])
            self.core.admitting(skipped[-1], 0)
        for record in reversed(skipped):
            self.core.not_admitted(record)
            self.core.queue.put_back(record)

    def compute(self, record: Record, positions: int | None = None) -> None:
        """Compute the next positions of a running request; a token comes when all known ones are done."""
        assert record in self.running
        known = record.prompt_tokens + len(record.outputs)
        begin = self.kv[record]
        end = min(known, begin + (self.chunk if positions is None else positions))
        again = min(end, self.furthest[record]) - begin
        self.recomputed[record] += max(0, again)
        self.computed[record] += end - begin
        self.furthest[record] = max(end, self.furthest[record])
        record.payload.num_computed_tokens = self.kv[record] = end
        if end == known:
            self.deliver(record)

    def deliver(self, record: Record, tokens: int = 1) -> None:
        """Output tokens reach the client."""
        record.outputs.extend([7] * tokens)
        self.core.tenants.deliveries += 1
        self._owe(record, tokens * self.core.tenants.prices.output)
        if record in self.core.roster.awaiting_first:
            self.core.first_token(self.now, record)

    def step(self) -> None:
        """Admit what fits, compute, end what is done; a step takes 0.1 s."""
        self.now += 0.1
        self.core.step += 1
        self.core.tick(self.now)
        self.core.queue.age(self.now)
        self.core.room.plan(self.now)
        self.core.ledger.settle_ahead()
        for record in list(self.again):
            if self.active <= len(self.running):
                break
            del self.again[record]
            self.running[record] = None
            self.core.admitted(self.now, record, self.kv[record])
        while self.core.queue and len(self.running) < self.active and self._fits(self.core.queue.peek()):
            self.admit()
        for record in list(self.running):
            if not self._may_grow(record):
                continue
            self.compute(record)
            if len(record.outputs) >= record.payload.tokens:
                self.finish(record)

    def finish(self, record: Record, reason: str = "stop") -> None:
        """The request ends and frees what it has."""
        for place in (self.running, self.waiting, self.again, self.slotless, self.kv, self.furthest):
            place.pop(record, None)
        self.core.finished(self.now, record, reason)

    def run_short(self, record: Record) -> None:
        """Run short of KV blocks: preempt a running request, as vLLM itself does."""
        self.core.evict(self.now, record, "no free KV blocks")

    def lead(self, created: float = 1.0, revision: int = 1) -> None:
        """A leader's heartbeat arrives."""
        self.core.heard(self.now, Lead(epoch=(created, revision), controller="c1", policy="vtc", at=self.now))

    def wait(self, seconds: float) -> None:
        """Let time pass without a step; what is over ends."""
        self.now += seconds
        self.core.tick(self.now)

    # The port `Engine`

    def obstacle(self, record: Record, kv: str) -> str | None:
        """Why the request cannot be held: what the test said."""
        return record.payload.obstacle or (
            "only drop" if kv == "keep" and record in self.unkeepable else None
        )

    def hold(self, record: Record) -> None:
        """Stop running it; its KV stays. One that was released from a park, and not admitted since, has no slot."""
        if record in self.again:
            del self.again[record]
            self.slotless[record] = None
        else:
            del self.running[record]

    def park(self, record: Record) -> None:
        """Take its slot."""
        assert self.parkable(record)
        self.slotless[record] = None

    def drop(self, record: Record) -> None:
        """Free its KV."""
        self.running.pop(record, None)
        self.again.pop(record, None)
        self.slotless.pop(record, None)
        self._lose(record)

    def evict(self, record: Record) -> None:
        """Free the KV of what runs or waits with it, and queue it."""
        self.running.pop(record, None)
        self.again.pop(record, None)
        self._lose(record)
        self.waiting[record] = None
        self.core.queue.add(record)

    def resume(self, record: Record) -> None:
        """Run it again with the KV that it kept; a parked one at the next step."""
        assert record in self.kv
        assert record not in self.running
        if record in self.slotless:
            del self.slotless[record]
            self.again[record] = None
        else:
            self.running[record] = None

    def enqueue(self, record: Record) -> None:
        """Queue it."""
        assert record not in self.waiting
        assert record not in self.kv
        self.waiting[record] = None
        self.core.queue.add(record)

    def dequeue(self, record: Record) -> None:
        """Forget that it waits."""
        del self.waiting[record]

    def reprioritized(self, record: Record) -> None:
        """Note its place among all."""
        record.payload.place = record.group.place

    def abort(self, records: list[Record]) -> None:
        """End requests and tell their clients."""
        for record in records:
            self.told.append(record.id)
            self.finish(record, "abort")

    def in_flight(self, record: Record) -> int:
        """What the test said."""
        return self.flying[record] if record.state is State.RUNNING else 0

    def ready(self, record: Record) -> bool:
        """What the test said."""
        return record.payload.obstacle is None

    def parkable(self, record: Record) -> bool:
        """Nothing in flight."""
        return self.parks and not self.flying[record]

    def resumable(self, record: Record) -> bool:
        """What the test said."""
        return record not in self.by_admission

    def in_transit(self, record: Record) -> bool:
        """What the test said."""
        return bool(self.flying[record])

    def waits_with_kv(self, record: Record) -> bool:
        """Released from a park."""
        return record in self.again

    def frees(self, record: Record) -> int:
        """All its positions: this model shares none."""
        return self.kv[record]

    def needs(self, record: Record, enough: int) -> int:
        """What it has to compute, as far as it is known; a kept one goes on to its next."""
        known = record.prompt_tokens + len(record.outputs)
        return 1 if record.state is State.HELD_KEPT else known - self.kv.get(record, 0)

    def free_blocks(self) -> int:
        """Positions that nobody has."""
        return self.blocks - sum(self.kv.values())

    def step_tokens(self) -> int:
        """What the test said."""
        return self.budget

    @property
    def active(self) -> int:
        """Requests that may run at once now: kept ones have slots."""
        return min(self.slots, self.slots + self.spare - len(self.core.roster.kept))

    def free_slots(self) -> int:
        """Slots that nobody has or is about to take."""
        return self.active - len(self.running) - len(self.again)

    def spare_slots(self) -> int:
        """Spare slots that nothing kept has."""
        return self.spare - len(self.core.roster.kept)

    def released(self) -> list[Record]:
        """What runs from the next step that has a slot for it."""
        return list(self.again)

    def worst_running(self) -> Iterator[Record]:
        """By class and priority, the latest admitted first."""
        order = sorted(self.running, key=lambda record: (record.payload.place, record.priority))
        return reversed(order)

    def _may_grow(self, record: Record) -> bool:
        """Whether the step's positions of a running request have blocks: held ones give way, then the worst running."""
        known = record.prompt_tokens + len(record.outputs)
        while record in self.running:
            if min(self.chunk, known - self.kv[record]) <= self.free_blocks():
                return True
            if not self.core.room.give_way(record):
                self.run_short(next(self.worst_running()))
        return False

    def _fits(self, record: Record) -> bool:
        """Whether its blocks are free, after reclaim."""
        while self.needs(record, 0) > self.free_blocks():
            if not self.core.room.give_way(record):
                return False
        return True

    def _lose(self, record: Record) -> None:
        del self.kv[record]
        record.payload.num_computed_tokens = 0

    def _owe(self, record: Record, cost: float) -> None:
        self.owed[record.account.name] += cost / record.account.weight

    # What tests ask

    def check(self) -> None:
        """The core and this engine agree on who is where, and every invariant holds."""
        core = self.core
        core.validate()
        assert self.running.keys() | self.again.keys() == core.roster.running.keys()
        with_kv = core.roster.running.keys() | core.roster.kept.keys() | core.roster.parked.keys()
        assert self.kv.keys() == with_kv | self.again.keys()
        assert self.slotless.keys() == core.roster.parked.keys()
        assert len(self.running) + len(core.roster.kept) <= self.slots + self.spare
        states = {record: record.state for record in core.roster.records.values()}
        assert self.waiting.keys() == {record for record, state in states.items() if state is State.QUEUED}
        assert set(core.queue.walk()) == self.waiting.keys()

    def seen(self, kind: type[ev.Event]) -> list[dict[str, Any]]:
        """The fields of all events of a kind, in order."""
        return [fields for _, known, fields in self.events if known is kind]


def picture(core: SteeringCore) -> dict[str, Any]:
    """All that steering knows, as plain values: equal pictures mean that nothing changed."""
    roster = core.roster
    groups = (roster.running, roster.held, roster.kept, roster.parked, roster.awaiting_first)
    return {
        "records": {
            record.id: _slots(record, "payload", "account") for record in core.roster.records.values()
        },
        "accounts": {  # settled by whoever looks, as we do below
            name: _slots(account, "settled_at") for name, account in core.tenants.accounts.items()
        },
        "queue": [record.id for record in core.queue.walk()],
        "sets": [[record.id for record in group] for group in groups],
        "totals": (core.ledger.preempted_total, core.ledger.recomputed_total),
        "tables": (core.digest, dict(core.classes), dict(core.tenants.table), core.tenants.prices),
        "leader": (core.epoch, core.leader, core.leader_heard_at),
        "limits": {role: dict(stored) for role, stored in core.limits._stored.items() if stored},
        "drained by": set(core.drain.roles),
    }


def _slots(thing: Any, *without: str) -> dict[str, Any]:
    slots = (slot for kind in type(thing).__mro__ for slot in getattr(kind, "__slots__", ()))
    return {slot: _plain(getattr(thing, slot)) for slot in slots if slot not in without}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return [(getattr(key, "id", key), _hold(item)) for key, item in value.items()]
    return list(value) if isinstance(value, list) else value


def _hold(hold: Any) -> Any:
    return (hold.kv, hold.since, hold.lease_until) if isinstance(hold, Hold) else hold
