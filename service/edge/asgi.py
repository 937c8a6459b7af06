"""The HTTP edge as ASGI middleware: carries `core.py`'s decisions out, decides nothing itself.

Outermost in vLLM's server (see `identity.py`). It touches headers only; of bodies it sees only when they end.
Streaming is unaffected.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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


ENDS: Final = Refusal(503, "this server is shutting down: send new requests elsewhere", DRAINING_RETRY_S)


class EdgeMiddleware:
    """Authenticate, name and bound every request before vLLM sees it.

    Args:
        app: what comes next.
        edge: the decisions.
        keyring: the keys that `edge` uses, to be kept fresh, or None.
        listen: makes, from the server's app, what knows the engines' queues; None if nothing should.
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
        path = _routed(scope)
        if self._edge.is_open(scope.get("method", "GET"), path):
            return await self._probe(scope, path.rstrip("/"), receive, send)
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
        with self._underway(scope, admitted, passage) as headers:
            # A copy: servers log and reuse the scope that they made.
            scope = {**scope, "headers": headers}
            if passage is None or kind == "websocket":
                return await self._app(scope, receive, send)
            return await self._once_whole(scope, receive, send, passage)

    async def _probe(self, scope: Scope, path: str, receive: Receive, send: Send) -> None:
        """Answer what is open to all: vLLM does, but for what is ours of it."""
        if scope["type"] == "websocket":
            # No probe speaks it; vLLM's page of metrics would fail with a traceback, for anybody who asks.
            return await send({"type": "websocket.close", "code": 1008})
        if self._status is not None and scope["method"] == "GET" and path == edge_page.PATH:
            page = partial(self._status.metrics.page, tenants=self._edge.sees_tenants(scope["headers"]))
            return await edge_page.answer(self._app, scope, receive, send, page)
        if path == READY:
            if (refusal := self._unready(scope)) is not None:
                return await _refuse(send, refusal)
            asked = scope["path"].rstrip("/").removesuffix(READY) + HEALTH
            scope = {**scope, "path": asked, "raw_path": asked.encode()}
        return await self._app(scope, receive, send)

    @contextmanager
    def _underway(self, scope: Scope, admitted: Admitted, passage: Passage | None) -> Iterator[Headers]:
        """What goes along with a request while the app has it, and ends with it; the headers that vLLM is to see."""
        with ExitStack() as ends:
            headers = admitted.headers
            if passage is not None:
                ends.callback(passage.left)
            ends.callback(ticket.reset, ticket.set(admitted.ticket._replace(passage=passage)))
            traces = self._status.traces if self._status and passage and scope["type"] == "http" else None
            if traces is not None:
                span, headers = traces.begin(admitted)
                ends.callback(traces.end, admitted.ticket.request, span)
            yield headers

    async def _once_whole(self, scope: Scope, receive: Receive, send: Send, passage: Passage) -> None:
        """Have the app handle a request that needs a place in its class, which it is given once its body is there.

        If there is none any more, the app is told that the client is gone; what it answers to that nobody sees.
        """
        refusal: Refusal | None = None
        answers = False
        gone = {"type": "http.disconnect"}

        async def receive_asking() -> Message:
            nonlocal refusal
            if refusal is not None:
                return gone  # however often it asks: the client itself is there, waits, and says no more
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body") and not answers:
                refusal = passage.whole(time.monotonic())
            return message if refusal is None else gone

        async def send_unless_refused(message: Message) -> None:
            nonlocal answers
            if refusal is None:
                answers = True
                if message.get("status", 200) >= 400:
                    passage.failed()
                await send(message)

        try:
            await self._app(scope, receive_asking, send_unless_refused)
        except Exception:
            if refusal is None:
                passage.failed()  # the server outside of us answers 500
                raise
        if refusal is not None:
            self._count(refusal.status)
            await _refuse(send, refusal)

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


def _routed(scope: Scope) -> str:
    """The path by which Starlette finds a route: without the root path, which ends where a part of the path does."""
    path: str = scope["path"]
    rest = path.removeprefix(scope.get("root_path", ""))
    return rest if rest[:1] in ("", "/") else path


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
