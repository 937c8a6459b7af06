"""The control loop: status frames in, commands out, for fleets of made-up workers.

    python -m bench.controller [--json PATH] [--policy vtc] [--steps 150] [--grid | --workers 100 --tenants 1000 ...]

One step is what a controller does every 50 ms: decode the frames that came, `ControlCore.step`, encode the
commands. Between steps, and not measured, each worker obeys, serves all its active tenants a little, lets one
leave and another come, and writes its next frame: a delta 19 times of 20, then a full one. No NATS is here: what
the event loop adds per message is measured by `bench.controller --live`.
"""

import argparse
import gc
import itertools
import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

from coxswain.control.core import Answer, ControlCore, Inputs, Send
from coxswain.control.policy import load
from coxswain.schemas.commands import Configure, Rank, decode, encode
from coxswain.schemas.policy import Lead, TenantPolicy, digest
from coxswain.schemas.status import (
    CommandStats,
    Frame,
    Gone,
    KvBlocks,
    Leader,
    RequestStatus,
    Slots,
    TenantStatus,
    decode_frame,
    decode_glance,
)

CADENCE_S = 0.05
FULL_EVERY = 20
START = 1_700_000_000.0


class Tenant:
    """One tenant on one made-up worker."""

    __slots__ = ("base", "charged", "input_tokens", "lift", "output_tokens", "queued", "running")

    def __init__(self) -> None:
        self.base = self.charged = self.lift = 0.0
        self.queued = self.running = self.input_tokens = self.output_tokens = 0


class Worker:
    """A worker that serves `active` of its tenants at a time, with `running` requests and `waiting` listed."""

    def __init__(self, number: int, tenants: list[str], active: int, running: int, waiting: int) -> None:
        self.name, self.incarnation = f"w{number:03}", f"01{number:03}"
        self.tenants = {name: Tenant() for name in tenants}
        turned = [
            tenants[(number * 37 + place) % len(tenants)] for place in range(len(tenants))
        ]  # their own order
        self.newcomers = itertools.cycle(turned)
        self.active: dict[str, None] = {}
        self.seen: dict[str, None] = {}
        self.weights = TenantPolicy().weight
        self.config, self.epoch = digest({}, {}), None
        self.seq, self.running, self.waiting = number % FULL_EVERY, running, waiting
        self.numbers = itertools.count()
        self.requests = [self._request(place, "running") for place in range(running)]
        while len(self.active) < min(active, len(tenants)):
            self._join(next(self.newcomers))

    def _join(self, name: str) -> None:
        floor = min((self._virtual(each) for each in self.active), default=0.0)
        tenant = self.tenants[name]
        tenant.lift += max(0.0, floor - self._virtual(name))
        tenant.queued = 3
        self.active[name] = self.seen[name] = None

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

    def frame(self, now: float) -> bytes:
        """Serve a little, then say so."""
        self.seq += 1
        full = self.seq % FULL_EVERY == 0
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
        changed = self.seen if full else {**self.active, leaver: None}
        return encode(
            Frame(
                worker=self.name, incarnation=self.incarnation, seq=self.seq, full=full, part=0, parts=1,
                sent_at=now, step=self.seq, model="m", vllm_version="0", state="serving",
                slots=Slots(active=self.running, total=self.running, running=self.running, held=0),
                kv_blocks=KvBlocks(total=10_000, used=9_000, held=0), step_s=0.03,
                queued=3 * len(self.active), running=self.running, held=0, preempted_total=0,
                recomputed_tokens_total=0, commands=CommandStats(), leader=Leader(epoch=self.epoch),
                config=self.config, events_dropped_total=0,
                tenants=tuple(self._row(name) for name in changed), requests=self._requests(), gone=self._gone,
            )
        )  # fmt: skip

    def _requests(self) -> tuple[RequestStatus, ...]:
        """All that run have a token more, one of them is new, and all that wait have moved up."""
        old = self.requests.pop(0) if self.requests else None
        self._gone = (Gone(request=old.request, child=0),) if old else ()
        self.requests = [
            RequestStatus(**{**_fields(each), "output_tokens": each.output_tokens + 1})
            for each in self.requests
        ]
        if self.running:
            self.requests.append(self._request(self.seq, "running"))
        return (*self.requests, *(self._request(place, "queued") for place in range(self.waiting)))

    def _row(self, name: str) -> TenantStatus:
        tenant = self.tenants[name]
        return TenantStatus(
            tenant=name, class_="default", queued=tenant.queued, running=0, held=0, oldest_queued_s=0.1,
            virtual_time=self._virtual(name), base=tenant.base, charged=tenant.charged, lift=tenant.lift,
            weight=self.weights, uncached_input_tokens_total=tenant.input_tokens, cached_input_tokens_total=0,
            output_tokens_total=tenant.output_tokens, recomputed_tokens_total=0, finished_total=0,
        )  # fmt: skip

    def obey(self, command: Any) -> None:
        """Apply a rank or tables; anything else changes nothing that the loop looks at."""
        if isinstance(command, Rank):
            for name, rank in command.tenants.items():
                self.tenants[name].base = rank.base
        elif isinstance(command, Configure):
            self.config = digest(command.classes, command.tenants)


def _fields(row: RequestStatus) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__struct_fields__}


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
        pipe.send([worker.frame(now) for worker in fleet.values()])


def run(
    *, workers: int, tenants: int, active: int, running: int, waiting: int, steps: int, policy: str
) -> dict[str, Any]:
    """One fleet for `steps` steps, after a second to settle: times in ms, bytes and rows per second."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    child = context.Process(target=herd, args=(theirs, workers, tenants, active, running, waiting))
    child.start()
    ids: Iterator[int] = itertools.count()
    chosen = load(policy)
    core = ControlCore(chosen, "bench", lambda: f"id{next(ids)}", cadence_s=CADENCE_S)
    read = decode_glance if chosen.sees == "tenants" else decode_frame
    answers: list[Answer] = []
    spent: dict[str, list[float]] = {"decode": [], "step": [], "encode": [], "loop": [], "cpu": []}
    sums = dict.fromkeys(("bytes_in", "bytes_out", "commands", "rank_rows"), 0)
    now, obeyed = START, []
    gc.collect()
    gc.freeze()
    for number in range(-2 * FULL_EVERY, steps):
        now += CADENCE_S
        pipe.send((now, obeyed))
        payloads = pipe.recv()
        began, cpu = time.perf_counter(), time.process_time()
        frames = [read(payload) for payload in payloads]
        decoded = time.perf_counter()
        outgoing = core.step(
            now, Inputs(frames=frames, classes={}, tenants=TENANTS, epoch=(1.0, 1), answers=answers)
        )
        stepped = time.perf_counter()
        sent = [encode(each.command if isinstance(each, Send) else each.lead) for each in outgoing]
        ended, cpu = time.perf_counter(), time.process_time() - cpu
        answers = [Answer(each.worker, each.verb, ok=True) for each in outgoing if isinstance(each, Send)]
        obeyed = [
            (each.worker, each.verb, payload) if isinstance(each, Send) else ("", "lead", payload)
            for each, payload in zip(outgoing, sent, strict=True)
        ]
        if number < 0:
            continue
        for part, seconds in zip(
            spent, (decoded - began, stepped - decoded, ended - stepped, ended - began, cpu), strict=True
        ):
            spent[part].append(seconds * 1_000)
        sums["bytes_in"] += sum(map(len, payloads))
        sums["bytes_out"] += sum(map(len, sent))
        sums["commands"] += len(answers)
        sums["rank_rows"] += sum(
            len(each.command.tenants)
            for each in outgoing
            if isinstance(each, Send) and isinstance(each.command, Rank)
        )
    core.validate()
    pipe.send(None)
    child.join()
    seconds = steps * CADENCE_S
    return {
        "workers": workers, "tenants": tenants, "active": active, "running": running, "waiting": waiting,
        "policy": policy, "steps": steps,
        **{f"{part}_ms": summary(times) for part, times in spent.items()},
        **{f"{what}_per_s": round(total / seconds) for what, total in sums.items()},
        "cpu_share": round(sum(spent["cpu"]) / 1_000 / seconds, 3),
        "max_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1_024,
    }  # fmt: skip


TENANTS: dict[str, TenantPolicy] = {}


def summary(times: list[float]) -> dict[str, float]:
    """Median, 99th percentile and most, in ms."""
    ordered = sorted(times)
    return {
        "p50": round(statistics.median(ordered), 2),
        "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 2),
        "max": round(ordered[-1], 2),
    }


GRID = (
    *({"workers": workers} for workers in (1, 10, 30, 100, 300)),
    *({"tenants": tenants} for tenants in (50, 300, 3_000, 10_000)),
    *({"active": active} for active in (10, 200, 1_000)),
    *({"running": running} for running in (0, 256)),
)
"""What changes from the standard fleet, one thing at a time."""


def line(result: dict[str, Any]) -> str:
    """One result for people."""
    loop, p50 = (
        result["loop_ms"],
        {part: result[f"{part}_ms"]["p50"] for part in ("decode", "step", "encode", "cpu")},
    )
    return (
        f"{result['workers']:4} workers {result['tenants']:6} tenants {result['active']:5} active "
        f"{result['running']:4} running: loop p50 {loop['p50']:7.2f} p99 {loop['p99']:7.2f} ms "
        f"(decode {p50['decode']:.2f}, step {p50['step']:.2f}, encode {p50['encode']:.2f}; CPU {p50['cpu']:.2f}), "
        f"in {result['bytes_in_per_s'] / 1e6:.1f} MB/s, out {result['bytes_out_per_s'] / 1e6:.1f} MB/s, "
        f"{result['commands_per_s']} commands/s, {result['rank_rows_per_s']} rows/s"
    )


def main() -> None:
    """Run one fleet, or the grid."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--policy", default="vtc")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--grid", action="store_true")
    standard = {"workers": 100, "tenants": 1_000, "active": 50, "running": 64, "waiting": 64}
    for name, value in standard.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    fixed = {name: getattr(options, name) for name in standard}
    results = []
    for change in GRID if options.grid else ({},):
        result = run(**{**fixed, **change}, steps=options.steps, policy=options.policy)
        results.append(result)
        print(line(result), flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({"python": platform.python_version(), "results": results}, indent=2)
        )


if __name__ == "__main__":
    main()
