"""Messages that nats-server passes on, to a subject with this beginning, and nats-py cannot read."""

from coxswain.common.nats_client import NatsClient

LINES = {
    "reply that is no UTF-8": b"PUB %s \xff 0\r\n\r\n",
    "reply with a return": b"PUB %s a\rb 0\r\n\r\n",
    "reply with a vertical tab": b"PUB %s a\x0bb 0\r\n\r\n",
    "reply of 4 KB with a form feed": b"PUB %s " + 3_900 * b"a" + b"\x0cb 0\r\n\r\n",
    "reply with a zero": b"PUB %s a\0b 0\r\n\r\n",
    "subject that is no UTF-8": b"PUB %s\xff in 0\r\n\r\n",
    "subject with a vertical tab": b"PUB %s\x0bb in 0\r\n\r\n",
    "subject that ends with a return": b"PUB %s\r in 0\r\n\r\n",
    "headers that are none": b"HPUB %s 4 4\r\nabcd\r\n",
    "headers without an end": b"HPUB %s 8 8\r\nNATS/1.0\r\n",
    "status that is no number": b"HPUB %s 16 16\r\nNATS/1.0 \xff00\r\n\r\n\r\n",
}


async def send(client: NatsClient, line: bytes) -> None:
    """Send bytes as they are, and wait until the server has passed them on."""
    await client._send_command(line)
    await client.flush()
    await client.flush()
