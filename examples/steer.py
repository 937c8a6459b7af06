"""Hold a request for three seconds, then continue it: python examples/steer.py WORKER REQUEST."""

import asyncio
import json
import os
import sys
import time
import uuid

import nats


async def main(worker: str, request: str) -> None:
    """Send two commands to the worker that has the request."""
    nc = await nats.connect(os.environ.get("COX_NATS_URL", "nats://127.0.0.1:4222"))
    for verb, fields, wait_s in (("preempt", {"lease_s": 60}, 3), ("continue", {}, 0)):
        subject = f"cox.v1.{os.environ.get('COX_FLEET', 'main')}.cmd.operator.{worker}.{verb}"
        command = {"id": uuid.uuid4().hex, "expires_at": time.time() + 10, "targets": {"requests": [request]}}
        answer = await nc.request(subject, json.dumps(command | fields).encode(), timeout=2)
        print(verb, answer.data.decode())
        await asyncio.sleep(wait_s)
    await nc.close()


asyncio.run(main(*sys.argv[1:]))
