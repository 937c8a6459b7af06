"""Stock vLLM and ours side by side: schedulers in the same state, stepped in turns, and what a ratio is worth.

The real scheduler and KV manager without a device (`bench.rig`); used by `bench.scheduler` and `bench.changes`.
Times are CPU times of the thread: what others do on the machine stays out, as far as caches allow.
"""

import gc
import importlib
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count, islice
from types import MethodType
from typing import Any, NamedTuple

from bench.rig import Rig, vllm_config
from coxswain.common.logs import get_logger
from coxswain.service.bus.process import BUFFER

STOCK = ("fcfs", "priority")
OURS = ("quiet", "on", "bare")
SIDES = (*STOCK, *OURS)
"""In the order in which they are made; they run in any. Nobody is judged by `fcfs`, which comes first: of sides that
do the very same the first made took 5 to 10 % less time, where 1,024 come and go; the others did not differ."""
KEY = "5e" * 32
LIFE = 256
"""Output tokens of a request where requests come and go: a short answer."""
LONG = 1_000
"""Output tokens of a request that outlives the measurement."""


@contextmanager
def environment() -> Iterator[None]:
    """No NATS, and a key for the ids."""
    saved = dict(os.environ)
    os.environ.pop("COX_NATS_URL", None)
    os.environ["COX_IDENTITY_KEY"] = KEY
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector out: it would stop in whatever side happens to run."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@cache
def stock_scheduler() -> type:
    """vLLM's own scheduler, from a second copy of its modules.

    CPython (3.11 on) adapts a function's code to the types that it meets. Two kinds of scheduler that run the same
    functions would undo that for each other all the time, which never happens in an engine: it has one.
    """
    names = ("vllm.v1.core.sched.scheduler", "vllm.v1.core.sched.async_scheduler")
    package = importlib.import_module("vllm.v1.core.sched")
    ours = {name: importlib.import_module(name) for name in names}
    for name in names:
        del sys.modules[name]
    try:
        scheduler: type = importlib.import_module(names[1]).AsyncScheduler
    finally:
        for name, module in ours.items():
            sys.modules[name] = module
            setattr(package, name.rpartition(".")[2], module)
    return scheduler


class Side:
    """One scheduler with `running` requests that decode and `waiting` behind them, of `tenants` in turn.

    Args:
        name: `fcfs` or `priority`: stock vLLM; `quiet`: ours without a bus; `on`: ours with accounting, events
            and frames, encoded and sent to a process that throws them away; `bare`: `quiet`, with all of vLLM's own
            `allocate_slots`, which says what steering costs without what `compat.allocation` saves.
        churn: requests have `LIFE` tokens, the first ones end at random; otherwise none ends.
        caching: with a prefix cache, of blocks of 16 tokens: vLLM's defaults; otherwise blocks of 32 and none.
        spare: slots beyond those that may run, for holds.
    """

    def __init__(
        self, name: str, running: int, waiting: int, tenants: int, *, churn: bool = False, caching: bool = False,
        spare: int = 0,
    ) -> None:  # fmt: skip
        from coxswain.service.scheduler import SteeredScheduler

        stock = name in STOCK
        config = vllm_config(
            max_num_seqs=running + spare, max_num_active_seqs=running,
            max_num_batched_tokens=max(running * 16, 2_048), max_model_len=4_096,
            num_blocks=running * (80 if caching else 40) + 16, block_size=16 if caching else 32,
            prefix_caching=caching, policy=name if stock else "fcfs",
        )  # fmt: skip
        self.name = name
        self.rig = Rig(stock_scheduler() if stock else SteeredScheduler, config)
        self.scheduler = self.rig.scheduler
        if name == "bare":
            manager = self.scheduler.kv_cache_manager
            manager.allocate_slots = MethodType(type(manager).allocate_slots, manager)
        self._tenants = tenants
        self._numbers = count()
        self._left_at = time.monotonic()
        self._churn = churn
        lengths = random.Random(0)
        if name == "on":
            self._switch_on()
        # First those that run, so that all sides run the same ones.
        self._fill([lengths.randint(1, LIFE) if churn else LONG for _ in range(running)])
        while self.scheduler.waiting:
            self.step()
        self._fill([LIFE if churn else LONG] * waiting)
        if not stock:
            self._spread()

    def _fill(self, lengths: list[int]) -> None:
        """Add requests that lie in memory in no order, as they do after a day.

        What was made one after the other is read faster one after the other: else the order in which a side runs
        them decided which is faster, by 4 % at 1,024 running, and arrival's order, which is stock's, were the best.
        """
        requests = [(next(self._numbers), tokens) for tokens in lengths]
        random.Random(2).shuffle(requests)
        made = sorted((number, self._make(number, tokens)) for number, tokens in requests)
        for _, request in made:
            self.scheduler.add_request(request)

    def _switch_on(self) -> None:
        self.scheduler.core.emit = self.scheduler.journal.write
        self.scheduler.port.connected = True
        self.scheduler.bus = _Sink(self.scheduler)

    def _spread(self) -> None:
        """Let virtual times stand apart, as they do after a while: here all began in the same moment."""
        from coxswain.schemas.policy import TenantRank

        source = random.Random(1)
        self.scheduler.core.ledger.settle_all()
        for name in self.scheduler.core.tenants.accounts:
            self.scheduler.core.rank(name, TenantRank(base=source.uniform(0, LONG), weight=1.0))

    def request(self, tokens: int = LIFE, tenant: str = "") -> Any:
        """A request of `tenant`, or the next one, for `scheduler.add_request`."""
        return self._make(next(self._numbers), tokens, tenant)

    def _make(self, number: int, tokens: int, tenant: str = "") -> Any:
        from ulid import ULID

        from coxswain.service.request_id import make

        public = make(bytes.fromhex(KEY), tenant or f"tenant-{number % self._tenants}", "", str(ULID()))
        return self.rig.request(
            f"cmpl-{public}-0-{number:08x}", prompt=16, tokens=tokens, seed=number, arrival_time=float(number)
        )

    def step(self, arrivals: int = 0) -> "Spent":
        """A step, and `arrivals` before it; the device's part is left out, and what vLLM does on its input thread."""
        scheduler = self.scheduler
        requests = [self.request() for _ in range(arrivals)]
        self._own_time()
        began = time.thread_time()
        for request in requests:
            scheduler.add_request(request)
        added = time.thread_time()
        output = scheduler.schedule()
        scheduled = time.thread_time()
        result = self.rig._run(output)
        again = time.thread_time()
        scheduler.update_from_output(output, result)
        alone = scheduled - added + time.thread_time() - again
        self._left_at = time.monotonic()
        return Spent(added - began + alone, alone)

    def _own_time(self) -> None:
        """Leave the other sides' turns out of this side's clock: frames are due by it."""
        if self.name in OURS:
            self.scheduler._clock_offset -= time.monotonic() - self._left_at

    def close(self) -> None:
        """End the scheduler."""
        self.scheduler.shutdown()


class Spent(NamedTuple):
    """Seconds that the scheduler took."""

    whole: float
    """`add_request` of what arrived, `schedule` and `update_from_output`."""
    alone: float
    """The last two: the step as such."""


class _Sink:
    """The engine's end of the bus, as it is, and behind the socket a process that throws away what it reads.

    Args:
        scheduler: ours.
    """

    def __init__(self, scheduler: Any) -> None:
        from coxswain.service.bus import wire
        from coxswain.service.bus.outbox import Outbox

        self._scheduler = scheduler
        self._ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(["cat"], stdin=theirs, stdout=subprocess.DEVNULL)
        self._ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        self._ours.setblocking(False)
        self.outbox = Outbox(scheduler.port, get_logger())
        begin = wire.Begin(scheduler.settings, scheduler.incarnation, {}, 0, {}, scheduler.port.unix_offset)
        self.outbox.open(self._ours, begin)
        scheduler.port.attach_bus(self._send)

    def _send(self) -> None:
        outbox = self.outbox
        while not outbox.send():  # as the bus's thread does, when the socket has room again
            outbox.go_on()
        outbox.settled(self._scheduler.journal.written)

    def stop(self, **_: float) -> bool:
        self._ours.close()
        self._process.wait()
        return True


def interval(ratios: list[float], rounds: int = 1_000) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval."""
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(rounds))
    return statistics.median(ratios), medians[int(rounds * 0.025)], medians[int(rounds * 0.975)]


TURN = 4
"""Steps in a row of one side, after one that only warms the caches: an engine does not share them with three others."""


def steps(
    running: int, waiting: int, tenants: int, rounds: int, *, churn: bool = False, caching: bool = False
) -> dict[str, Any]:
    """Step times of all sides, `TURN` steps at a time in turns (µs, median), and our steps' ratios to stock's.

    `x/y` is the median of the rounds' ratios with its 95 % interval; `x/y mean` is the ratio of all time spent, which
    also counts what happens in few steps only: frames. Where requests come, these count their `add_request`, and
    `x/y alone` does not.
    """
    sides = [Side(name, running, waiting, tenants, churn=churn, caching=caching) for name in SIDES]
    # As many come as end, so that the queue stays as long as it is: fewer than one a step where few run.
    coming = (int((step + 1) * running / LIFE) - int(step * running / LIFE) for step in count())
    whole: dict[str, list[float]] = {name: [] for name in SIDES}
    alone: dict[str, list[float]] = {name: [] for name in SIDES}
    with no_collection():
        for index in range(-2, rounds):
            random.Random(index).shuffle(sides)
            first, *others = islice(coming, TURN + 1) if churn else (0,) * (TURN + 1)
            for side in sides:
                side.step(first)
                turn = [side.step(arrivals) for arrivals in others]
                if index >= 0:
                    whole[side.name].append(sum(spent.whole for spent in turn) / TURN)
                    alone[side.name].append(sum(spent.alone for spent in turn) / TURN)
    for side in sides:
        side.close()
    found: dict[str, Any] = {"running": running, "waiting": waiting, "tenants": tenants, "rounds": rounds}
    found["step_us"] = _medians_us(whole)
    if churn:
        found["alone_us"] = _medians_us(alone)
    for ours in OURS:
        for stock in STOCK:
            found[f"{ours}/{stock}"] = interval(_ratios(whole[ours], whole[stock]))
            found[f"{ours}/{stock} mean"] = sum(whole[ours]) / sum(whole[stock])
            if churn:
                found[f"{ours}/{stock} alone"] = interval(_ratios(alone[ours], alone[stock]))
    return found


def _medians_us(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def _ratios(ours: list[float], stock: list[float]) -> list[float]:
    return [mine / theirs for mine, theirs in zip(ours, stock, strict=True)]
