"""Made-up workers for `bench.controller`: status frames as a worker writes them, and as much obedience as is looked at.

Each worker serves all its active tenants a little between two frames, lets one leave and another come. It has served
every tenant before, so that a full frame, one in twenty, lists them all; a delta goes ahead of it, as from a real one.
As there, a delta's `charged` is of all active tenants but who came, and after a `rank` its `bases` of whom that told.
"""

import itertools
from multiprocessing.connection import Connection
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from coxswain.schemas.commands import Configure, Rank, decode, encode
from coxswain.schemas.policy import Epoch, Lead, digest
from coxswain.schemas.status import (
    ZERO,
    CommandStats,
    Frame,
    Gone,
    KvBlocks,
    Leader,
    RequestStatus,
    Slots,
    TenantStatus,
)

FULL_EVERY: Final = 20
START: Final = 1_700_000_000.0


class Tenant:
    """One tenant on one made-up worker."""

    __slots__ = ("base", "charged", "input_tokens", "lift", "output_tokens", "queued", "running")

    def __init__(self) -> None:
        self.base = self.charged = self.lift = 0.0
        self.queued = self.running = self.input_tokens = self.output_tokens = 0


class Worker:
    """A worker that serves `active` of its tenants at a time, with `running` requests and `waiting` listed.

    It says so every `period` turns, and in full every second.
    """

    def __init__(
        self, number: int, tenants: list[str], active: int, running: int, waiting: int, period: int = 1
    ) -> None:
        self.name, self.incarnation = f"w{number:03}", f"01{number:03}"
        self.tenants = {name: Tenant() for name in tenants}
        turned = [
            tenants[(number * 37 + place) % len(tenants)] for place in range(len(tenants))
        ]  # their own order
        self.newcomers = itertools.cycle(turned)
        self.active: dict[str, None] = {}
        self.rebased: set[str] = set()
        """Tenants whose base is other than the last frame said."""
        self.config = digest({}, {})
        self.epoch: Epoch | None = None
        self.seq = self.revision = 0
        self.beat, self.running, self.waiting = number % FULL_EVERY, running, waiting
        self.period = period
        self.numbers = itertools.count()
        self.requests = [self._request(place, "running") for place in range(running)]
        while len(self.active) < min(active, len(tenants)):
            self._join(next(self.newcomers))

    def _join(self, name: str) -> None:
        floor = min((self._virtual(each) for each in self.active), default=0.0)
        tenant = self.tenants[name]
        tenant.lift += max(0.0, floor - self._virtual(name))
        tenant.queued = 3
        self.active[name] = None

    def _virtual(self, name: str) -> float:
        tenant = self.tenants[name]
        return tenant.base + tenant.charged + tenant.lift

    def _request(self, place: int, state: Any, output_tokens: int = 0) -> RequestStatus:
        tenant = next(itertools.islice(self.tenants, place % len(self.tenants), None))
        return RequestStatus(
            request=f"cox.{tenant}.chat.01JD0{next(self.numbers):08}.0123456789abcdef", child=0, tenant=tenant,
            class_="default", priority=0, state=state, kv="none", arrived_at=START, prompt_tokens=200,
            cached_tokens=0, output_tokens=output_tokens, deadline_s=None,
            position=place if state == "queued" else None,
        )  # fmt: skip

    def frames(self, now: float) -> list[bytes]:
        """Serve a little, then say so; nothing in the turns between."""
        self.beat += 1
        if self.beat % self.period:
            return []
        self.revision += 1
        leaver = next(iter(self.active))
        del self.active[leaver]
        self.tenants[leaver].queued = 0
        newcomer = next(name for name in self.newcomers if name not in self.active)
        self._join(newcomer)
        for place, name in enumerate(self.active):
            tenant = self.tenants[name]
            tenant.charged += 2.0 * (1 + place % 4)
            tenant.output_tokens += 1 + place % 4
        self.tenants[newcomer].charged += 200.0
        self.tenants[newcomer].input_tokens += 200
        touched, rebased = {newcomer, leaver}, self.rebased & self.active.keys()
        self.rebased.clear()
        rows = sorted([*self.active, leaver], key=lambda name: name not in touched)
        delta = Frame(
            worker=self.name, incarnation=self.incarnation, seq=self._next(), full=False, part=0, parts=1,
            sent_at=now, step=self.beat, model="m", vllm_version="0", state="serving",
            slots=Slots(active=self.running, total=self.running, running=self.running, held=0),
            kv_blocks=KvBlocks(total=10_000, used=9_000, held=0), step_s=0.03,
            queued=3 * len(self.active), running=self.running, held=0, preempted_total=0,
            recomputed_tokens_total=0, commands=CommandStats(), leader=Leader(epoch=self.epoch),
            config=self.config, events_dropped_total=0, revision=self.revision,
            charged={name: self.tenants[name].charged for name in rows if name not in touched},
            bases={name: self.tenants[name].base for name in rows if name in rebased - touched},
            tenants=tuple(map(self._row, rows)), requests=self._requests(), gone=self._gone,
        )  # fmt: skip
        frames = [encode(delta)]
        if self.beat % FULL_EVERY == 0:
            everybody = tuple(map(self._row, self.tenants))
            full = replace(
                delta, seq=self._next(), full=True, charged={}, bases={}, tenants=everybody, gone=()
            )
            frames.append(encode(full))
        return frames

    def _next(self) -> int:
        self.seq += 1
        return self.seq

    def _requests(self) -> tuple[RequestStatus, ...]:
        """All that run have a token more, one of them is new, and all that wait have moved up."""
        old = self.requests.pop(0) if self.requests else None
        self._gone = (Gone(request=old.request, child=0),) if old else ()
        self.requests = [replace(each, output_tokens=each.output_tokens + 1) for each in self.requests]
        if self.running:
            self.requests.append(self._request(self.beat, "running"))
        return (*self.requests, *(self._request(place, "queued") for place in range(self.waiting)))

    def _row(self, name: str) -> TenantStatus:
        tenant = self.tenants[name]
        return TenantStatus(
            tenant=name, queued=tenant.queued, running=1 if tenant.queued else 0, oldest_queued_s=0.1,
            virtual_time=self._virtual(name) or ZERO, base=tenant.base or ZERO, charged=tenant.charged or ZERO,
            lift=tenant.lift or ZERO, uncached_input_tokens_total=tenant.input_tokens,
            output_tokens_total=tenant.output_tokens, finished_total=tenant.output_tokens // 100,
        )  # fmt: skip

    def obey(self, command: Any) -> None:
        """Apply a rank or tables; anything else changes nothing that the loop looks at."""
        if isinstance(command, Rank):
            for name, rank in command.tenants.items():
                self.tenants[name].base = rank.base
                self.rebased.add(name)
        elif isinstance(command, Configure):
            self.config = digest(command.classes, command.tenants)


def herd(pipe: Connection, workers: int, tenants: int, *shape: int) -> None:
    """The child: every worker's frame for each time asked, obeying what it was sent before; None ends it."""
    names = [f"tenant-{number:05}" for number in range(tenants)]
    fleet = {w.name: w for w in (Worker(n, names, *shape) for n in range(workers))}
    while (asked := pipe.recv()) is not None:
        now, outgoing = asked
        for name, verb, payload in outgoing:
            if verb == "lead":
                epoch = msgspec.json.decode(payload, type=Lead).epoch
                for worker in fleet.values():
                    worker.epoch = epoch
            else:
                fleet[name].obey(decode(verb, payload)[0])
        pipe.send([(name, payload) for name, worker in fleet.items() for payload in worker.frames(now)])
