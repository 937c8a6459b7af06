"""Random steering of the checked simulated device, run after run, until so many steps were taken.

What is done and what must hold is `tests/support/random_run.py`; each run is a seed in one of the engine's modes, and
one that fails says which.
"""

import itertools
import multiprocessing
import os
import tempfile
import time
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


class Taken(msgspec.Struct, kw_only=True):
    """One run, whole."""

    seed: int
    mode: dict[str, Any]
    steps: int
    commands: int
    requests: int
    seconds: float


def steer(steps: int, seed: int, console: Console) -> list[Taken]:
    """Take at least so many steps, on all cores; every run checks everything.

    Raises:
        AssertionError: something did not hold; the text before it says which run.
    """
    runs: list[Taken] = []
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "COX_LOG_LEVEL": "error"}
    cores = len(os.sched_getaffinity(0))
    coming = zip(itertools.count(seed), itertools.cycle(MODES), strict=False)
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        under_way = {pool.submit(one, *next(coming)) for _ in range(cores)}
        while under_way:
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for run in done:
                taken = run.result()
                runs.append(taken)
                console.print(
                    f"seed {taken.seed} {taken.mode}: {taken.steps} steps, all held", highlight=False
                )
                if sum(run.steps for run in runs) < steps:
                    under_way.add(pool.submit(one, *next(coming)))
    return runs


def one(seed: int, mode: dict[str, Any], requests: int = REQUESTS) -> Taken:
    """One run: the same requests undisturbed on stock vLLM, then steered at random on ours."""
    from tests.support.random_cases import cases, undisturbed
    from tests.support.random_run import Run
    from tests.support.simulated import engine

    began = time.monotonic()
    wanted = cases(seed, requests)
    try:
        with tempfile.TemporaryDirectory() as folder:
            with engine(Path(folder), scheduler=None, num_gpu_blocks_override=400, **mode) as stock:
                expected = undisturbed(stock, wanted)
            with engine(Path(folder), **mode) as steered:
                run = Run(steered, wanted, seed)
                run.play()
                run.check(expected)
    except BaseException as error:
        error.add_note(f"seed {seed}, mode {mode}, {requests} requests")
        raise
    return Taken(
        seed=seed, mode=mode, steps=steered.steps, commands=sum(run.done.values()), requests=len(wanted),
        seconds=round(time.monotonic() - began, 1),
    )  # fmt: skip
