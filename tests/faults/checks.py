"""What must hold after every fault, with all clients at rest. Each check returns what is wrong, in words."""

import asyncio
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path
from typing import Final, NamedTuple

import psutil

from coxswain.schemas import events as ev
from coxswain.schemas.status import Frame
from coxswain.schemas.subjects import ENGINE
from tests.faults.fleet import Fleet
from tests.faults.load import STORM, TENANTS, Asked
from tests.faults.watch import Log

MORE_BYTES: Final = 64 << 20
"""By how much a process may be larger after a fault than before: allocators keep some."""
NATS_MORE_BYTES: Final = 192 << 20
"""The same of NATS: Go gives memory back to the system minutes later."""
MORE_FILES: Final = 16
FEW: Final = 16
"""Commands that may be on their way to a worker at rest: controllers do not rest."""
LATE_S: Final = 2.0
"""A hold may end so long after its lease: it ends with the next step, on a machine that has other things to do. This
finds holds that go on; that one ends with the first step after its lease is what tests/unit/test_holds.py holds."""
FAULTS_OF_OURS: Final = re.compile(
    r"Traceback|bus\.died|bus\.pump_failed|nats\.handler_failed|command\.check_failed|events\.failed|internal error"
)


class Level(NamedTuple):
    """What the fleet takes and says at rest."""

    frames: dict[str, Frame]
    sizes: dict[str, tuple[int, int]]
    """Per process: resident bytes and open files."""


async def at_rest(fleet: Fleet) -> Level:
    """The level now, once every worker has answered."""
    frames = await fleet.cox.statuses(wait_s=2.0)
    while set(frames) != set(fleet.workers):
        await asyncio.sleep(0.1)
        frames = await fleet.cox.statuses(wait_s=2.0)
    sizes = {}
    for name, process in fleet.processes().items():
        try:
            sizes[name] = (process.memory_info().rss, process.num_fds())
        except psutil.NoSuchProcess:
            continue
    return Level(frames, sizes)


def ended(asked: list[Asked], kills: frozenset[str], *, drains: bool = False) -> Iterator[str]:
    """Every request ended well, or its client was told, and that only where its worker was killed.

    `drains`: it was told to end. What comes then vLLM answers with nothing, unless the HTTP edge has heard of it.
    """
    for one in asked:
        if one.verdict == "empty" and drains and one.worker in kills:
            continue
        if one.verdict == "failed" and one.worker not in kills:
            yield f"{one.worker}: a request of {one.tenant} failed though its worker lived: {one.error}"
        elif one.verdict not in {"ok", "left", "failed"}:
            yield f"{one.worker}: a request of {one.tenant} got {one.verdict}"


def empty(frames: Mapping[str, Frame]) -> Iterator[str]:
    """No queue, hold, block or command is left on any worker."""
    for name, frame in frames.items():
        left = {
            "queued": frame.queued, "running": frame.running, "held": frame.held, "requests": len(frame.requests),
            "KV blocks": frame.kv_blocks.used, "commands": max(0, frame.commands.queue_depth - FEW),
        }  # fmt: skip
        yield from (f"{name}: {count} {what} left at rest" for what, count in left.items() if count)


def once(asked: list[Asked], log: Log, lives: Mapping[str, int], *, complete: bool) -> Iterator[str]:
    """The log has no request ended twice; and, if no event was lost, each that was accepted ended once."""
    for request, finished in log.finished.items():
        if len(finished) > 1:
            yield f"{request}: {len(finished)} `finished` events"
    for incarnation, seqs in log.seqs.items():
        if len(set(seqs)) != len(seqs):
            yield f"{incarnation}: events stored twice"
    if complete:
        names = {one.stream.request for one in asked if one.stream.request and one.life == lives[one.worker]}
        if missing := names - log.finished.keys():
            yield f"{len(missing)} of {len(names)} accepted requests have no `finished` event: {min(missing)}"


def leases(log: Log, slack_s: float) -> Iterator[str]:
    """By the log, no hold of an operator or controller went on after its lease."""
    due: dict[tuple[str, int | None], float] = {}
    last = 0
    for event in sorted(log.events, key=lambda event: (event.incarnation, event.seq)):
        if event.seq != last + 1:  # an end may be among what is missing
            due.clear()
        last = event.seq
        key = (event.request or "", event.child)
        if isinstance(event, ev.Held):
            # It goes on when the last of all holds ends; the engine's own, which makes room with it, has no lease.
            lease_s = event.lease_s if event.by != ENGINE else None
            due[key] = max(due.get(key, 0.0), inf if lease_s is None else event.at + lease_s)
        elif isinstance(event, ev.Continued | ev.Finished) and key in due:
            over_s = event.at - due.pop(key)
            if over_s > slack_s:
                yield f"{event.request}: held for {over_s:.2f} s after its lease"


def totals(
    asked: list[Asked],
    before: Mapping[str, Frame],
    after: Mapping[str, Frame],
    log: Log,
    lives: Mapping[str, int],
    *,
    complete: bool,
) -> Iterator[str]:
    """What status says that tenants were served is what their clients have."""
    for name, frame in after.items():
        old = before[name] if before[name].incarnation == frame.incarnation else None
        was = {row.tenant: row for row in old.tenants} if old else {}
        mine = [one for one in asked if one.worker == name and one.life == lives[name] and one.stream.request]
        for row in frame.tenants:
            base = was.get(row.tenant)
            tokens = row.output_tokens_total - (base.output_tokens_total if base else 0)
            count = row.finished_total - (base.finished_total if base else 0)
            if row.tenant in TENANTS:
                of = [one for one in mine if one.tenant == row.tenant]
                heard = (sum(len(one.stream.tokens) for one in of), len(of))
            elif row.tenant == STORM and complete:
                gone = [
                    event
                    for events in log.finished.values()
                    for event in events
                    if event.tenant == STORM and event.incarnation == frame.incarnation
                ]
                heard = (sum(event.output_tokens for event in gone), len(gone))
                if heard[0] < sum(len(one.stream.tokens) for one in mine if one.tenant == STORM):
                    yield f"{name}: clients that left have more tokens than the log says"
            else:
                continue
            if heard != (tokens, count):
                yield f"{name}: {row.tenant} has {heard} (tokens, requests), status says {(tokens, count)}"


def grown(before: Level, after: Level) -> Iterator[str]:
    """Memory and open files of every process are back at their level."""
    for name, (bytes_, files) in after.sizes.items():
        was = before.sizes.get(name)
        if was is None:
            continue
        if bytes_ - was[0] > (NATS_MORE_BYTES if name.startswith("nats") else MORE_BYTES):
            yield f"{name}: {was[0] >> 20} MiB before, {bytes_ >> 20} MiB after"
        if files - was[1] > MORE_FILES:
            yield f"{name}: {was[1]} open files before, {files} after"


class Logs:
    """What processes wrote since it was last looked at."""

    def __init__(self, paths: list[Path]) -> None:
        self._read = dict.fromkeys(paths, 0)

    def faults(self, kills: frozenset[str]) -> Iterator[str]:
        """Lines that no process of ours may ever write; vLLM's server says where its engine died if it was killed."""
        for path, read in self._read.items():
            with path.open("rb") as file:
                file.seek(read)
                text = file.read().decode(errors="replace")
                self._read[path] = file.tell()
            found = Counter(found.group() for found in FAULTS_OF_OURS.finditer(text))
            if path.stem in kills:
                del found["Traceback"]
            yield from (f"{path.name}: {count} × {what}" for what, count in found.items())
