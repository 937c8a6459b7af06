"""Who leads: a lease in JetStream KV, held by one controller at a time. The shell around one key.

The bucket forgets the key 2 s after its last renewal; the holder renews it twice a second and steps down by its
own clock before that. The epoch (bucket created at, revision of the create) grows with every new holder, and
workers refuse lower ones: that, and not the clock, is what makes a second leader harmless.
Called by `daemon`, which asks `epoch` at every step.
"""

import asyncio
import random
import time
from contextlib import suppress
from typing import Final

import msgspec
import nats.errors
import nats.js.errors
from nats.js import JetStreamContext
from nats.js.kv import KeyValue

from coxswain.common.throttle import Throttle
from coxswain.control.errors import DeniedError
from coxswain.control.logs import log
from coxswain.control.tables import LEASE_TTL_S, explained
from coxswain.schemas.policy import Epoch, LeaseHolder
from coxswain.schemas.subjects import Subjects

KEY: Final = "leader"
RENEW_S: Final = 0.5
RETRY_S: Final = 0.25
MARGIN_S: Final = 0.5
"""We step down this long before the server forgets our key."""
_MISSING = (
    nats.js.errors.NotFoundError,
    nats.js.errors.NoStreamResponseError,
    nats.js.errors.ServiceUnavailableError,
)


async def holder(js: JetStreamContext, subjects: Subjects) -> bytes | None:
    """What the lease says of whoever leads (a `LeaseHolder`); None if nobody does.

    Raises:
        NotSetUpError, UnreachableError: as `Table.get_all`. DeniedError: this user may not look.
    """
    with explained(subjects.lease_bucket):
        try:
            return (await (await js.key_value(subjects.lease_bucket)).get(KEY)).value
        except nats.js.errors.KeyNotFoundError:
            return None


class Lease:
    """One controller's side of the lease: `run` holds it or waits for it, `epoch` says which.

    Args:
        js: JetStream of the controller's connection, with a timeout of at most a second.
        subjects: of the fleet.
        holder: who we are; `controller` must be unique to this process.
    """

    def __init__(self, js: JetStreamContext, subjects: Subjects, holder: LeaseHolder) -> None:
        self._js = js
        self._bucket = subjects.lease_bucket
        self._holder = holder
        self._value = msgspec.json.encode(holder)
        self._epoch: Epoch | None = None
        self._kv: KeyValue | None = None
        self._revision = 0
        self._until = 0.0
        self._quiet_until = 0.0
        self._unsure = False
        self._doubts: dict[str, Epoch] = {}
        """Workers that say that another leads, and which, since the last renewal began."""
        self._hurry = asyncio.Event()
        self._closed = False
        self._throttle = Throttle()

    @property
    def epoch(self) -> Epoch | None:
        """Our epoch while we lead by our own clock, else None."""
        return self._epoch if time.monotonic() < self._until else None

    def doubt(self, worker: str, epoch: Epoch) -> None:
        """Look at the key at once: a worker says that it obeys a later epoch than ours.

        We lead on unless the key says so too. What a worker says is no proof: if it were, one that lies, or was lied
        to, could keep all others without a leader. And a leader that was replaced does no harm: it is refused.
        """
        if self._epoch is not None and self._throttle.allow("doubt", worker) is not None:
            self._doubts[worker] = epoch
            self._hurry.set()

    def step_down(self, reason: str, others_try_s: float) -> None:
        """Stop leading at once, and let others try for so long."""
        if self._epoch is not None:
            log.warning("lease.given_up", epoch=self._epoch, reason=reason)
        self._epoch = None
        self._quiet_until = time.monotonic() + others_try_s

    async def run(self) -> None:
        """Hold the lease or wait for it, until `stop`."""
        while not self._closed:
            self._hurry.clear()
            try:
                pause_s = await (self._renew() if self._epoch else self._acquire())
            except nats.js.errors.KeyNotFoundError:
                pause_s = RETRY_S  # it was there, and expired while we looked whose it is
            except _MISSING:
                pause_s = 2.0
                if self._throttle.allow("missing") is not None:
                    log.error("lease.missing", bucket=self._bucket, hint="run `cox init`")
            except (nats.errors.Error, DeniedError) as error:
                pause_s = RETRY_S
                if self._throttle.allow("error", str(error)) is not None:
                    log.warning("lease.unanswered", error=str(error) or type(error).__name__)
            if self._epoch and time.monotonic() >= self._until:
                self._lose("could not renew in time")
            # Jitter: standbys that started together must not ask together.
            await self._pause(pause_s * random.uniform(0.9, 1.1))  # noqa: S311

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), seconds)

    def stop(self) -> None:
        """Let `run` end; a flag, because nats-py can swallow the cancellation of a publish."""
        self._closed = True

    async def give_back(self) -> None:
        """Free the lease, once `run` has ended, so that a standby need not wait for its end."""
        held, self._epoch = self._epoch, None
        if held is None or self._kv is None:
            return
        try:
            await self._kv.delete(KEY, last=self._revision)
            log.info("lease.returned", epoch=held)
        except (nats.errors.Error, DeniedError) as error:
            log.warning("lease.not_returned", error=str(error))

    async def _acquire(self) -> float:
        if time.monotonic() < self._quiet_until:
            return RETRY_S
        self._kv = await self._js.key_value(self._bucket)
        began = time.monotonic()
        revision = await self._take(self._kv)
        if revision is None:
            return RETRY_S
        self._unsure = (
            True  # until the line after next: the key is ours, and we may not get to know its epoch
        )
        created = (await self._js.stream_info(f"KV_{self._bucket}")).created
        self._unsure = False
        assert created is not None, "every server since 2.2 says when a stream was created"
        self._epoch = (created.timestamp(), revision)
        self._doubts = {}
        self._revision = revision
        self._until = began + LEASE_TTL_S - MARGIN_S
        log.info("lease.taken", epoch=self._epoch, controller=self._holder.controller)
        return RENEW_S

    async def _take(self, kv: KeyValue) -> int | None:
        """The revision with which we hold the key from now on, or None if somebody else holds it."""
        unsure, self._unsure = self._unsure, True
        try:
            revision: int = await kv.create(KEY, self._value)
        except nats.js.errors.KeyWrongLastSequenceError:
            self._unsure = False
            if not unsure:
                return None
            # A write of ours whose answer was lost may have taken effect: then the key has our value.
            entry = await kv.get(KEY)
            if entry.value != self._value:
                return None
            self._unsure = True
            revision = await kv.update(KEY, self._value, last=entry.revision)
        self._unsure = False
        return revision

    async def _renew(self) -> float:
        assert self._kv is not None, "a lease that is held was taken"
        began = time.monotonic()
        doubts, self._doubts = self._doubts, {}
        try:
            self._revision = await self._kv.update(KEY, self._value, last=self._revision)
        except nats.js.errors.KeyWrongLastSequenceError:
            self._unsure = True
            self._lose("the key changed: another controller holds it, or an answer to us was lost")
            return 0.0
        self._until = began + LEASE_TTL_S - MARGIN_S
        if doubts:
            log.warning(
                "lease.disputed",
                epoch=self._epoch,
                workers=doubts,
                hint="they obey a later epoch, but the lease is ours: docs/runbook.md#coxswaincommandsrefused",
            )
        return RENEW_S

    def _lose(self, reason: str) -> None:
        log.warning("lease.lost", epoch=self._epoch, reason=reason)
        self._epoch = None
