"""The lease where NATS answers what it seldom does. With a real server: `tests/integration/test_failover.py`."""

import asyncio
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import nats.js.errors
import pytest

from coxswain.control import lease as module
from coxswain.control.lease import RETRY_S, Lease
from coxswain.schemas.policy import LeaseHolder
from coxswain.schemas.subjects import Subjects


class Bucket:
    """JetStream with a bucket whose key expires between a standby's two looks at it."""

    def __init__(self) -> None:
        self.looks = 0

    async def key_value(self, _: str) -> "Bucket":
        """Itself."""
        return self

    async def stream_info(self, _: str) -> Any:
        """When it was made."""
        return SimpleNamespace(created=datetime(2026, 1, 1, tzinfo=UTC))

    async def create(self, *_: Any) -> int:
        """As nats-py's: the key is there, and when it looks whether it was deleted, it is not."""
        self.looks += 1
        if self.looks == 1:
            raise nats.js.errors.KeyNotFoundError
        return 7

    async def update(self, *_: Any, **__: Any) -> int:
        """The next revision."""
        return 8


async def test_a_key_that_expires_while_a_standby_looks_is_taken_at_the_next_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is no missing bucket, after which a standby would wait for longer than a takeover may take."""
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            lease.stop()
        await sleep(0)

    monkeypatch.setattr(module.asyncio, "sleep", pause)
    lease = Lease(Bucket(), Subjects("main"), LeaseHolder(controller="c", policy="vtc", since=0.0))  # type: ignore[arg-type]
    await lease.run()
    assert pauses[0] < 2 * RETRY_S
    assert lease.epoch == (datetime(2026, 1, 1, tzinfo=UTC).timestamp(), 7)
