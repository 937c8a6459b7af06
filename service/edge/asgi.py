"""The HTTP edge as ASGI middleware: carries `core.py`'s decisions out, decides nothing itself.

Outermost in vLLM's server (see `identity.py`). It touches headers only, never bodies, so streaming is
unaffected.
"""

import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any, Final

import msgspec
from ulid import ULID

from coxswain.service.edge import page as edge_page
from coxswain.service.edge.caps import DRAINING_RETRY_S, DRAINS, Passage
from coxswain.service.edge.core import (
    CLIENT_ID_HEADER,
    HEALTH,
    ID_HEADER,
    READY,
    Admitted,
    Edge,
    Headers,
    Refusal,
    RefusedRequestError,
    Ticket,
    client_id,
)
from coxswain.service.edge.page import App, Message, Receive, Scope, Send
from coxswain.service.edge.status import EdgeStatus
from coxswain.service.keys import Keyring

ticket: Final[ContextVar[Ticket | None]] = ContextVar("coxswain_ticket", default=None)
"""The request being handled; tasks that it starts (streams, background responses) inherit it."""


ENDS: Final = Refusal(
    503,
    "ServiceUnavailableError",
    "this server is shutting down: send new requests elsewhere",
    DRAINING_RETRY_S,
)


class EdgeMiddleware:
    """Authenticate, name and bound every request before vLLM sees it.

    Args:
        app: what comes next.
        edge: the decisions.
        keyring: the keys that `edge` uses, to be kept fresh, or None.
        listen: makes what knows of the engines' queues, from the server's app, or None if nobody is to know.
        count: told the status of every refusal.
        ends: whether the server's app was told to end.
    """

    def __init__(
        self,
        app: App,
        edge: Edge,
        keyring: Keyring | None = None,
        listen: Callable[[Any], EdgeStatus] | None = None,
        count: Callable[[int], None] = lambda _: None,
        ends: Callable[[Any], bool] = lambda _app: False,
    ) -> None:
        self._app = app
        self._edge = edge
        self._keyring = keyring
        self._listen = listen
        self._count = count
        self._ends = ends
        self._status: EdgeStatus | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection; anything but HTTP and websockets passes untouched."""
        kind = scope["type"]
        if self._listen is not None and self._status is None:
            self._status = self._listen(scope.get("app"))
            self._status.start()
        if kind == "lifespan" and self._status is not None:
            try:
                return await self._app(scope, receive, send)
            finally:
                await self._status.stop()
        if kind not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        if self._keyring is not None:
            self._keyring.refresh(time.monotonic())
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._edge.is_open(scope.get("method", "GET"), path):
            if (
                self._status is not None
                and scope.get("method") == "GET"
                and path.rstrip("/") == edge_page.PATH
            ):
                page = partial(self._status.metrics.page, tenants=self._edge.sees_tenants(scope["headers"]))
                return await edge_page.answer(self._app, scope, receive, send, page)
            if kind == "http" and path.rstrip("/") == READY:
                if (refusal := self._unready(scope)) is not None:
                    return await _refuse(send, refusal)
                asked = scope["path"].rstrip("/").removesuffix(READY) + HEALTH
                scope = {**scope, "path": asked, "raw_path": asked.encode()}
            return await self._app(scope, receive, send)
        ulid = str(ULID())
        own_id = client_id(scope["headers"])
        peer = scope.get("client")
        try:
            admitted = self._edge.admit(scope["headers"], path, peer[0] if peer else None, ulid)
        except RefusedRequestError as error:
            self._count(error.refusal.status)
            if kind == "websocket":
                # Closing before accepting is how ASGI refuses a websocket: the client sees 403.
                return await send({"type": "websocket.close", "code": 1008})
            return await _refuse(_naming(send, self._edge.anonymous_id(ulid), own_id), error.refusal)
        send = _naming(send, admitted.ticket.request, own_id)
        passage = self._enter(scope, path, admitted)
        if isinstance(passage, Refusal):
            self._count(passage.status)
            if kind == "websocket":
                return await send({"type": "websocket.close", "code": 1013})
            return await _refuse(send, passage)
        token = ticket.set(admitted.ticket._replace(passage=passage))
        traces = self._status.traces if self._status and passage and kind == "http" else None
        headers, span = admitted.headers, None
        if traces is not None:
            span, headers = traces.begin(admitted)
        try:
            # A copy: servers log and reuse the scope that they made.
            return await self._app({**scope, "headers": headers}, receive, send)
        finally:
            ticket.reset(token)
            if traces is not None:
                traces.end(admitted.ticket.request, span)
            if passage is not None:
                passage.left()

    def _unready(self, scope: Scope) -> Refusal | None:
        """Why no new request should come here, whoever asks."""
        if self._ends(scope.get("app")):
            return ENDS
        return DRAINS if self._status is not None and self._status.caps.draining else None

    def _enter(self, scope: Scope, path: str, admitted: Admitted) -> Passage | Refusal | None:
        """Ask the counts about what an engine would have to do; None if they need not know of it."""
        websocket = scope["type"] == "websocket"
        if not (websocket or self._edge.asks_engine(scope["method"], path)):
            return None
        if self._ends(scope.get("app")):
            return ENDS
        if self._status is None:
            return None
        passage = self._status.caps.enter(admitted.tenant, admitted.class_, time.monotonic())
        if websocket and isinstance(passage, Passage):
            passage.left()  # it may stay open for hours without asking for anything
        return passage


def _naming(send: Send, request: str, own_id: bytes | None) -> Send:
    """Add the public id, and the client's own, to the head of the response."""
    added: Headers = [(ID_HEADER, request.encode())]
    if own_id is not None:
        added.append((CLIENT_ID_HEADER, own_id))

    async def send_named(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [header for header in message.get("headers", ()) if header[0].lower() != ID_HEADER]
            message = {**message, "headers": kept + added}
        await send(message)

    return send_named


async def _refuse(send: Send, refusal: Refusal) -> None:
    error = {"message": refusal.message, "type": refusal.kind, "param": None, "code": refusal.status}
    body = msgspec.json.encode({"error": error})
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refusal.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % refusal.retry_after_s))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
