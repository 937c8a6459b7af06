"""Andes: serve those whose users would notice (Liu et al., arXiv 2404.16283), over a fleet.

Users read more slowly than engines write: a request that is ahead of its reader can pause, and nobody sees. Andes
gives each request, for the horizon Δt, the quality of experience that serving it now gains over letting it wait, per
token of KV that it takes, and packs the batch greedily:

    priority  π_i = (Q_serve,i − Q_wait,i) / l_i                     l_i: its context, prompt + output so far
    batch     in order of π while Σ l_i ≤ M and their number ≤ B     M: KV capacity in tokens, B: slots
    only when the KV cache is full or somebody waits; what runs counts 1.5-fold, as in the released code
    (AmberLJC/vllm-0.6.1, andes_scheduler.py), since every switch costs something

Quality is `control.qoe`. Here, per worker: the batch gets priority −1, the rest 0, in classes with `order: priority`
and cut-in. So the worker takes the places of the rest for those of the batch that wait, and none without need. What
it takes them from keeps its KV; M bounds all that have KV, not only the batch, or requests would push out each
other's and compute it again and again. Commands go out for requests that change sides.
"""

from typing import Annotated, ClassVar, Final

import msgspec

from coxswain.control.estimates.qoe import Reader
from coxswain.control.fleet import Fleet, RequestKey, WorkerView
from coxswain.control.policy import Directives, Sees, Tables, each_class
from coxswain.schemas.policy import CutIn, NotNegative
from coxswain.schemas.status import RequestStatus

RUNS: Final = 1.5
"""What runs counts so many times."""
FULL: Final = 0.9
"""Part of the KV cache that is given out: the rest is for what those who have it will still say."""
NOW, LATER = -1, 0
"""Priorities; a request that was not looked at yet has 0, or a long queue would push out whoever runs."""
BLOCK: Final = 16
"""Tokens per KV block until a worker's own numbers tell."""

Positive = Annotated[float, msgspec.Meta(gt=0, le=1e6)]


class Andes:
    """The average user waits least for the next word."""

    name: ClassVar[str] = "andes"
    sees: ClassVar[Sees] = "queue"

    class Params(msgspec.Struct, frozen=True, kw_only=True):
        """Who reads, and how often to choose anew."""

        speed: Positive = 4.8
        """Tokens per second that a user reads; the paper has 4.8 for reading and 3.3 for listening."""
        ttft_s: NotNegative = 1.0
        """When the first token is expected, after the arrival."""
        horizon_s: Positive = 50.0
        """Δt."""
        every_s: NotNegative = 0.25
        """How often the batch is chosen."""
        quantum_s: NotNegative = 4.0
        """Nobody is interrupted sooner. A slot that changes hands loses some steps: at 0.5 s a burst took 6 % longer,
        and quality was less (docs/results)."""
        cut_in: CutIn = "kv"

    def __init__(self, params: Params) -> None:
        self.params = params
        self._readers: dict[str, dict[RequestKey, Reader]] = {}
        self._fleet = Fleet()
        self._tables = Tables()
        self._directives = Directives()
        self._decided_at = float("-inf")

    def observe(self, fleet: Fleet, tables: Tables, now: float) -> None:
        """Follow every reader whose request we know of."""
        self._fleet, self._tables = fleet, tables
        self._readers = {
            view.worker: self._follow(view, self._readers.get(view.worker, {}), now) for view in fleet.live()
        }

    def _follow(
        self, view: WorkerView, known: dict[RequestKey, Reader], now: float
    ) -> dict[RequestKey, Reader]:
        readers = {}
        for row in view.known():
            key = row.request, row.child
            reader = known.get(key) or Reader(self.params.ttft_s, self.params.speed)
            reader.look(max(0.0, now - row.arrived_at), row.output_tokens)
            readers[key] = reader
        return readers

    def decide(self, now: float) -> Directives:
        """The batch of each worker goes first."""
        if now - self._decided_at >= self.params.every_s:
            self._decided_at = now
            self._directives = Directives(
                classes=each_class(
                    self._tables.classes,
                    order="priority",
                    cut_in=self.params.cut_in,
                    quantum_s=self.params.quantum_s,
                ),
                priorities={view.worker: self._choose(view) for view in self._fleet.live() if view.complete},
            )
        return self._directives

    def _choose(self, view: WorkerView) -> dict[RequestKey, int]:
        requests = {(row.request, row.child): row for row in view.known()}
        if not view.frame.queued and not view.frame.held:
            return dict.fromkeys(requests, LATER)
        readers = self._readers[view.worker]
        worth = {key: self._worth(row, readers[key]) for key, row in requests.items()}
        by_worth = sorted(worth, key=lambda key: (-worth[key], requests[key].arrived_at, key))
        free = FULL * _capacity(view) - sum(_context(row) for row in requests.values() if _resident(row))
        slots = view.frame.slots.active
        chosen = dict.fromkeys(requests, LATER)
        for key in by_worth:
            row = requests[key]
            if not slots:
                break
            if not _resident(row):
                if _context(row) > free:
                    continue
                free -= _context(row)
            slots -= 1
            chosen[key] = NOW
        return chosen

    def _worth(self, row: RequestStatus, reader: Reader) -> float:
        """π."""
        gain = reader.gain(self.params.horizon_s)
        return gain * (RUNS if row.state == "running" else 1.0) / _context(row)


def _resident(row: RequestStatus) -> bool:
    return row.state == "running" or row.kv in ("kept", "parked")


def _context(row: RequestStatus) -> int:
    return row.prompt_tokens + row.output_tokens + 1


def _capacity(view: WorkerView) -> float:
    """KV capacity in tokens, from how many blocks those take that have KV."""
    blocks = view.frame.kv_blocks
    held = sum(_context(row) for row in view.requests.values() if _resident(row))
    per_block = min(held / blocks.used, BLOCK * 16.0) if held and blocks.used else BLOCK
    return blocks.total * per_block
