"""What workers' status frames add up to, for `/metrics`: counters that only grow, over few tenants. Pure.

Frames say totals since an incarnation began, of every tenant there ever was. Here they become increments, and each
increment is credited once, for good: to its tenant where that has a series of its own, else to `other`. So every
counter only grows, over restarts and however tenants change between named and `other`, and increments add up exactly.

Who is named: up to `limit` tenants, in order of what they were served of late; when there are more, a place changes
hands only to one that is served `MARGIN` times as much as its holder, who has had it for `TENURE_S` at least. The
series of a tenant that lost its place stands still for `KEPT_S`, so that Prometheus has seen the last of it, and then
ends. It is not added to `other`: that would look like service all at once.

Called by `metrics.py`, whenever somebody asks for `/metrics`. A struct of plain values, so that several API
server processes can share it as bytes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, TypeVar

import msgspec
from msgspec.structs import replace

from coxswain.schemas import metrics as names
from coxswain.schemas.commands import VERBS
from coxswain.schemas.errors import Code
from coxswain.schemas.metrics import Metric
from coxswain.schemas.names import OTHER
from coxswain.schemas.parts import ROWS
from coxswain.schemas.status import Frame, TenantStatus

MARGIN: Final = 1.5
TENURE_S: Final = 300.0
KEPT_S: Final = 900.0
HALF_LIFE_S: Final = 120.0
"""Of what counts as "of late"."""
OUTPUT_PRICE: Final = 2.0
"""One output token in input tokens, as workers price it where nobody ranks."""
MAX_CLASSES: Final = 32
"""Classes with a series of their own, first come: a client may be free to name any."""

OUTCOMES: Final = frozenset(("applied", "partial", *(str(int(code)) for code in Code)))
"""Of a command."""

Number = int | float
"""Whole numbers stay whole: what frames count in integers is summed in integers."""
Key = TypeVar("Key")
Served = dict[str, dict[str, Number]]
"""By label, then by family: what was credited."""

TENANT_FIELDS: Final[dict[Metric, str]] = {
    names.TENANT_CHARGED: "charged",
    names.TENANT_UNCACHED_INPUT: "uncached_input_tokens_total",
    names.TENANT_CACHED_INPUT: "cached_input_tokens_total",
    names.TENANT_OUTPUT: "output_tokens_total",
    names.TENANT_RECOMPUTED: "recomputed_tokens_total",
    names.TENANT_DISCARDED: "discarded_tokens_total",
    names.TENANT_FINISHED: "finished_total",
}
"""Where a tenant's counters stand in its row."""


class Life(msgspec.Struct):
    """One worker: its last frames, and what it added up to over all its incarnations."""

    frame: Frame
    """The last full one."""
    head: Frame
    """The last one of any kind, without its rows."""
    heard_at: float
    """When that came, Unix s."""
    restarts: int = 0
    counts: dict[str, Number] = {}
    """By family."""
    commands: dict[tuple[str, str], Number] = {}
    """By verb and outcome."""
    served: Served = {}
    rows: dict[str, TenantStatus] = {}
    """Of this incarnation, by tenant: a tenant that is listed no more keeps what it was served."""


class Place(msgspec.Struct):
    """A tenant's rate of service, in input tokens per second."""

    rate: float
    at: float

    def now(self, now: float) -> float:
        """The rate, if nothing came since."""
        return self.rate * math.exp2(-max(0.0, now - self.at) / HALF_LIFE_S)

    def add(self, amount: float, now: float) -> None:
        """It was served so much since it was last looked at."""
        # The mean of an exponential window: a steady rate is shown as it is once the window is full.
        self.rate = self.now(now) + amount * math.log(2) / HALF_LIFE_S
        self.at = now


class Tally(msgspec.Struct):
    """All workers behind one server.

    Args:
        limit: tenants with a series of their own.
    """

    limit: int
    workers: dict[str, Life] = {}
    named: dict[str, float] = {}
    """Tenants with a series of their own, and since when."""
    kept: dict[str, float] = {}
    """Tenants that lost theirs, and when: it is still shown."""
    rates: dict[str, Place] = {}
    classes: list[str] = []
    dropped: dict[str, Number] = {}
    """What was credited to series that ended, by family: with these, everything adds up for ever."""

    def take(self, frames: Iterable[tuple[float, Frame]], now: float) -> None:
        """Take whole full frames, each with when it came, and choose who is named. All times are Unix seconds."""
        gained = [gain for heard_at, frame in frames for gain in self._put(frame, heard_at)]
        self._fill(gained, now)
        for life, tenant, families in gained:
            self._credit(life, tenant, families)
        self._swap(now)
        self._forget(now)

    def hear(self, said: Iterable[tuple[float, Frame]]) -> None:
        """Take the last frame of each worker, of any kind, and when it came: full ones of many tenants come seldom."""
        for at, frame in said:
            life = self.workers.get(frame.worker)
            if life is not None and _later(frame, life.head):
                life.head, life.heard_at = _bare(frame), max(life.heard_at, at)

    def label(self, tenant: str) -> str:
        """Whose series a tenant's numbers are in now."""
        return tenant if tenant in self.named else OTHER

    def class_label(self, class_: str) -> str:
        """The same of a class."""
        return class_ if class_ in self.classes else OTHER

    # Increments

    def _put(self, frame: Frame, heard_at: float) -> Iterator[tuple[Life, str, dict[str, Number]]]:
        """Note a frame; yield what each tenant gained by it."""
        life = self.workers.get(frame.worker)
        old: Frame | None = None
        if life is None:
            life = self.workers[frame.worker] = Life(frame, _bare(frame), heard_at)
        elif frame.incarnation == life.frame.incarnation:
            if frame.seq <= life.frame.seq:
                return
            old = life.frame
        elif frame.incarnation < life.frame.incarnation:
            return  # late, or of a second process under this name: the later started counts, as everywhere
        else:
            life.restarts += 1
            life.rows = {}
        life.frame = frame
        self.hear([(heard_at, frame)])
        _add(life.counts, _worker_counts(frame), _worker_counts(old) if old else {})
        _add(life.commands, _command_counts(frame), _command_counts(old) if old else {})
        for class_ in frame.classes:
            if (
                len(self.classes) < MAX_CLASSES
                and class_.class_ not in self.classes
                and class_.class_ != OTHER
            ):
                self.classes.append(class_.class_)
        for row in frame.tenants:
            known = life.rows.get(row.tenant)
            if known is None or row != known:
                gain: dict[str, Number] = {}
                _add(gain, _tenant_counts(row), _tenant_counts(known) if known else {})
                # What was charged ahead and did not come is given back: charged again, it is not counted again.
                most = max(row.charged, known.charged) if known else row.charged
                life.rows[row.tenant] = replace(row, charged=most)
                yield life, row.tenant, gain

    def _credit(self, life: Life, tenant: str, gain: dict[str, Number]) -> None:
        _add(life.served.setdefault(self.label(tenant), {}), gain, {})

    # Who is named

    def _fill(self, gained: list[tuple[Life, str, dict[str, Number]]], now: float) -> None:
        """Note rates; give places that are free to those served most."""
        for _, tenant, gain in gained:
            self.rates.setdefault(tenant, Place(0.0, now)).add(_service(gain), now)
        if len(self.named) < self.limit:
            news = {tenant for _, tenant, _ in gained} - self.named.keys() - {OTHER}
            for tenant in sorted(news, key=lambda name: (-self._rate(name, now), name)):
                if len(self.named) < self.limit:
                    self._name(tenant, now)

    def _swap(self, now: float) -> None:
        """Let places change hands; whoever gets one begins with the next increment."""
        held = sorted(
            (name for name, since in self.named.items() if now - since >= TENURE_S),
            key=lambda name: self._rate(name, now),
        )
        if not held:
            return
        others = (name for name in self.rates if name not in self.named and name != OTHER)
        for loser, winner in zip(held, sorted(others, key=lambda name: -self._rate(name, now)), strict=False):
            if self._rate(winner, now) <= MARGIN * self._rate(loser, now):
                return
            del self.named[loser]
            self.kept[loser] = now
            self._name(winner, now)

    def _name(self, tenant: str, now: float) -> None:
        self.named[tenant] = now
        self.kept.pop(tenant, None)
        for life in self.workers.values():
            if tenant in life.rows:
                life.served.setdefault(tenant, {})

    def _rate(self, tenant: str, now: float) -> float:
        place = self.rates.get(tenant)
        return place.now(now) if place else 0.0

    def _forget(self, now: float) -> None:
        """End series that were kept for long enough, or are too many; and rates that are none any more."""
        oldest_first = sorted(self.kept, key=self.kept.__getitem__)
        for place, tenant in enumerate(oldest_first):
            if now - self.kept[tenant] > KEPT_S or len(oldest_first) - place > self.limit:
                del self.kept[tenant]
                for life in self.workers.values():
                    _add(self.dropped, life.served.pop(tenant, {}), {})
        self.rates = {
            tenant: place
            for tenant, place in self.rates.items()
            if tenant in self.named or place.now(now) > 1e-3
        }


def _later(frame: Frame, known: Frame) -> bool:
    return (frame.incarnation, frame.seq) >= (known.incarnation, known.seq)


def _bare(frame: Frame) -> Frame:
    return replace(frame, **dict.fromkeys(ROWS, ()))


def _add(where: dict[Key, Number], new: Mapping[Key, Number], old: Mapping[Key, Number]) -> None:
    """Add what `new` has more than `old`; totals never shrink, so less is nothing."""
    for name, value in new.items():
        where[name] = where.get(name, 0) + max(0, value - old.get(name, 0))


def _tenant_counts(row: TenantStatus) -> dict[str, Number]:
    return {metric.name: getattr(row, field) for metric, field in TENANT_FIELDS.items()}


def _worker_counts(frame: Frame) -> dict[str, Number]:
    return {
        names.WORKER_STEPS.name: frame.step,
        names.WORKER_PREEMPTIONS.name: frame.preempted_total,
        names.WORKER_EVENTS_DROPPED.name: frame.events_dropped_total,
    }


def _command_counts(frame: Frame) -> dict[tuple[str, str], Number]:
    """Commands by verb and outcome: those that there are, and `other`."""
    counts: dict[tuple[str, str], Number] = {}
    for verb, outcomes in frame.commands.outcomes_total.items():
        for outcome, count in outcomes.items():
            key = verb if verb in VERBS else OTHER, outcome if outcome in OUTCOMES else OTHER
            counts[key] = counts.get(key, 0) + count
    return counts


def _service(gain: dict[str, Number]) -> float:
    """What a tenant was given, in input tokens."""
    return gain[names.TENANT_UNCACHED_INPUT.name] + OUTPUT_PRICE * gain[names.TENANT_OUTPUT.name]
