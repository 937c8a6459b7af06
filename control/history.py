"""Read the event log: a JetStream consumer from a time on, in order and without gaps. Called by `client` only.

A pull consumer, and its own count of what was delivered: nats-py's ordered push consumer loses its place when the
first messages come before its bookkeeping is there, and then asks the server for something that it refuses, so that a
reader on a busy fleet stood still for ever. Here a consumer that is lost (a restarted server, a missed message) is
made again behind the last message that was given.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final, Literal

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from coxswain.control.errors import NotSetUpError

IDLE_S: Final = 60.0
"""The server forgets the consumer of a reader that vanished after this long."""
BATCH: Final = 500
WAIT_S: Final = 5.0
"""A request for new messages is repeated after this long."""
AGAIN_S: Final = 0.5
"""Pause before a lost consumer is made again."""

Start = float | Literal["all"]


async def replay(
    js: JetStreamContext, stream: str, subject: str, start: Start, *, follow: bool
) -> AsyncGenerator[Msg, None]:
    """Stored messages of `subject`, oldest first, then new ones unless `follow` is False.

    Args:
        js: JetStream of an open connection.
        stream: the fleet's event stream.
        subject: which events.
        start: Unix seconds, or "all" for everything kept.
        follow: go on after the end of the log.

    Raises:
        NotSetUpError: if the stream does not exist or JetStream is off.
    """
    after: int | None = None
    while True:
        try:
            consumer = await js.pull_subscribe(subject, stream=stream, config=_config(start, after))
            pending = (await consumer.consumer_info()).num_pending or 0
        except (nats.js.errors.NotFoundError, nats.js.errors.ServiceUnavailableError) as error:
            if after is None:
                raise NotSetUpError(
                    f"the event log {stream} is missing (or JetStream is off): run `cox init` once per fleet.",
                ) from error
            await asyncio.sleep(AGAIN_S)
            continue
        except nats.errors.TimeoutError:
            if after is None:
                raise
            await asyncio.sleep(AGAIN_S)
            continue
        try:
            delivered = 0
            while pending or follow:
                messages = await _fetch(consumer, BATCH if pending else 1)
                if messages is None:
                    break
                for message in messages:
                    place = message.metadata.sequence
                    if place.consumer != delivered + 1:
                        break
                    delivered, after = place.consumer, place.stream
                    pending = message.metadata.num_pending
                    yield message
                    if not follow and not pending:
                        return
                else:
                    continue
                break
            else:
                return
        finally:
            # A lost connection raises, and the consumer then ends by itself.
            with suppress(nats.errors.Error, nats.js.errors.Error):
                await consumer.unsubscribe()
        await asyncio.sleep(AGAIN_S)


def _config(start: Start, after: int | None) -> ConsumerConfig:
    """A consumer from a time on, or behind a message."""
    config = ConsumerConfig(
        deliver_policy=DeliverPolicy.ALL,
        ack_policy=AckPolicy.NONE,
        inactive_threshold=IDLE_S,
        mem_storage=True,
    )
    if after is not None:
        config.deliver_policy, config.opt_start_seq = DeliverPolicy.BY_START_SEQUENCE, after + 1
    elif start != "all":
        config.deliver_policy = DeliverPolicy.BY_START_TIME
        config.opt_start_time = datetime.fromtimestamp(start, UTC)
    return config


async def _fetch(consumer: JetStreamContext.PullSubscription, count: int) -> list[Msg] | None:
    """The next messages, none if none came in time; None if the consumer is lost."""
    try:
        return await consumer.fetch(count, timeout=WAIT_S)
    except nats.js.errors.APIError:
        return None
    except nats.errors.TimeoutError:
        try:
            await consumer.consumer_info()
        except nats.js.errors.NotFoundError:
            return None
        except (nats.errors.TimeoutError, nats.js.errors.ServiceUnavailableError):
            return []  # NATS is away for a while: the connection comes back by itself
        return []
