"""The steering core's engine as a small in-memory model: who runs, who waits, whose KV is there.

Honest rather than obliging: it fails on what a real engine could not do (hold what does not run, drop KV
that is not there), and keeps its own count of what was computed twice and of what everybody owes, so that the
core's can be compared with it. It calls the core as the vLLM shell does. Time is a number that tests move.
"""

from collections import Counter, defaultdict
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
    """An engine with `slots` places that computes `chunk` positions of each running request per step."""

    def __init__(self, slots: int = 4, chunk: int = 8, leader_lease_s: float = 5.0) -> None:
        self.now = 1_000.0
        self.slots = slots
        self.chunk = chunk
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
        record = self.core.arrive(
            self.now,
            tenant=tenant,
            prompt_tokens=prompt,
            payload=Work(tokens),
            outputs=[],
            **(known | fields),
        )
        self.enqueue(record)
        return record

    def admit(self, cached: int = 0) -> Record:
        """Let the head of the queue run."""
        record = self.core.queue.pop()
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
        for _ in range(count):
            skipped.append(self.core.queue.pop())
            self.core.admitting(skipped[-1], 0)
        for record in reversed(skipped):
            self.core.not_admitted(record)
            self.core.queue.add(record)

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
        self._owe(record, tokens * self.core.tenants.prices.output)
        if record in self.core.roster.awaiting_first:
            self.core.first_token(self.now, record)

    def step(self) -> None:
        """Admit what fits, compute, end what is done; a step takes 0.1 s."""
        self.now += 0.1
        self.core.step += 1
        self.core.tick(self.now)
        self.core.ledger.settle_all()
        while self.core.queue and len(self.running) < self.slots:
            self.admit()
        for record in list(self.running):
            self.compute(record)
            if len(record.outputs) >= record.payload.tokens:
                self.finish(record)

    def finish(self, record: Record, reason: str = "stop") -> None:
        """The request ends and frees what it has."""
        for place in (self.running, self.waiting, self.kv, self.furthest):
            place.pop(record, None)
        self.core.finished(self.now, record, reason)

    def evict(self, record: Record) -> None:
        """Run short of KV blocks: preempt a running request."""
        del self.running[record]
        self.core.evicted(self.now, record)
        self._lose(record)
        self.waiting[record] = None
        self.core.queue.add(record)

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
        return record.payload.obstacle

    def hold(self, record: Record) -> None:
        """Stop running it; its KV stays."""
        del self.running[record]

    def drop(self, record: Record) -> None:
        """Free its KV."""
        self.running.pop(record, None)
        self._lose(record)

    def resume(self, record: Record) -> None:
        """Run it again with the KV that it kept."""
        assert record in self.kv
        assert record not in self.running
        self.running[record] = None

    def enqueue(self, record: Record) -> None:
        """Queue it."""
        assert record not in self.waiting
        self.waiting[record] = None
        self.core.queue.add(record)

    def dequeue(self, record: Record) -> None:
        """Forget that it waits."""
        del self.waiting[record]

    def reprioritized(self, record: Record) -> None:
        """Note its place among all."""
        record.payload.place = self.core.class_place(record.class_)

    def abort(self, records: list[Record]) -> None:
        """End requests and tell their clients."""
        for record in records:
            self.told.append(record.id)
            self.finish(record, "abort")

    def in_flight(self, record: Record) -> int:
        """What the test said."""
        return self.flying[record] if record.state is State.RUNNING else 0

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
        assert self.running.keys() == core.roster.running.keys()
        assert self.kv.keys() == core.roster.running.keys() | core.roster.kept.keys()
        states = {record: record.state for record in core.roster.records.values()}
        assert self.waiting.keys() == {record for record, state in states.items() if state is State.QUEUED}
        assert set(core.queue.walk()) == self.waiting.keys()

    def seen(self, kind: type[ev.Event]) -> list[dict[str, Any]]:
        """The fields of all events of a kind, in order."""
        return [fields for _, known, fields in self.events if known is kind]


def picture(core: SteeringCore) -> dict[str, Any]:
    """All that steering knows, as plain values: equal pictures mean that nothing changed."""
    groups = (core.roster.running, core.roster.held, core.roster.kept, core.roster.awaiting_first)
    return {
        "records": {
            record.id: _slots(record, "payload", "account") for record in core.roster.records.values()
        },
        "accounts": {name: _slots(account) for name, account in core.tenants.accounts.items()},
        "queue": [record.id for record in core.queue.walk()],
        "sets": [[record.id for record in group] for group in groups],
        "totals": (core.ledger.preempted_total, core.ledger.recomputed_total),
        "tables": (core.digest, dict(core.classes), dict(core.tenants.table), core.tenants.prices),
        "leader": (core.epoch, core.leader, core.leader_heard_at),
    }


def _slots(thing: Any, *without: str) -> dict[str, Any]:
    return {slot: _plain(getattr(thing, slot)) for slot in thing.__slots__ if slot not in without}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return [(getattr(key, "id", key), _hold(item)) for key, item in value.items()]
    return list(value) if isinstance(value, list) else value


def _hold(hold: Any) -> Any:
    return (hold.kv, hold.since, hold.lease_until) if isinstance(hold, Hold) else hold
