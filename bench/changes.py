"""What single changes cost at a long queue, what a status frame costs, and what a waiting request weighs.

Used by `bench.scheduler`. Where stock vLLM has a way to the same end, its time stands beside ours.
"""

import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

from bench.sides import LONG, Side, no_collection

FEW = 5
"""Repetitions of what takes stock a tenth of a second."""


def median_s(
    action: Callable[[], object], repeats: int, before: Callable[[], object] = lambda: None
) -> float:
    """Median time of an action, `before` it left out."""
    spent = []
    for _ in range(repeats):
        before()
        began = time.thread_time()
        action()
        spent.append(time.thread_time() - began)
    return statistics.median(spent)


def single(waiting: int, tenants: int, repeats: int) -> dict[str, Any]:
    """Reprioritize one request, re-rank one tenant, abort one request: µs (median), ours and stock's own way."""
    from coxswain.schemas.policy import TenantRank

    ours, stock = Side("on", 64, waiting, tenants), Side("priority", 64, waiting, tenants)
    core, heap = ours.scheduler.core, stock.scheduler.waiting
    queued = [record for record in core.roster.records.values() if record in core.queue]
    source = random.Random(0)
    source.shuffle(queued)
    numbers = iter(range(10**9))

    def reprioritize() -> None:
        core.reprioritize(0.0, source.choice(queued), next(numbers) % 1_000, None, "bench")

    def rerank() -> None:
        core.rank("tenant-0", TenantRank(base=-float(next(numbers)), weight=1.0))
        core.queue.peek()

    def abort() -> None:
        ours.scheduler.finish_requests(queued.pop().id, _aborted())

    def stock_reprioritize() -> None:
        request = source.choice(heap._heap)
        heap.remove_request(request)
        request.priority = next(numbers) % 1_000
        heap.add_request(request)

    def stock_rerank() -> None:
        # A tenant's rank is part of the keys of all its requests: all of them move.
        mine = [request for place, request in enumerate(heap._heap) if place % tenants == 0]
        heap.remove_requests(mine)
        for request in mine:
            request.priority += 1
            heap.add_request(request)

    def stock_abort() -> None:
        request = source.choice(heap._heap)
        stock.scheduler.finish_requests(request.request_id, _aborted())

    found: dict[str, Any] = {"waiting": waiting, "tenants": tenants}
    with no_collection():
        for name, mine, theirs in (
            ("reprioritize", reprioritize, stock_reprioritize),
            ("rerank", rerank, stock_rerank),
            ("abort", abort, stock_abort),
        ):
            found[name] = {
                "ours_us": median_s(mine, repeats) * 1e6, "stock_us": median_s(theirs, min(repeats, FEW)) * 1e6,
            }  # fmt: skip
    ours.close()
    stock.close()
    return found


def command(waiting: int, ids: int, repeats: int) -> dict[str, Any]:
    """One command that names `ids` waiting requests, applied: ms (median)."""
    from ulid import ULID

    from coxswain.schemas.commands import Abort, Continue, Preempt, Prioritize, Targets
    from coxswain.schemas.subjects import OPERATOR

    side = Side("on", 64, waiting, 100)
    core, commands = side.scheduler.core, side.scheduler.commands
    queued = [record.request for record in core.roster.records.values() if record in core.queue]
    random.Random(0).shuffle(queued)
    found: dict[str, Any] = {"waiting": waiting, "ids": ids}
    spent: dict[str, list[float]] = {}
    with no_collection():
        for index in range(repeats):
            targets = Targets(requests=tuple(queued[index * ids : (index + 1) * ids]))
            for verb, asked in (
                ("prioritize", Prioritize(id=str(ULID()), targets=targets, priority=index + 1)),
                ("preempt", Preempt(id=str(ULID()), targets=targets)),
                ("continue", Continue(id=str(ULID()), targets=targets)),
                ("abort", Abort(id=str(ULID()), targets=targets)),
            ):
                began = time.thread_time()
                reply = commands.apply(side.scheduler.now(), OPERATOR, verb, asked)
                spent.setdefault(verb, []).append(time.thread_time() - began)
                assert reply.counts == {"applied": ids}, reply
                side.scheduler.port.collect()
    side.close()
    return found | {f"{verb}_ms": statistics.median(times) * 1e3 for verb, times in spent.items()}


def cut_in(running: int, waiting: int, spare: int) -> dict[str, Any]:
    """What is decided before a step while a full engine runs: µs (median), with a victim to find and with none."""
    from coxswain.schemas.policy import ClassPolicy, TenantPolicy

    side = Side("quiet", running, waiting, 100, spare=spare)
    core = side.scheduler.core
    core.configure(
        {"urgent": ClassPolicy(position=-1, cut_in="slots")}, {"vip": TenantPolicy(class_="urgent")}
    )

    def plan() -> None:
        core.room.plan(side.scheduler.now())

    def urgent() -> None:
        side.step()
        side.scheduler.add_request(side.request(LONG, "vip"))

    found: dict[str, Any] = {"running": running, "waiting": waiting}
    with no_collection():
        found["nothing_us"] = median_s(plan, spare, side.step) * 1e6
        found["victim_us"] = median_s(plan, spare, urgent) * 1e6
    assert len(core.roster.kept) == spare
    side.close()
    return found


def capped(running: int, waiting: int, rounds: int) -> dict[str, Any]:
    """What `waiting` requests of tenants at their cap cost a step that could admit: µs (median of the difference)."""
    from coxswain.schemas.policy import TenantPolicy

    blocked, free = Side("quiet", running, waiting, running // 2), Side("quiet", running, 0, running // 2)
    policies = {name: TenantPolicy(max_running=1) for name in blocked.scheduler.core.tenants.accounts}
    for side in (blocked, free):
        side.scheduler.core.configure({}, policies)
        # Two of each run. A few end, so that there is room in every step that nobody may take.
        for request in side.scheduler.running[:4]:
            side.scheduler.finish_requests(request.request_id, _aborted())
        side.step()
    assert blocked.scheduler.core.queue.blocked == waiting
    with no_collection():
        differences = [blocked.step().whole - free.step().whole for _ in range(rounds)]
    for side in (blocked, free):
        side.close()
    return {"running": running, "waiting": waiting, "more_us": statistics.median(differences) * 1e6}


def _aborted() -> Any:
    from vllm.v1.request import RequestStatus

    return RequestStatus.FINISHED_ABORTED


def frame(running: int, waiting: int, tenants: int, repeats: int) -> dict[str, Any]:
    """A status frame after a step that changed every running request: ms (median), told and sent, and on the bus."""
    from coxswain.schemas.commands import encode
    from coxswain.service.bus.board import Board
    from coxswain.service.port import FrameOut

    side = Side("on", running, waiting, tenants)
    scheduler = side.scheduler
    found: dict[str, Any] = {"running": running, "waiting": waiting, "tenants": tenants}

    def tell() -> None:
        drafts.append(scheduler._draft(scheduler.now()))
        scheduler.port.put(FrameOut(drafts[-1], False))
        scheduler.port.flush()

    def hear() -> None:
        tell()
        board.take(drafts[-1])

    drafts: list[Any] = []
    board = Board(0.0)
    scheduler.port.connected = False  # no frames but ours
    scheduler.reporter.anew()
    while not board.complete:
        hear()
    board.full()
    with no_collection():
        times = [median_s(tell, 1, side.step) * 1e3 for _ in range(repeats)]
        found["engine_ms"], found["engine_longest_ms"] = statistics.median(times), max(times)
        for draft in drafts[-repeats:]:
            board.take(draft)
        found["bus_ms"] = median_s(lambda: (hear(), encode(board.delta())), repeats, side.step) * 1e3
        found["bus_full_ms"] = (
            median_s(lambda: encode(board.full()), repeats, lambda: (side.step(), hear())) * 1e3
        )
        scheduler.reporter.anew()
        found["anew_longest_ms"] = max(median_s(tell, 1, side.step) * 1e3 for _ in range(8))
        for draft in drafts[-8:]:
            board.take(draft)
    found["bytes"] = len(encode(board.full()))
    side.close()
    return found


def memory(waiting: int) -> dict[str, Any]:
    """Bytes that a waiting request takes in the scheduler beside vLLM's own `Request` (tracemalloc)."""
    found: dict[str, Any] = {"waiting": waiting}
    for name in ("priority", "quiet", "on"):
        side = Side(name, 8, 0, 100)
        requests = [side.request() for _ in range(waiting)]
        for request in requests:
            if hasattr(request, "steering"):  # made with the request: to be made once more, and counted
                del request.steering
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for request in requests:
            side.scheduler.add_request(request)
            if name == "on":
                side.scheduler.port.collect()
        found[f"{name}_bytes"] = (tracemalloc.get_traced_memory()[0] - before) / waiting
        tracemalloc.stop()
        side.close()
    return found
