"""Read the event log: a JetStream consumer from a time on, in order and without gaps. Called by `client` only.

An ordered push consumer (ADR-17) of our own: nats-py's begins its bookkeeping after the first messages may have come,
then takes them for a gap and asks the server for something that it refuses, so that a reader of a busy fleet's log
stood still for ever. Here status messages are read from the same queue as all others, and a consumer that missed a
message or is lost (a restarted server) is made again behind the last message that was given. Push, not pull: users
may be allowed the one without the other (`schemas/permissions.py` says why).
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final, Literal

import nats.errors
import nats.js.errors
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo, DeliverPolicy

from coxswain.control.errors import NotSetUpError, UnreachableError

IDLE_S: Final = 60.0
"""The server forgets the consumer of a reader that vanished after this long."""
HEARTBEAT_S: Final = 2.0
LOST_S: Final = 3 * HEARTBEAT_S
"""A consumer that said nothing for so long is made again."""
AGAIN_S: Final = 0.5
"""Pause before that is tried again."""
NO_MAJORITY: Final = 10_008
"""By which JetStream says that its cluster cannot do it now."""
STALLED: Final = "Nats-Consumer-Stalled"

Start = float | Literal["all"]


async def replay(
    nc: Nats, stream: str, subject: str, start: Start, *, follow: bool
) -> AsyncGenerator[Msg, None]:
    """Stored messages of `subject`, oldest first, then new ones unless `follow` is False.

    Args:
        nc: an open connection.
        stream: the fleet's event stream.
        subject: which events.
        start: Unix seconds, or "all" for everything kept.
        follow: go on after the end of the log.

    Raises:
        NotSetUpError: if the stream does not exist or JetStream is off.
        UnreachableError: if JetStream's cluster cannot serve it now.
    """
    js, after = nc.jetstream(), None
    while True:
        inbox = await nc.subscribe(nc.new_inbox())
        info = None
        try:
            info = await js.add_consumer(stream, config=_config(inbox.subject, subject, start, after))
            if not follow and not info.num_pending and not (info.delivered and info.delivered.consumer_seq):
                return
            async for message in _in_order(nc, inbox):
                metadata = message.metadata
                after = metadata.sequence.stream
                yield message
                if not follow and not metadata.num_pending:
                    return
        except (nats.js.errors.NotFoundError, nats.js.errors.ServiceUnavailableError) as error:
            if after is None and error.err_code == NO_MAJORITY:
                raise UnreachableError(
                    f"JetStream cannot read {stream} now, its cluster elects or has no majority: {error.description}"
                ) from error
            if after is None:
                raise NotSetUpError(
                    f"the event log {stream} is missing (or JetStream is off): run `cox init` once per fleet.",
                ) from error
        except nats.errors.TimeoutError:
            if after is None:
                raise
        finally:
            await _end(nc, stream, inbox, info)
        await asyncio.sleep(AGAIN_S)


def _config(inbox: str, subject: str, start: Start, after: int | None) -> ConsumerConfig:
    """A consumer from a time on, or behind a message."""
    config = ConsumerConfig(
        deliver_subject=inbox,
        filter_subject=subject,
        deliver_policy=DeliverPolicy.ALL,
        ack_policy=AckPolicy.NONE,
        max_deliver=1,
        flow_control=True,
        idle_heartbeat=HEARTBEAT_S,
        inactive_threshold=IDLE_S,
        num_replicas=1,
        mem_storage=True,
    )
    if after is not None:
        config.deliver_policy, config.opt_start_seq = DeliverPolicy.BY_START_SEQUENCE, after + 1
    elif start != "all":
        config.deliver_policy = DeliverPolicy.BY_START_TIME
        config.opt_start_time = datetime.fromtimestamp(start, UTC)
    return config


async def _in_order(nc: Nats, inbox: Subscription) -> AsyncGenerator[Msg, None]:
    """What the consumer delivers; ends when it missed a message or is lost."""
    delivered = 0
    while True:
        try:
            message = await inbox.next_msg(timeout=LOST_S)
        except nats.errors.TimeoutError:
            return
        headers = message.headers or {}
        if headers.get("Status") == "100":
            # Everything before it in the queue was taken: the server may send more.
            answer = message.reply or headers.get(STALLED)
            if answer:
                await nc.publish(answer)
            continue
        if "Status" in headers or message.metadata.sequence.consumer != delivered + 1:
            return
        delivered += 1
        yield message


async def _end(nc: Nats, stream: str, inbox: Subscription, info: ConsumerInfo | None) -> None:
    """Leave nothing behind. A lost connection raises, and the consumer then ends by itself."""
    with suppress(nats.errors.Error):
        await inbox.unsubscribe()
        if info is not None and info.name:
            await nc.jetstream().delete_consumer(stream, info.name)
