"""Our families behind vLLM's own on its `/metrics`: one page, one port. ASGI only; called by `asgi.py`.

vLLM's page comes from a registry that it keeps to itself where it runs several API server processes, so ours is put
behind what it answers.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PATH: Final = "/metrics"
_NEGOTIATION: Final = frozenset({b"accept", b"accept-encoding"})
"""Left out of what vLLM sees: two texts of one format, neither compressed, make one page."""
_TEXT: Final = b"text/plain"


async def answer(
    app: App,
    scope: Scope,
    receive: Receive,
    send: Send,
    page: Callable[[], Awaitable[bytes]],
) -> None:
    """Answer with the app's page and ours; with the app's alone if it is no page of metrics."""
    head: Message = {}
    body = bytearray()

    async def collect(message: Message) -> None:
        nonlocal head
        if message["type"] == "http.response.start":
            head = message
        elif message["type"] == "http.response.body":
            body.extend(message.get("body", b""))
        else:
            await send(message)

    headers = [header for header in scope["headers"] if header[0] not in _NEGOTIATION]
    await app({**scope, "headers": headers}, receive, collect)
    if not head:
        return
    given = {name.lower(): value for name, value in head.get("headers", ())}
    if head["status"] == 200 and given.get(b"content-type", b"").startswith(_TEXT):
        body.extend(await page())
        kept = [header for header in head["headers"] if header[0].lower() != b"content-length"]
        head = {**head, "headers": [*kept, (b"content-length", b"%d" % len(body))]}
    await send(head)
    await send({"type": "http.response.body", "body": bytes(body)})
