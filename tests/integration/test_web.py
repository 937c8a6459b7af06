"""The page over real HTTP: what is served, to whom, and what becomes of it when NATS or the controller ends."""

import asyncio
import json
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest

from coxswain.control.errors import ControlError
from coxswain.control.web import page as pages
from coxswain.control.web import site as sites
from coxswain.control.web.site import FILES
from tests.support.frames import frame, request, row
from tests.support.nats import NatsServer
from tests.support.waiting import eventually
from tests.support.web import Served
from tests.support.working import FLEET, working

HOSTILE = '</script><img src=x onerror="alert(1)">\n\ndata: {}'
BIG = tuple(request(f"r{number}", "a") for number in range(20_000))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture ten times a second."""
    monkeypatch.setattr(pages, "EVERY_S", 0.1)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """A page without a controller."""
    async with Served(names=("cox.example",)).up() as served:
        yield served


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that changes nothing by itself."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        yield session


async def shown(
    response: aiohttp.ClientResponse, true: Callable[[Any], Any], meanwhile: Callable[[], None] = lambda: None
) -> Any:
    """Read the stream until a picture is as wanted."""
    meanwhile()
    async for line in response.content:
        if line.startswith(b"data: "):
            scene = json.loads(line[6:])
            if true(scene):
                return scene
            meanwhile()
    raise AssertionError("the stream ended before")


async def test_a_browser_may_run_and_load_nothing_but_the_pages_own_files(
    served: Served, http: aiohttp.ClientSession
) -> None:
    """Every answer forbids scripts, styles and frames from elsewhere; no file has code in its markup."""
    for path, (name, type_) in FILES.items():
        async with http.get(served.url.rstrip("/") + path) as response:
            assert (response.status, response.content_type) == (200, type_)
            policy = response.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert "aiohttp" not in response.headers["Server"]
            body = await response.text()
        if name == "page.html":
            assert not re.search(r"<script[^>]*>[^<]|<style|\son\w+=|\sstyle=", body)
        assert not re.search(r"(?:src|href|url\(|from|import)[\s=(\"']+(?:https?:)?//", body), name
    async with http.get(served.url + "nothing") as response:
        assert response.status == 404
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]


async def test_an_unchanged_file_is_not_sent_again(served: Served, http: aiohttp.ClientSession) -> None:
    """A reload costs a few headers."""
    async with http.get(served.url) as response:
        etag = response.headers["ETag"]
    async with http.get(served.url, headers={"If-None-Match": etag}) as response:
        assert (response.status, await response.read()) == (304, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_the_page_is_read_only(served: Served, http: aiohttp.ClientSession, method: str) -> None:
    """There is nothing that anybody could do through it."""
    for path in (*FILES, "/events", "/requests"):
        async with http.request(method, served.url.rstrip("/") + path) as response:
            assert response.status == 405


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("10.1.2.3", 200),
        ("cox.example", 200),
        ("Cox.Example:443", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("cox.example.", 421),
        ("[evil]", 421),
        ("", 421),
    ],
)
async def test_a_name_that_is_not_ours_gets_nothing(
    served: Served, http: aiohttp.ClientSession, host: str, status: int
) -> None:
    """A stranger's name that was made to resolve to this address (DNS rebinding) is refused."""
    for path in ("", "requests?tenant=a" if status != 200 else ""):
        async with http.get(served.url + path, headers={"Host": host}) as response:
            assert response.status == status


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_other_sites_pages_get_no_data(served: Served, http: aiohttp.ClientSession, site: str) -> None:
    """They may link to the page; they may neither read the stream nor take up its places."""
    headers = {"Sec-Fetch-Site": site, "Origin": "https://evil.example"}
    for path, status in (("", 200), ("events", 403), ("requests?tenant=a", 403)):
        async with http.get(served.url + path, headers=headers) as response:
            assert response.status == status
            assert "Access-Control-Allow-Origin" not in response.headers


async def test_a_hostile_name_stays_a_string_in_the_stream(
    served: Served, http: aiohttp.ClientSession
) -> None:
    """Line ends and markup in a tenant's name neither end an event nor begin another."""
    full = frame("w1", "01A", 1, row(HOSTILE, queued=1), requests=(request("r1", HOSTILE),))
    async with http.get(served.url + "events") as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.headers["Cache-Control"] == "no-store"
        scene = await shown(response, lambda scene: scene["picture"]["tenants"], lambda: served.hear(full))
        assert scene["picture"]["tenants"][0]["tenant"] == HOSTILE
        async with http.get(served.url + "requests", params={"tenant": HOSTILE}) as answer:
            assert answer.content_type == "application/json"
            assert (await answer.json())["rows"][0]["status"]["tenant"] == HOSTILE


async def test_questions_for_requests_need_a_watcher_and_a_whose(
    served: Served, http: aiohttp.ClientSession
) -> None:
    """Without a picture there is nothing to ask; without a name neither."""
    async with http.get(served.url + "requests?tenant=a") as answer:
        assert answer.status == 409
    async with http.get(served.url + "requests") as answer:
        assert answer.status == 400


async def test_watchers_are_bounded(
    served: Served, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One too many is told to come later, and may once another has gone."""
    monkeypatch.setattr(pages, "MAX_WATCHERS", 1)
    async with http.get(served.url + "events") as first:
        await shown(first, lambda _: True)
        async with http.get(served.url + "events") as second:
            assert (second.status, second.headers["Retry-After"]) == (503, "10")
    await eventually(lambda: not served.page.watchers)
    async with http.get(served.url + "events") as third:
        assert third.status == 200


async def test_a_watcher_that_does_not_read_is_dropped(
    served: Served, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place is given up; nothing piles up for it, and who reads goes on seeing."""
    monkeypatch.setattr(sites, "SLOW_S", 0.5)
    rows = [row(f"tenant-{number}-{'x' * 100}", queued=1) for number in range(400)]
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", served.port))
        deaf.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with http.get(served.url + "events") as response:
            await shown(response, lambda _: served.page.watchers == 2)
            served.hear(frame("w1", "01A", 1, *rows))
            async with asyncio.timeout(30):
                await shown(response, lambda _: served.page.watchers == 1)


async def test_an_address_in_use_is_told_in_words(served: Served) -> None:
    """Not a traceback."""
    with pytest.raises(ControlError, match=rf"127\.0\.0\.1:{served.port}: .*in use"):
        async with Served(port=served.port).up():
            pass


@pytest.mark.nats
async def test_a_controller_serves_what_it_sees_and_ends_while_it_is_watched(
    nats_server: NatsServer, http: aiohttp.ClientSession
) -> None:
    """From a worker's frames to the page; that NATS is lost is said, and SIGTERM is not held up by a watcher."""
    command = [
        sys.executable,
        "-c",
        "from coxswain.control.cli import main; main()",
        "--nats",
        nats_server.url,
    ]
    options = ["--fleet", FLEET, "--json", "controller", "--policy", "fcfs", "--name", "ctl", "--web", "0"]
    process = await asyncio.create_subprocess_exec(*command, "init", "--fleet", FLEET)
    assert await process.wait() == 0
    process = await asyncio.create_subprocess_exec(*command, *options, stderr=asyncio.subprocess.PIPE)
    try:
        assert process.stderr is not None
        async with asyncio.timeout(60):
            async for line in process.stderr:
                if b'"event": "page.serving"' in line:
                    break
        url = json.loads(line)["url"]
        assert url.startswith("http://127.0.0.1:")
        async with http.get(url + "events") as response:
            async with working(nats_server) as worker:
                worker.arrive("acme", times=3)
                scene = await shown(response, lambda scene: scene["sent"] and scene["picture"]["leader"])
            assert [each["worker"] for each in scene["picture"]["workers"]] == ["w1"]
            assert scene["controller"] == {"name": "ctl", "leading": True, "reaches_nats": True}
            assert scene["sent"][0]["worker"] == "w1"
            nats_server.kill()
            await shown(response, lambda scene: not scene["controller"]["reaches_nats"])
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(15):
                await response.content.read()  # to its end
        assert await asyncio.wait_for(process.wait(), 15) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
