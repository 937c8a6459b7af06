"""The page's cost to the controller that serves it: how late its steps begin, watched and not.

    python -m bench.page [--json PATH] [--seconds 10] [--workers 8 --tenants 50 --requests 24 --watchers 32]

A loop that wakes every 50 ms, as a controller's does, and hands the page a frame of every worker, a full one each
second. Unwatched and watched by turns, in one process. No NATS, no HTTP and no policy: what is measured is the
picture's thread in the loop's way. Late is late by the loop's clock, in ms.
"""

import argparse
import asyncio
import json
import platform
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from coxswain.control.web.board import Standing
from coxswain.control.web.page import Page
from coxswain.schemas.status import Frame
from tests.support.frames import frame, request, row

CADENCE_S = 0.05
FULL_EVERY = 20
SEQ = 1_000_000
"""A number of as many digits as those put in its place."""


def payloads(workers: int, tenants: int, requests: int, *, full: bool) -> list[tuple[str, bytes]]:
    """One frame of every worker; a delta names ten tenants."""
    rows = [row(f"tenant-{number}", queued=number % 3, running=1) for number in range(tenants)]
    listed = tuple(
        request(f"cox.tenant-{number % tenants}..{number:026}", f"tenant-{number % tenants}", output_tokens=9)
        for number in range(requests)
    )

    def of(worker: str) -> Frame:
        return frame(worker, "01A", SEQ, *(rows if full else rows[:10]), full=full, requests=listed)

    names = [f"worker-{number}" for number in range(workers)]
    return [(name, msgspec.json.encode(of(name))) for name in names]


async def turn(page: Page, beats: list[list[tuple[str, bytes]]], begin: int, seconds: float) -> list[float]:
    """How late each beat was, in ms."""
    late, due = [], time.monotonic()
    for number in range(begin, begin + round(seconds / CADENCE_S)):
        seq = b'"seq":%d,' % (SEQ + number)
        heard = [
            (name, each.replace(b'"seq":%d,' % SEQ, seq, 1)) for name, each in beats[number % FULL_EVERY]
        ]
        due = max(due + CADENCE_S, time.monotonic())
        await asyncio.sleep(due - time.monotonic())
        late.append(1e3 * (time.monotonic() - due))
        for name, payload in heard:
            page.heard(name, payload)
    return sorted(late)


async def run(*, workers: int, tenants: int, requests: int, watchers: int, seconds: float) -> dict[str, Any]:
    """Unwatched, then watched."""
    page = Page("main", lambda: Standing(name="bench", leading=True, reaches_nats=True))
    full, delta = (payloads(workers, tenants, requests, full=full) for full in (True, False))
    beats = [full] + [delta] * (FULL_EVERY - 1)
    result: dict[str, Any] = {
        "workers": workers,
        "tenants": tenants,
        "requests": requests,
        "watchers": watchers,
    }
    pictures = [0, 0]

    async def watch() -> None:
        async with aclosing(page.follow()) as them:
            async for picture in them:
                pictures[0] += 1
                pictures[1] = len(picture)

    async with page.drawing():
        result["unwatched"] = spread(await turn(page, beats, 0, seconds))
        watching = [asyncio.create_task(watch()) for _ in range(watchers)]
        await turn(page, beats, 10_000, 2.0)  # to be under way
        pictures[0], cpu = 0, time.process_time()
        result["watched"] = spread(await turn(page, beats, 20_000, seconds))
        result["cpu_percent"] = round(100 * (time.process_time() - cpu) / seconds)
        result["pictures_per_watcher_per_s"] = round(pictures[0] / watchers / seconds, 2)
        result["picture_bytes"] = pictures[1]
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
    return result


def spread(late: list[float]) -> dict[str, float]:
    """Of sorted times."""
    return {
        "p50_ms": round(late[len(late) // 2], 2),
        "p99_ms": round(late[len(late) * 99 // 100], 2),
        "max_ms": round(late[-1], 2),
    }


def main() -> None:
    """Print what was measured; with --json write it too."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0)
    for name, default in (("workers", 8), ("tenants", 50), ("requests", 24), ("watchers", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = vars(parser.parse_args())
    path = given.pop("json")
    result = {"python": platform.python_version(), **uvloop.run(run(**given))}
    print(json.dumps(result, indent=1))
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
