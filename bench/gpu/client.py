"""The command path's client, alone in its process: one command at a time, at random moments.

    python -m bench.gpu client REQUEST --worker NAME --count N    prints when each was sent, taken, and its reply came

Started by `command`; finds NATS by the environment. It was taken by the worker's clock (`worker_now` of the reply);
the other times are `perf_counter`'s, which processes of a machine share.
"""

import asyncio
import random
import sys
import time

import msgspec

from bench.gpu.wire import Wire, connect

WARM = 5
REST_S = 0.05
"""The longest rest between two commands. A reply comes at the end of a step: after a rest that is always the same, the
next command would meet every step at the same point."""


async def client(request: str, worker: str, count: int) -> None:
    """Change one request's priority `count` times."""
    async with await connect() as link:
        wire = Wire(link, worker)
        await wire.ready()
        spans, moments = [], random.Random(count)
        for index in range(WARM + count):
            began = time.perf_counter()
            reply = await wire("prioritize", [request], priority=index + 1)
            spans.append((began, reply.worker_now, time.perf_counter()))
            if reply.outcome != "applied":
                raise RuntimeError(f"{reply.outcome}: {reply.counts}")
            await asyncio.sleep(moments.uniform(0.0, REST_S))
    sys.stdout.write(msgspec.json.encode(spans[WARM:]).decode())
