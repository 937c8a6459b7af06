"""The page over HTTP: static files, pictures as server-sent events, requests of one tenant. Read-only, no users.

On the controller's own loop, which aiohttp shares without touching signals. What stands against strangers' pages
(docs/security.md): a Host that somebody else's name could not be, no answer to other sites' scripts, and a policy
that lets the browser run and load nothing but these files. Called by `daemon.py`.
"""

import asyncio
import hashlib
import ipaddress
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import aclosing, asynccontextmanager
from importlib import resources
from typing import Final, NamedTuple

from aiohttp import web

from coxswain.control.errors import ControlError
from coxswain.control.logs import log
from coxswain.control.web.page import FullError, Page, Web

FILES: Final = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/rows.js": ("rows.js", "text/javascript"),
    "/table.js": ("table.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
SLOW_S: Final = 5.0
"""A watcher that takes no bytes for so long is dropped."""
RETRY_MS: Final = 2_000
"""After a break, browsers come back after this."""
MAX_ASKED: Final = 16
"""Questions for requests that wait for their answer at one time."""
BACKLOG: Final = 64

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Site:
    """The HTTP side of a page.

    Args:
        page: whose pictures.
        names: host names beside `localhost` and addresses under which browsers may come (a proxy's).
    """

    def __init__(self, page: Page, names: Collection[str] = ()) -> None:
        self._page = page
        self._names = {"localhost", *(name.lower() for name in names)}
        self._asked = 0
        self._files = {path: _File.read(*what) for path, what in FILES.items()}

    def application(self) -> web.Application:
        """All of it, for an aiohttp runner."""
        app = web.Application(middlewares=[self._guard], client_max_size=1)
        app.on_response_prepare.append(_with_headers)
        for path in self._files:
            app.router.add_get(path, self._file)
        app.router.add_get("/events", self._events)
        app.router.add_get("/requests", self._requests)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse names that are not ours (DNS rebinding), and what other sites' pages ask for."""
        if not self._ours(request.headers.get("Host", "")):
            raise web.HTTPMisdirectedRequest(
                text="This page is not served under that name: give it to the controller with --web-name.\n"
            )
        if request.path not in self._files and request.headers.get("Sec-Fetch-Site", "none") not in {
            "none",
            "same-origin",
        }:
            raise web.HTTPForbidden(text="For this page's own scripts only.\n")
        return await handler(request)

    def _ours(self, host: str) -> bool:
        """Whether a Host header is an address, or a name that is known: no stranger's name resolves to those."""
        bare = host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
        if bare.lower() in self._names:
            return True
        try:
            ipaddress.ip_address(bare)
        except ValueError:
            return False
        return True

    async def _file(self, request: web.Request) -> web.Response:
        file = self._files[request.path]
        headers = {"ETag": file.etag}
        if request.headers.get("If-None-Match") == file.etag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=file.body, content_type=file.type, charset="utf-8", headers=headers)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Pictures for as long as the browser listens and is quick enough to."""
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
            }
        )
        try:
            async with aclosing(self._page.follow()) as pictures:
                first = await anext(pictures, None)
                if first is None:
                    raise web.HTTPServiceUnavailable(text="The controller is stopping.\n")
                await response.prepare(request)
                await _send(response, b"retry: %d\ndata: %b\n\n" % (RETRY_MS, first))
                async for picture in pictures:
                    await _send(response, b"data: %b\n\n" % picture)
        except FullError as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n", headers={"Retry-After": "10"}) from error
        except (TimeoutError, ConnectionError):  # too slow, or gone
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _requests(self, request: web.Request) -> web.Response:
        """The requests of `?tenant=NAME` or `?worker=NAME`, as of the latest picture."""
        query = request.query
        if self._asked >= MAX_ASKED:
            raise web.HTTPServiceUnavailable(text="Too many ask at once.\n", headers={"Retry-After": "1"})
        self._asked += 1
        try:
            if "tenant" in query:
                body = await self._page.requests("tenant", query["tenant"])
            elif "worker" in query:
                body = await self._page.requests("worker", query["worker"])
            else:
                raise web.HTTPBadRequest(text="Ask for ?tenant=NAME or ?worker=NAME.\n")
        finally:
            self._asked -= 1
        if body is None:
            raise web.HTTPConflict(text="Nobody watches: listen to /events first.\n")
        return web.Response(body=body, content_type="application/json", headers={"Cache-Control": "no-store"})


class _File(NamedTuple):
    """A file of the page."""

    body: bytes
    type: str
    etag: str

    @classmethod
    def read(cls, name: str, type_: str) -> "_File":
        body = (resources.files(__package__) / "static" / name).read_bytes()
        return cls(body, type_, f'"{hashlib.sha256(body).hexdigest()[:16]}"')


async def _send(response: web.StreamResponse, data: bytes) -> None:
    """Write, and wait until what is not taken yet is little.

    Raises:
        TimeoutError: it stayed much for `SLOW_S`.
    """
    async with asyncio.timeout(SLOW_S):
        await response.write(data)


async def _with_headers(_: web.Request, response: web.StreamResponse) -> None:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers["Server"] = "coxswain"  # and nothing of versions


@asynccontextmanager
async def serving(page: Page, where: Web) -> AsyncGenerator[int, None]:
    """Serve a page for as long as the block runs; gives the port.

    Raises:
        ControlError: the address cannot be listened on.
    """
    runner = web.AppRunner(
        Site(page, where.names).application(),
        access_log=None,
        handle_signals=False,
        shutdown_timeout=1.0,
        keepalive_timeout=30.0,
        max_line_size=8_190,
    )
    await runner.setup()
    try:
        async with page.drawing():
            site = web.TCPSite(runner, where.host, where.port, backlog=BACKLOG)
            try:
                await site.start()
            except OSError as error:
                raise ControlError(
                    f"the page cannot be served on {where.host}:{where.port}: {error.strerror or error}"
                ) from error
            port: int = runner.addresses[0][1]
            log.info("page.serving", url=f"http://{_bracketed(where.host)}:{port}/")
            try:
                yield port
            finally:
                await page.let_go()
    finally:
        await runner.cleanup()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
