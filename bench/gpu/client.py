"""The command path's client, alone in its process: one command at a time, about 100 a second at most.

    python -m bench.gpu client REQUEST --worker NAME --count N    prints when each was sent and its reply came

Started by `command`; finds NATS by the environment. Times are `perf_counter`'s, which processes of a machine share.
"""

import asyncio
import sys
import time

import msgspec

from bench.gpu.wire import Wire, connect

WARM = 5
REST_S = 0.005


async def client(request: str, worker: str, count: int) -> None:
    """Change one request's priority `count` times."""
    async with await connect() as link:
        wire = Wire(link, worker)
        await wire.ready()
        spans = []
        for index in range(WARM + count):
            began = time.perf_counter()
            reply = await wire("prioritize", [request], priority=index + 1)
            spans.append((began, time.perf_counter()))
            if reply.outcome != "applied":
                raise RuntimeError(f"{reply.outcome}: {reply.counts}")
            await asyncio.sleep(REST_S)
    sys.stdout.write(msgspec.json.encode(spans[WARM:]).decode())
