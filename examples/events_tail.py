"""Say when a tenant's requests end: python examples/events_tail.py TENANT. Needs nats-py and nothing of Coxswain."""

import asyncio
import json
import os
import sys

import nats


async def main(tenant: str) -> None:
    """The kind is in the subject, so NATS sends only that; the tenant is in the payload."""
    nc = await nats.connect(os.environ.get("COX_NATS_URL", "nats://127.0.0.1:4222"))
    finished = await nc.subscribe(f"cox.v1.{os.environ.get('COX_FLEET', 'main')}.event.*.finished")
    async for message in finished.messages:
        event = json.loads(message.data)
        if event["tenant"] == tenant:
            print(event["request"], event["reason"], f"queued {event['queued_s']:.3f} s", flush=True)


asyncio.run(main(*sys.argv[1:]))
