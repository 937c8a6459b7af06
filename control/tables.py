"""The tenant and class tables in JetStream KV, and `init`, which makes everything that a fleet stores.

Called by `client` (one table each) and `cli`; the controller follows both with `Table.watch`.
"""

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Generic, Literal, NamedTuple

import msgspec
import nats.errors
import nats.js.errors
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, KeyValueConfig, StorageType, StreamConfig
from nats.js.kv import KeyValue

from coxswain.control.errors import JetStreamRefusedError, NotSetUpError, RowError, UnreachableError
from coxswain.control.rows import Row, Rows, check
from coxswain.schemas.subjects import Subjects

LEASE_TTL_S: Final = 2.0
"""The lease's bucket forgets its key after this long without a renewal."""
HISTORY: Final = 8
"""Revisions kept per row, so that a bad edit does not lose the last good one, even over a failover."""


class LogLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the event log may take on NATS's disk, and how many servers keep a copy of everything.

    None: as it is, and of a new log as `NEW_LOG` has it.
    """

    max_age_s: float | None = None
    max_bytes: int | None = None
    replicas: int | None = None


NEW_LOG: Final = LogLimits(max_age_s=7 * 86_400.0, max_bytes=1 << 30, replicas=1)


class Made(NamedTuple):
    """What `init` did about one stream or bucket."""

    kind: Literal["stream", "bucket"]
    name: str
    outcome: Literal["created", "updated", "kept"]


class Table(Generic[Row]):
    """One KV bucket of rows; `key_of` and `name_of` turn names into keys and back."""

    def __init__(
        self,
        js: JetStreamContext,
        bucket: str,
        row: type[Row],
        *,
        key_of: Callable[[str], str],
        name_of: Callable[[str], str],
    ) -> None:
        self._js = js
        self._row = row
        self._key_of = key_of
        self._name_of = name_of
        self.bucket = bucket

    async def get_all(self) -> Rows[Row]:
        """Every row now, and what was refused.

        Raises:
            NotSetUpError: the bucket is missing. UnreachableError: NATS does not answer.
        """
        snapshots = self.watch()
        try:
            return await anext(snapshots)
        finally:
            await snapshots.aclose()

    async def put(self, name: str, row: Row) -> int:
        """Store a row; returns its revision.

        Raises:
            RowError: the name or a value is not allowed. NotSetUpError, UnreachableError: as `get_all`.
        """
        payload = msgspec.json.encode(row)
        try:
            key = self._key_of(name)
            self._name_of(key)  # also refuses what only the way back would
            check(msgspec.json.decode(payload, type=self._row))
        except (ValueError, msgspec.MsgspecError) as error:
            raise RowError(f"row {name!r} was not stored: {error}") from error
        with explained(self.bucket):
            revision: int = await (await self._bucket()).put(key, payload)
            return revision

    async def delete(self, name: str) -> bool:
        """Remove a row; False if there was none."""
        with explained(self.bucket):
            bucket = await self._bucket()
            try:
                entry = await bucket.get(self._key_of(name))
            except nats.js.errors.KeyNotFoundError:
                return False
            await bucket.delete(self._key_of(name), last=entry.revision)
            return True

    async def watch(self, rows: Rows[Row] | None = None) -> AsyncGenerator[Rows[Row], None]:
        """The whole table once it was read, and again after every change, for ever.

        It does not survive a lost connection by itself: watch again then, with the same `rows`.

        Args:
            rows: what an earlier watch yielded, so that its last good rows stay; it is changed in place.

        Raises:
            NotSetUpError, UnreachableError: as `get_all`.
        """
        rows = rows or Rows(self._row, self._name_of)
        with explained(self.bucket):
            watcher = await (await self._bucket()).watchall(include_history=True)
        whole = False
        rows.begin()
        try:
            async for entry in watcher:
                if entry is None:
                    whole = True
                    rows.end()
                else:
                    rows.put(entry.key, None if entry.operation else entry.value or b"")
                if whole:
                    yield rows
        finally:
            await _stop(watcher)

    async def _bucket(self) -> KeyValue:
        return await self._js.key_value(self.bucket)


async def init(js: JetStreamContext, subjects: Subjects, limits: LogLimits | None = None) -> list[Made]:
    """Make the fleet's event log and its three buckets where they are missing; safe to repeat.

    An event log that exists is changed only in what `limits` name, if they differ, and in what follows from them: it
    drops what is oldest, and knows a repeated event for no longer than it keeps it. Buckets never are changed.

    Raises:
        NotSetUpError: JetStream is off.
        JetStreamRefusedError: it refused the limits; its own text says why.
        UnreachableError: NATS does not answer.
    """
    with explained(subjects.stream):
        log, replicas = await _event_log(js, subjects, limits)
        made = [log]
        for bucket, ttl_s, history in (
            (subjects.lease_bucket, LEASE_TTL_S, 1),
            (subjects.classes_bucket, None, HISTORY),
            (subjects.tenants_bucket, None, HISTORY),
        ):
            made.append(await _make_bucket(js, bucket, ttl_s, history, replicas))
    return made


async def _event_log(js: JetStreamContext, subjects: Subjects, limits: LogLimits | None) -> tuple[Made, int]:
    """Make or change the event log; the copies that it has."""
    try:
        now = (await js.stream_info(subjects.stream)).config
    except nats.js.errors.NotFoundError:
        new = StreamConfig(
            name=subjects.stream,
            subjects=[subjects.events_all],
            storage=StorageType.FILE,
            duplicate_window=120.0,
        )
        new = _limited(new, {**_named(NEW_LOG), **_named(limits)})
        await js.add_stream(new)
        return Made("stream", subjects.stream, "created"), new.num_replicas or 1
    changed = _limited(now, _named(limits))
    if changed == now or not _named(limits):
        return Made("stream", subjects.stream, "kept"), now.num_replicas or 1
    await js.update_stream(changed)
    return Made("stream", subjects.stream, "updated"), changed.num_replicas or 1


def _limited(config: StreamConfig, named: dict[str, Any]) -> StreamConfig:
    """A log's configuration with these limits, and everything else as it is, but that what is new is never refused."""
    limited = config.evolve(**named, discard=DiscardPolicy.OLD, discard_new_per_subject=False)
    if limited.max_age:
        # JetStream refuses to know an event for longer than it keeps it.
        limited.duplicate_window = min(limited.duplicate_window, limited.max_age)
    return limited


def _named(limits: LogLimits | None) -> dict[str, Any]:
    """The limits that are named, by JetStream's names."""
    limits = limits or LogLimits()
    given = {"max_age": limits.max_age_s, "max_bytes": limits.max_bytes, "num_replicas": limits.replicas}
    return {name: value for name, value in given.items() if value is not None}


async def _make_bucket(
    js: JetStreamContext, bucket: str, ttl_s: float | None, history: int, replicas: int
) -> Made:
    try:
        await js.key_value(bucket)
    except nats.js.errors.BucketNotFoundError:
        config = KeyValueConfig(bucket=bucket, ttl=ttl_s, history=history, replicas=replicas, direct=False)
        await js.create_key_value(config)
        return Made("bucket", bucket, "created")
    return Made("bucket", bucket, "kept")


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn NATS's errors into ours: what is missing and what to do."""
    try:
        yield
    except (
        nats.js.errors.BucketNotFoundError,
        nats.js.errors.NoStreamResponseError,
        nats.js.errors.ServiceUnavailableError,
    ) as error:
        raise NotSetUpError(
            f"{what} is missing or JetStream is off: start nats-server with `-js`, then run `cox init` once.",
        ) from error
    except nats.js.errors.APIError as error:
        raise JetStreamRefusedError(
            f"JetStream refused this ({what}): {error.description or error}"
        ) from error
    except nats.errors.Error as error:
        raise UnreachableError(
            f"NATS did not answer about {what}: {error}. Try again once it is back."
        ) from error


async def _stop(watcher: Any) -> None:
    try:
        await watcher.stop()
    except nats.errors.Error:
        return  # the connection is closed or lost, and the server forgets the watch by itself
