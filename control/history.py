"""Read the event log: an ordered JetStream consumer from a time on. Called by `client` only."""

from collections.abc import AsyncGenerator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Literal

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig, DeliverPolicy

from coxswain.control.errors import NotSetUpError

IDLE_S = 60.0
"""The server forgets the consumer of a reader that vanished after this long."""


async def replay(
    js: JetStreamContext,
    stream: str,
    subject: str,
    start: float | Literal["all"],
    *,
    follow: bool,
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
    config = ConsumerConfig(deliver_policy=DeliverPolicy.ALL, inactive_threshold=IDLE_S)
    if start != "all":
        config.deliver_policy = DeliverPolicy.BY_START_TIME
        config.opt_start_time = datetime.fromtimestamp(start, UTC)
    try:
        subscription = await js.subscribe(subject, stream=stream, config=config, ordered_consumer=True)
        waiting = (await subscription.consumer_info()).num_pending or 0
    except (nats.js.errors.NotFoundError, nats.js.errors.ServiceUnavailableError) as error:
        raise NotSetUpError(
            f"the event log {stream} is missing (or JetStream is off): run `cox init` once per fleet.",
        ) from error
    try:
        if not follow and not waiting and not subscription.pending_msgs:
            return
        async for message in subscription.messages:
            yield message
            if not follow and not message.metadata.num_pending:
                return
    finally:
        # A lost connection raises, and the consumer then ends by itself.
        with suppress(nats.errors.Error):
            await subscription.unsubscribe()
