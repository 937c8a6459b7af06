"""Random steering of the checked simulated device, run after run, until so many steps were taken.

What is done and what must hold is `tests/support/random_run.py`; each run is a seed in one of the engine's modes, and
one that fails says which.
"""

import itertools
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console

REQUESTS: Final = 1_000
"""In one run."""
MODES: Final[tuple[dict[str, Any], ...]] = tuple(
    {"v2": v2, "asynchronous": asynchronous, "enable_prefix_caching": caching}
    for v2, asynchronous, caching in itertools.product((False, True), (False, True), (False, True))
)
SPECIAL: Final[tuple[dict[str, Any], ...]] = (
    {"kind": "drafts", "v2": False, "asynchronous": False, "enable_prefix_caching": True},
    {"kind": "drafts", "v2": True, "asynchronous": True, "enable_prefix_caching": True},
    {"kind": "scarce", "v2": False, "asynchronous": False, "enable_prefix_caching": True},
    {"kind": "scarce", "v2": True, "asynchronous": True, "enable_prefix_caching": True},
    {"kind": "offload", "v2": False, "asynchronous": True, "enable_prefix_caching": True},
    {"kind": "offload", "v2": True, "asynchronous": True, "enable_prefix_caching": False},
    {"kind": "all kinds", "v2": False, "asynchronous": False, "enable_prefix_caching": True},
    {"kind": "all kinds", "v2": True, "asynchronous": True, "enable_prefix_caching": True},
)
"""Speculative decoding, few blocks, KV offloading, and requests with adapters, grammars and sessions."""


class Taken(msgspec.Struct, kw_only=True):
    """One run, whole."""

    seed: int
    mode: dict[str, Any]
    steps: int
    commands: int
    requests: int
    seconds: float
    problem: str = ""
    """What did not hold; the run ended there."""


Told = Callable[[list[Taken]], None]


def steer(
    steps: int, seed: int, console: Console, *, cores: int = 0, told: Told = lambda _: None
) -> list[Taken]:
    """Take at least so many steps; every run checks everything.

    Args:
        steps: of all runs together; runs that have begun are ended.
        seed: of the first run.
        console: has a line per run.
        cores: how many to use; 0 for all.
        told: hears all runs so far, after each.
    """
    runs: list[Taken] = []
    taken = 0
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "COX_LOG_LEVEL": "error"}
    cores = cores or len(os.sched_getaffinity(0))
    coming = zip(itertools.count(seed), itertools.cycle(MODES + SPECIAL), strict=False)
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        under_way = {pool.submit(one, *next(coming)) for _ in range(cores)}
        while under_way:
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for each in done:
                run = each.result()
                runs.append(run)
                taken += run.steps
                console.print(
                    f"seed {run.seed} {run.mode}: {run.steps} steps, {run.problem or 'all held'}; {taken:,} so far",
                    highlight=False,
                )
                told(runs)
                if taken < steps:
                    under_way.add(pool.submit(one, *next(coming)))
    return runs


def one(seed: int, mode: dict[str, Any], requests: int = REQUESTS) -> Taken:
    """One run: the same requests undisturbed on stock vLLM, then steered at random on ours."""
    from tests.support.random_cases import undisturbed
    from tests.support.random_run import Run
    from tests.support.simulated import engine

    began, run, problem = time.monotonic(), None, ""
    try:
        with tempfile.TemporaryDirectory() as folder:
            wanted, stock_options, options = prepared(Path(folder), seed, mode, requests)
            with engine(Path(folder), scheduler=None, num_gpu_blocks_override=400, **stock_options) as stock:
                expected = undisturbed(stock, wanted)
            with engine(Path(folder), **options) as steered:
                run = Run(steered, wanted, seed)
                run.play()
                run.check(expected)
    except Exception as error:  # noqa: BLE001 - whatever it was, it is told, and the next run begins
        problem = "".join(traceback.format_exception_only(error)).strip()
    return Taken(
        seed=seed, mode=mode, steps=run.engine.steps if run else 0, commands=sum(run.done.values()) if run else 0,
        requests=requests, seconds=round(time.monotonic() - began, 1), problem=problem,
    )  # fmt: skip


def prepared(
    folder: Path, seed: int, mode: dict[str, Any], requests: int
) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """What a mode stands for: its requests, and vLLM's engine arguments for the stock and for the steered engine."""
    from coxswain.service.tiny import make_model
    from tests.support.modes import DRAFTS, LORAS, OFFLOAD, SCARCE
    from tests.support.random_cases import cases, kinds

    plain = {name: value for name, value in mode.items() if name != "kind"}
    match mode.get("kind"):
        case "drafts":
            options = plain | {"speculative_config": DRAFTS[plain["asynchronous"]]}
            return cases(seed, requests), options, options
        case "scarce":
            return cases(seed, requests), plain, plain | SCARCE
        case "offload":
            return cases(seed, requests), plain, plain | {"kv_transfer_config": OFFLOAD}
        case "all kinds":
            options = plain | LORAS | {"model": str(make_model(folder / "model"))}
            return kinds(seed, requests // 2), options, options
        case _:
            return cases(seed, requests), plain, plain
