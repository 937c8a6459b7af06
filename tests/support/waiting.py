"""Waiting for what must happen: patient, for a machine that many share may stand still for seconds."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 30.0


async def eventually(condition: Callable[[], Any], within_s: float = PATIENCE_S) -> Any:
    """The condition's first true value; AssertionError if it has none in time."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"did not happen within {within_s} s: {condition}"
        await asyncio.sleep(0.005)
    return value
