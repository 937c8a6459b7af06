"""What a step costs: our scheduler against vLLM's own, in one process, both sides alternating.

    python -m bench.scheduler [--json PATH] [--running 64,256] [--waiting 1000,10000] [--tenants 1,100] [--quick]

The real scheduler and KV manager without a device (`bench.rig`). Every case builds one scheduler per variant in
the same state, then times `schedule` + `update_from_output` of single decode steps, in turns, and reports the
ratio of our step to stock's: median over rounds with a bootstrap interval. Variants:

    fcfs, priority   stock vLLM
    quiet            ours, no bus
    on               ours, with events, accounting and 20 status frames a second handed over (and thrown away)

Single operations at a long queue (reprioritize, re-rank, abort) are timed on both sides too.
"""

import argparse
import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import msgspec

from bench.rig import Rig, vllm_config

STOCK = ("fcfs", "priority")
VARIANTS = (*STOCK, "quiet", "on")


@contextmanager
def _environment() -> Iterator[None]:
    saved = dict(os.environ)
    os.environ.pop("COX_NATS_URL", None)
    os.environ["COX_IDENTITY_KEY"] = "5e" * 32
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def build(variant: str, running: int, waiting: int, tenants: int) -> Rig:
    """A rig with `running` requests that decode and `waiting` that wait behind them."""
    from ulid import ULID
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from coxswain.service.request_id import make
    from coxswain.service.scheduler import SteeredScheduler

    stock = variant in STOCK
    config = vllm_config(
        max_num_seqs=running, max_num_batched_tokens=max(running * 16, 2_048), max_model_len=4_096,
        num_blocks=running * 40 + 16, policy=variant if stock else "fcfs",
    )  # fmt: skip
    rig = Rig(AsyncScheduler if stock else SteeredScheduler, config)
    if variant == "on":
        _switch_on(rig)
    key = bytes.fromhex("5e" * 32)
    for index in range(running + waiting):
        tenant = f"tenant-{index % tenants}"
        name = f"cmpl-{make(key, tenant, '', str(ULID()))}-0-{index:08x}"
        rig.add(name, prompt=16, tokens=1_000, seed=index, arrival_time=float(index))
    while sum(not request.is_prefill_chunk for request in rig.scheduler.running) < running:
        rig.step()
    rig.step()
    return rig


def _switch_on(rig: Rig) -> None:
    """Make the scheduler build events and frames for a bus that throws them away as they come."""
    scheduler = rig.scheduler
    scheduler.bus = _Nobody()
    scheduler.port.connected = True
    scheduler.port.attach_bus(scheduler.port.collect)


class _Nobody:
    """A bus that is there and does nothing; what it is sent is collected on the engine's thread."""

    def stop(self, **_: float) -> bool:
        return True


def step_s(rig: Rig) -> float:
    """Time of one step's `schedule` and `update_from_output`, the device's part left out."""
    scheduler = rig.scheduler
    began = time.perf_counter()
    output = scheduler.schedule()
    between = time.perf_counter()
    result = rig._run(output)
    again = time.perf_counter()
    scheduler.update_from_output(output, result)
    return between - began + time.perf_counter() - again


def interval(ratios: list[float], rounds: int = 1_000) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval."""
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(rounds))
    return statistics.median(ratios), medians[int(rounds * 0.025)], medians[int(rounds * 0.975)]


def steps(running: int, waiting: int, tenants: int, rounds: int) -> dict[str, Any]:
    """Step times of all variants in turns, and the ratios of ours to stock's priority scheduler."""
    rigs = {variant: build(variant, running, waiting, tenants) for variant in VARIANTS}
    gc.collect()
    gc.freeze()
    gc.disable()
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    order = list(VARIANTS)
    for index in range(rounds + 5):
        random.Random(index).shuffle(order)
        for variant in order:
            spent = step_s(rigs[variant])
            if index >= 5:
                times[variant].append(spent)
    gc.enable()
    gc.unfreeze()
    result: dict[str, Any] = {"running": running, "waiting": waiting, "tenants": tenants, "rounds": rounds}
    result["step_us"] = {variant: statistics.median(values) * 1e6 for variant, values in times.items()}
    for variant in ("quiet", "on"):
        for stock in STOCK:
            ratios = [ours / theirs for ours, theirs in zip(times[variant], times[stock], strict=True)]
            result[f"{variant}/{stock}"] = interval(ratios)
    for rig in rigs.values():
        rig.scheduler.shutdown()
    return result


def operations(running: int, waiting: int, tenants: int, repeats: int) -> dict[str, Any]:
    """Single changes at a long queue: ours and stock's own way to the same end, in µs (median)."""
    from vllm.v1.request import RequestStatus

    from coxswain.schemas.policy import TenantRank

    ours, stock = build("quiet", running, waiting, tenants), build("priority", running, waiting, tenants)
    core = ours.scheduler.core
    waiting_ours = [record for record in core.roster.records.values() if record in core.queue]
    source = random.Random(0)
    found: dict[str, Any] = {"running": running, "waiting": waiting, "tenants": tenants}

    def median_us(action: Callable[[int], None], count: int) -> float:
        spent = []
        for index in range(count):
            began = time.perf_counter()
            action(index)
            spent.append(time.perf_counter() - began)
        return statistics.median(spent) * 1e6

    def stock_reprioritize(index: int) -> None:
        request = source.choice(stock.scheduler.waiting._heap)
        stock.scheduler.waiting.remove_request(request)
        request.priority = index
        stock.scheduler.waiting.add_request(request)

    def stock_rerank(_: int) -> None:
        # A tenant's rank is part of every one of its requests' keys: all of them move.
        heap = stock.scheduler.waiting._heap
        mine = [request for position, request in enumerate(heap) if position % tenants == 0]
        stock.scheduler.waiting.remove_requests(mine)
        for request in mine:
            request.priority += 1
            stock.scheduler.waiting.add_request(request)

    def stock_abort(_: int) -> None:
        request = source.choice(stock.scheduler.waiting._heap)
        stock.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)

    def our_reprioritize(index: int) -> None:
        core.reprioritize(0.0, source.choice(waiting_ours), index, None, "bench")

    def our_rerank(index: int) -> None:
        core.rank("tenant-0", TenantRank(base=float(-index), weight=1.0))
        core.queue.peek()

    def our_abort(_: int) -> None:
        record = waiting_ours.pop()
        ours.scheduler.finish_requests(record.id, RequestStatus.FINISHED_ABORTED)

    for name, mine, theirs in (
        ("reprioritize", our_reprioritize, stock_reprioritize),
        ("rerank", our_rerank, stock_rerank),
        ("abort", our_abort, stock_abort),
    ):
        found[name] = {
            "ours_us": median_us(mine, repeats),
            "stock_us": median_us(theirs, max(3, repeats // 100)),
        }
    return found


def step_line(case: dict[str, Any]) -> str:
    """A case of `steps` as a line of the table."""
    sizes = " ".join(f"{case[name]:8}" for name in ("running", "waiting", "tenants"))
    times = " ".join(f"{case['step_us'][variant]:8.0f}" for variant in ("priority", "quiet", "on"))
    ratios = [case[f"{variant}/priority"] for variant in ("quiet", "on")]
    return f"{sizes} | {times}    | " + " ".join(
        f"{middle:.3f} [{low:.3f} {high:.3f}]" for middle, low, high in ratios
    )


def main() -> int:
    """Run the cases, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--running", default="64,256,1024")
    parser.add_argument("--waiting", default="1000,10000")
    parser.add_argument("--tenants", default="1,100")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument(
        "--queue", type=int, default=100_000, help="length of the queue for single operations"
    )
    parser.add_argument("--quick", action="store_true", help="one small case")
    chosen = parser.parse_args()
    numbers = {
        name: [int(part) for part in getattr(chosen, name).split(",")]
        for name in ("running", "waiting", "tenants")
    }
    if chosen.quick:
        numbers, chosen.rounds, chosen.queue = (
            {"running": [64], "waiting": [1_000], "tenants": [10]},
            60,
            5_000,
        )
    found: dict[str, Any] = {"steps": [], "operations": []}
    with _environment():
        print(
            f"{'running':>8} {'waiting':>8} {'tenants':>8} | {'stock':>8} {'quiet':>8} {'on':>8} µs |", end=""
        )
        print(" quiet/stock        on/stock")
        for running, waiting, tenants in product(*numbers.values()):
            case = steps(running, waiting, tenants, chosen.rounds)
            found["steps"].append(case)
            print(step_line(case), flush=True)
        case = operations(64, chosen.queue, 100, 500)
        found["operations"].append(case)
        for name in ("reprioritize", "rerank", "abort"):
            ours, stock = case[name]["ours_us"], case[name]["stock_us"]
            print(f"{name:>14} one of {chosen.queue}: ours {ours:.1f} µs, stock {stock:.1f} µs")
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
