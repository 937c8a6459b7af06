"""Processes of a run: started in a session of their own, ended with all that they started.

Called by `run` and `trials`.
"""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

CACHE = Path(os.environ.get("VLLM_CACHE_ROOT", "~/.cache/vllm")).expanduser()


def cache_of(name: str) -> dict[str, str]:
    """Environment: engines that compile the same model at the same time must not write the same files."""
    return {"VLLM_CACHE_ROOT": str(CACHE / f"bench-{name}")}


class Child:
    """One process of a run; its output goes to the run's log."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.ended = asyncio.create_task(process.wait())

    @classmethod
    async def start(cls, log: Any, *arguments: str, env: dict[str, str]) -> "Child":
        """Start `python -m bench.gpu …`, in a session of its own, so that its engine ends with it."""
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable, "-m", "bench.gpu", *arguments,
                stdout=log, stderr=log, env=env, start_new_session=True,
            )
        )  # fmt: skip

    async def end(self) -> None:
        """End it and all that it started."""
        for number in (15, 9):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break
            await asyncio.wait((self.ended,), timeout=3.0)
        await self.ended
