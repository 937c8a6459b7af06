"""The lease where NATS answers what it seldom does. With a real server: `tests/integration/test_failover.py`."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import nats.js.errors
import pytest

from coxswain.control import lease as module
from coxswain.control.lease import RETRY_S, Lease
from coxswain.schemas.policy import LeaseHolder
from coxswain.schemas.subjects import Subjects
from tests.support.waiting import eventually

HOLDER = LeaseHolder(controller="c", policy="vtc", since=0.0)
LATER = (9e9, 1)


class Bucket:
    """JetStream with a bucket whose key expires between a standby's two looks at it."""

    def __init__(self) -> None:
        self.looks = self.renewals = 0
        self.taken = False
        """Whether the key is another's now."""
        self.meanwhile: Callable[[], None] | None = None
        """What happens while a renewal that fails is under way, once: then the key is free."""

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
        if self.taken:
            raise nats.js.errors.KeyWrongLastSequenceError
        return 7

    async def get(self, _: str) -> Any:
        """The other's."""
        return SimpleNamespace(value=b"another", revision=9)

    async def update(self, *_: Any, **__: Any) -> int:
        """The next revision, while the key is ours."""
        self.renewals += 1
        if self.meanwhile is not None:
            self.meanwhile()
            self.meanwhile = None
            raise nats.js.errors.KeyWrongLastSequenceError
        if self.taken:
            raise nats.js.errors.KeyWrongLastSequenceError
        return 8


async def test_a_key_that_expires_while_a_standby_looks_is_taken_at_the_next_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is no missing bucket, after which a standby would wait for longer than a takeover may take."""
    pauses: list[float] = []

    async def pause(_: Lease, seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            lease.stop()

    monkeypatch.setattr(Lease, "_pause", pause)
    lease = Lease(Bucket(), Subjects("main"), HOLDER)  # type: ignore[arg-type]
    await lease.run()
    assert pauses[0] < 2 * RETRY_S
    assert lease.epoch == (datetime(2026, 1, 1, tzinfo=UTC).timestamp(), 7)


@asynccontextmanager
async def held(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lease]:
    """A lease that is held, and would not be renewed for ten minutes."""
    monkeypatch.setattr(module, "RENEW_S", 600.0)
    monkeypatch.setattr(module, "LEASE_TTL_S", 3_600.0)
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    lease = Lease(bucket, Subjects("main"), HOLDER)  # type: ignore[arg-type]
    task = asyncio.create_task(lease.run())
    await eventually(lambda: lease.epoch)
    yield lease
    task.cancel()


async def test_what_a_worker_says_of_another_leader_is_looked_up_at_once_and_not_believed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The key is ours still: we lead on, and say who claimed otherwise; saying it again makes no more work."""
    bucket = Bucket()
    async with held(bucket, monkeypatch) as lease:
        epoch = lease.epoch
        for _ in range(5):
            lease.doubt("liar", LATER)
            await eventually(lambda: bucket.renewals)
        lease.doubt("other", LATER)
        await eventually(lambda: bucket.renewals == 2)
        assert lease.epoch == epoch
    told = capsys.readouterr()
    said = told.out + told.err
    assert said.count("lease.disputed") == 2
    assert said.count("liar") == 1


async def test_a_leader_that_was_replaced_notices_when_a_worker_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The key is another's: the lease is lost at once, not when the next renewal is due."""
    bucket = Bucket()
    async with held(bucket, monkeypatch) as lease:
        bucket.taken = True
        lease.doubt("w1", LATER)
        await eventually(lambda: lease.epoch is None)


async def test_a_doubt_of_a_term_that_was_lost_is_none_of_the_next_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The worker was right: another led, or we under an epoch that is past. It is not said to dispute the new one."""
    bucket = Bucket()
    async with held(bucket, monkeypatch) as lease:
        looks = bucket.looks
        bucket.meanwhile = lambda: lease.doubt("honest", LATER)
        lease.doubt("first", LATER)
        await eventually(lambda: bucket.looks > looks and lease.epoch)
        lease.doubt("liar", LATER)
        await eventually(lambda: bucket.renewals == 2)
    told = capsys.readouterr()
    disputed = [line for line in (told.out + told.err).splitlines() if "lease.disputed" in line]
    assert len(disputed) == 1
    assert "liar" in disputed[0]
    assert "honest" not in disputed[0]


async def test_who_steps_down_lets_others_try_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for the lease again no sooner than it said."""
    bucket = Bucket()
    async with held(bucket, monkeypatch) as lease:
        lease.step_down("to let others try", 600.0)
        looks = bucket.looks
        lease._hurry.set()
        await asyncio.sleep(0.2)
        assert (lease.epoch, bucket.looks) == (None, looks)
        lease.step_down("no longer", 0.0)
        await eventually(lambda: lease.epoch)
