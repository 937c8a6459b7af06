"""One engine of a run, in a process of its own: takes units over NATS, one at a time, and answers with results.

    python -m bench.gpu host stock|steered --model DIR --kv-bytes N [--graphs TOKENS] [--option NAME=JSON …]
        [--mode gpu|simulated|dry]

Started by `run`. A unit that fails answers with its traceback; the engine is brought to rest and the next one
is tried.
"""

import asyncio
import gc
import os
import traceback
from pathlib import Path
from typing import Any

import msgspec

from bench.gpu import colocation, command, continuing, overhead, wire
from bench.gpu.engine import at_rest, make_8b
from bench.gpu.plan import STEERED, Mode, Unit

KINDS = {
    "overhead": overhead.overhead,
    "decoding": overhead.decoding,
    "colocation": colocation.colocation,
    "continuing": continuing.continuing,
    "command": command.command,
}
PATIENCE, REST_S = 1.5, 10.0
"""A unit that takes half as long again as planned, and this, is given up; the engine stays."""


def subject(side: str) -> str:
    """Where a host listens."""
    return f"bench.{side}"


async def host(
    side: str, model: Path, kv_bytes: int, mode: Mode, graphs: int, options: dict[str, Any]
) -> None:
    """Load the engine, say so by listening, run what is asked until the process is ended."""
    os.environ.update(wire.environment(side, os.environ["COX_NATS_URL"]))
    llm = make_8b(model, side, kv_bytes=kv_bytes, mode=mode, graphs=graphs, **options)
    client = await wire.connect()
    steer = None
    if side == STEERED:
        steer = wire.Wire(client, side)
        await steer.ready()
    # What is there now stays: the collector need not look at it again in the middle of a measurement.
    gc.collect()
    gc.freeze()
    asked: asyncio.Queue[Any] = asyncio.Queue()
    await client.nc.subscribe(subject(side), cb=asked.put)
    await client.nc.subscribe(subject(f"{side}.there"), cb=_here)
    print(f"{side}: ready", flush=True)
    while True:
        message = await asked.get()
        unit = msgspec.json.decode(message.data, type=Unit)
        print(f"{side}: {unit.name}", flush=True)
        await message.respond(msgspec.json.encode(await _run(llm, steer, mode.sizes, unit)))


async def _here(message: Any) -> None:
    await message.respond(b"")


async def _run(llm: Any, steer: Any, sizes: Any, unit: Unit) -> dict[str, Any]:
    try:
        async with asyncio.timeout(PATIENCE * unit.seconds + REST_S):
            result = await KINDS[unit.kind](llm, steer, sizes, **unit.fields)
            await at_rest(llm)
    except Exception:  # noqa: BLE001 - one unit's fault must not cost the others
        return {"error": traceback.format_exc()}
    return {"result": result}
