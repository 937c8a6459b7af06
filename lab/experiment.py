"""One run: this traffic, these workers, this policy, this network; and what became of every request.

Deterministic: equal setups give equal outcomes. Called by `cox lab`, by tests and by benchmarks.
"""

import gc
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Protocol

import msgspec

from coxswain.control import policy as policies
from coxswain.control.errors import PolicyError
from coxswain.lab.agenda import START, Agenda
from coxswain.lab.controller import Controller
from coxswain.lab.engine import Build, Engine, public_id
from coxswain.lab.life import Life
from coxswain.lab.link import Link
from coxswain.lab.setup import BUCKET, ORACLES, RPM, STOCK, Kind, Setup
from coxswain.lab.trace import Arrival, TraceError

RPM_WINDOW_S: Final = 60.0
BURST_S: Final = 10.0
"""Worth of requests that a token bucket holds."""
LEAD_S: Final = 1.0
"""How long the controller is there before traffic begins: its tables are in force then."""
LONGEST_S: Final = 7 * 86_400.0
"""Virtual time after which a run is given up: somebody starves."""
Progress = Callable[[int, float], None]
"""Told now and then: requests that ended, virtual seconds since traffic began."""

MakePolicy = Callable[[], policies.Policy]


class StuckError(Exception):
    """A run came to no end; the text says what was left."""


class Outcome(msgspec.Struct, kw_only=True):
    """What came of a run."""

    lives: list[Life]
    """Every request, in order of arrival."""
    virtual_s: float
    """From the beginning of the traffic to the end of the last request."""
    wall_s: float
    """How long the run took here: this and the next are all that is not the same each time."""
    cpu_s: float
    steps: int
    busy_s: float
    """How long the devices worked, together."""
    commands: int
    rejected: int
    messages: int
    lost: int


def run(arrivals: Sequence[Arrival], setup: Setup, progress: Progress | None = None) -> Outcome:
    """Run this traffic to its end.

    Raises:
        PolicyError: no such policy, or a setting that it does not take.
        TraceError: a request can never fit, or there is none.
        StuckError: requests are left that nothing will ever finish.
    """
    _check(arrivals, setup)
    make_policy, kind, limit = chosen(setup)
    agenda = Agenda(START - LEAD_S)
    lives = [Life(arrival=arrival) for arrival in arrivals]
    left = len(lives)
    ended = 0

    def landed(life: Life) -> None:
        del life
        nonlocal ended
        ended += 1

    longest = max(arrival.prompt_tokens + arrival.output_tokens for arrival in arrivals)
    lengths = _told(arrivals, setup) if setup.policy in ORACLES else None
    build = Build(setup.device, setup.admission, kind, longest + 1, setup.status_interval_s, lengths)
    began, cpu_began = time.perf_counter(), time.process_time()
    engines = [Engine(f"w{number}", build, agenda, landed) for number in range(setup.workers)]
    link = Link(agenda, latency_s=setup.latency_s, loss=setup.loss, seed=setup.seed)
    controller = None
    if make_policy is not None:
        controller = Controller(
            engines, agenda, make_policy, setup.tables, cadence_s=setup.cadence_s, link=link, outages=setup.outages
        )  # fmt: skip
    router = _Router(engines, setup)
    for number, life in enumerate(lives):
        agenda.at(
            START + life.arrival.at_s,
            lambda number=number, life=life: (  # type: ignore[misc]
                router.send(life, number) if limit is None or limit.accepts(life) else landed(life)
            ),
        )
    with _without_gc():
        turn = 0
        while ended < left:
            if not agenda.step() or agenda.now > START + LONGEST_S:
                raise StuckError(f"{left - ended} of {left} requests never end under {setup.policy}")
            turn += 1
            if progress is not None and not turn & 0xFFF:
                progress(ended, agenda.now - START)
    for engine in engines:
        engine.shutdown()
    return Outcome(
        lives=lives,
        virtual_s=max((life.finished_s for life in lives if life.finished_s is not None), default=0.0),
        wall_s=time.perf_counter() - began,
        cpu_s=time.process_time() - cpu_began,
        steps=sum(engine.steps for engine in engines),
        busy_s=sum(engine.busy_s for engine in engines),
        commands=controller.commands if controller else 0,
        rejected=controller.rejected if controller else 0,
        messages=link.sent,
        lost=link.lost,
    )


class _Router:
    """Where a request goes when there are several workers."""

    def __init__(self, engines: Sequence[Engine], setup: Setup) -> None:
        self._engines = engines
        self._route = setup.route
        self._random = random.Random(setup.seed)  # noqa: S311 — not for secrets
        self._turns: dict[str, int] = {}

    def send(self, life: Life, number: int) -> None:
        tenant, count = life.arrival.tenant, len(self._engines)
        turn = self._turns[tenant] = self._turns.get(tenant, -1) + 1
        if self._route == "least":
            engine = min(self._engines, key=lambda engine: engine.load)
        elif self._route == "round":
            engine = self._engines[turn % count]
        elif self._route == "random":
            engine = self._random.choice(self._engines)
        else:
            # The k-th tenant to come prefers worker k: weights 1, 1/2, 1/3, … from there on.
            place = list(self._turns).index(tenant)
            weights = [1 / (1 + (worker - place) % count) for worker in range(count)]
            (engine,) = self._random.choices(self._engines, weights)
        engine.submit(life, number)


class _Limit(Protocol):
    """What stands at the door."""

    def accepts(self, life: Life) -> bool:
        """Whether it may come in; the life says so if not."""


class _Bucket:
    """A token bucket per tenant, as proxies have: it fills by `per_minute` and holds what comes in `BURST_S`."""

    def __init__(self, per_minute: int) -> None:
        self._per_s = per_minute / 60
        self._most = max(1.0, self._per_s * BURST_S)
        self._levels: dict[str, tuple[float, float]] = {}
        """What was in it, and when."""

    def accepts(self, life: Life) -> bool:
        at_s, tenant = life.arrival.at_s, life.arrival.tenant
        level, since_s = self._levels.get(tenant, (self._most, at_s))
        level = min(self._most, level + (at_s - since_s) * self._per_s)
        life.refused = level < 1.0
        self._levels[tenant] = (level if life.refused else level - 1.0, at_s)
        return not life.refused


class _Rpm:
    """Requests per minute and tenant, as VTC's RPM baseline (VTC-artifact, lshare_req_queue.py)."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._accepted: dict[str, deque[float]] = {}

    def accepts(self, life: Life) -> bool:
        at_s = life.arrival.at_s
        recent = self._accepted.setdefault(life.arrival.tenant, deque())
        while recent and at_s - recent[0] > RPM_WINDOW_S:
            recent.popleft()
        if len(recent) >= self._most:
            life.refused = True
            return False
        recent.append(at_s)
        return True


def chosen(setup: Setup) -> tuple[MakePolicy | None, Kind, _Limit | None]:
    """What makes the policy (None: no controller), whose scheduler runs, and who stands at the door.

    Raises:
        PolicyError: no such policy, or a setting that it does not take.
    """
    name, settings = setup.policy, setup.settings
    limit: _Limit | None = None
    if name in STOCK:
        if settings:
            raise PolicyError(f"{name} takes no settings")
        return None, STOCK[name], None
    if name in ORACLES:
        name = "vtc"
    if name.startswith(RPM) and (number := name.removeprefix(RPM)).isdigit():
        name, limit = "fcfs", _Rpm(int(number))
    if name.startswith(BUCKET) and (number := name.removeprefix(BUCKET)).isdigit():
        name, limit = "fcfs", _Bucket(int(number))
    policies.load(name, settings)  # a mistake shows now, not at the first step
    return lambda: policies.load(name, settings), "steered", limit


def _told(arrivals: Sequence[Arrival], setup: Setup) -> dict[str, float]:
    """What an oracle says of each request's output, off by up to that part of itself (VTC's `pred_50`).

    The scheduler itself is told, as the authors' is: it charges a request's whole cost when it admits it.
    """
    off, draw = ORACLES[setup.policy], random.Random(setup.seed)  # noqa: S311 — not for secrets
    return {
        public_id(arrival, number): round(arrival.output_tokens * draw.uniform(1 - off, 1 + off))
        for number, arrival in enumerate(arrivals)
    }


def _check(arrivals: Sequence[Arrival], setup: Setup) -> None:
    if not arrivals:
        raise TraceError("there is no traffic")
    most = setup.device.preset.kv_tokens - 2 * 16
    for arrival in arrivals:
        needs = arrival.prompt_tokens + arrival.output_tokens
        if needs > most:
            raise TraceError(
                f"the request at {arrival.at_s:g} s needs KV of {needs} tokens, there is room for {most}"
            )


@contextmanager
def _without_gc() -> Iterator[None]:
    """vLLM's steps make many objects and hardly a cycle: looking for those would be a third of the time."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
