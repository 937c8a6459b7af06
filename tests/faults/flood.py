"""Publish commands or questions as fast as told, in a process of its own: `flood.py PORT SUBJECT KIND RATE SECONDS`.

Speaks NATS by hand: a client that waits for anything would not be a flood. Prints how many it sent.
"""

import json
import os
import socket
import sys
import time

EVERY_S = 0.01


def payload(kind: str, number: int) -> bytes:
    """One command: good, no command at all, or a good one of nearly a megabyte; or a question, which says nothing."""
    if kind == "question":
        return b""
    if kind == "malformed":
        return os.urandom(64)
    targets = {"requests": ["x" * 90] * 10_000} if kind == "huge" else {"tenants": ["nobody"]}
    return json.dumps({"id": f"flood-{number}", "targets": targets, "priority": 1}).encode()


def main() -> None:
    """Send."""
    port, subject, kind, rate, seconds = sys.argv[1:]
    server = socket.create_connection(("127.0.0.1", int(port)))
    server.sendall(b'CONNECT {"verbose":false}\r\n')
    began, sent, all_of_it = time.monotonic(), 0, int(int(rate) * float(seconds))
    while sent < all_of_it:  # on a machine that cannot do so much it takes longer
        due = min(all_of_it, int((time.monotonic() - began) * int(rate)))
        if sent == due:
            time.sleep(EVERY_S)
            continue
        body = payload(kind, sent) if kind == "huge" else b""
        messages = []
        for number in range(sent, min(due, sent + 1_000)):
            body = payload(kind, number) if kind != "huge" else body
            messages.append(
                b"PUB %s _INBOX.flood.%d %d\r\n%s\r\n" % (subject.encode(), number, len(body), body)
            )
        server.sendall(b"".join(messages))
        sent += len(messages)
    sys.stdout.write(f"{sent}\n")


if __name__ == "__main__":
    main()
