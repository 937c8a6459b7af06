"""What people see: `docs/screens.md` and the page's picture, from a fleet that runs. `python -m scripts.screens`.

A real nats-server, two workers on the simulated device, two controllers; `cox` in a real terminal (tmux) of the given
size, the page in a real browser (`make browser`). Times and ids differ from run to run, so nothing compares what comes
out: look at it before it is committed.
"""

import asyncio
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple

import httpx
from playwright.async_api import Error, ViewportSize, async_playwright, expect
from playwright.async_api import Page as Tab

from coxswain.control.tables import LEASE_TTL_S
from tests.faults.fleet import FLEET, TENANT_HEADER, Fleet, Worker, running
from tests.support.nats import free_port
from tests.support.serving import Stream
from tests.support.web import browser_path

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
PAGE: Final = DOCS / "screens.md"
PICTURE: Final = DOCS / "images" / "page.png"
VIEW: Final = ViewportSize(width=1280, height=680)
"""Of the picture, in pixels: all of the page."""
WITHIN_S: Final = 60.0
SEEN_S: Final = 10.0
"""So long `cox top` looks before it is looked at: rates and waits are of what it saw."""
NUMBER: Final = itertools.count()
"""Of terminals: a tmux that is told to end takes its time."""
SETUP: Final = (
    "classes set chat --position -10 --cut-in slots --slo 2s",
    "classes set batch --position 10",
    "tenants set acme --weight 2 --class chat",
    "tenants set globex --weight 1",
    "tenants set night --class batch",
)
HEAD: Final = """\
# Screens

What `cox` shows of a small fleet: two workers on the [simulated device](simulated.md) that run three requests at a
time, and two controllers with `vtc`. `acme` (weight 2) chats, in a class that may cut in; `globex` asks for longer
answers; `night` is a batch. Recorded from a real terminal by `python -m scripts.screens`, which needs tmux.
"""


class Screen(NamedTuple):
    """One of the page."""

    title: str
    about: str
    command: str
    text: str

    def markdown(self) -> str:
        """As a section."""
        return f"## {self.title}\n\n{self.about}\n\n```text\n$ cox {self.command}\n{self.text}\n```\n"


class Terminal:
    """A terminal of so many columns and rows that runs one command of `cox`, until `close`."""

    def __init__(self, command: str, nats: str, columns: int, rows: int) -> None:
        self._tmux = [_program("tmux"), "-L", f"cox-screens-{os.getpid()}-{next(NUMBER)}", "-f", "/dev/null"]
        code = "from coxswain.control.cli import main; main()"
        words = shlex.join([sys.executable, "-c", code, *shlex.split(command)])
        env = {"COX_NATS_URL": nats, "COX_FLEET": FLEET, "TERM": "tmux-256color", "LC_ALL": "C.UTF-8"}
        given = [word for name, value in env.items() for word in ("-e", f"{name}={value}")]
        self._run("-u", "new-session", "-d", *given, "-x", str(columns), "-y", str(rows), f"{words}; cat")

    def _run(self, *words: str) -> str:
        return subprocess.run([*self._tmux, *words], check=True, capture_output=True, text=True).stdout

    async def until(self, *wanted: str) -> str:
        """What it shows, as soon as all of these words are on it."""
        shown = ""
        deadline = time.monotonic() + WITHIN_S
        while not shown or any(words not in shown for words in wanted):
            if time.monotonic() > deadline:
                raise SystemExit(f"this never had all of {wanted}:\n{shown}")
            await asyncio.sleep(0.3)
            shown = "\n".join(line.rstrip() for line in self._run("capture-pane", "-p", "-J").splitlines())
        return shown.strip("\n")

    def press(self, *keys: str) -> None:
        """Press keys, as tmux calls them."""
        self._run("send-keys", *keys)

    def close(self) -> None:
        """End it."""
        self._run("kill-server")


class Clients:
    """Who asks a fleet; all leave at the end."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._tasks: list[asyncio.Task[None]] = []

    def ask(self, worker: Worker, tenant: str, tokens: int) -> Stream:
        """One answer of so many tokens."""
        body = {
            "model": "tiny", "prompt": "The river " * 8, "max_tokens": tokens, "ignore_eos": True, "stream": True,
            "return_token_ids": True,
        }  # fmt: skip
        http = httpx.AsyncClient(base_url=worker.http, timeout=WITHIN_S, trust_env=False)
        stream = Stream(http, None, body, {TENANT_HEADER: tenant})
        self._tasks.append(stream.task)
        return stream

    def keep_asking(self, tenant: str, at_once: int, tokens: int, pause_s: float = 0.0) -> None:
        """So many at once on every worker, again and again."""

        async def client(worker: Worker) -> None:
            while True:
                await self.ask(worker, tenant, tokens).end()
                await asyncio.sleep(pause_s)

        workers = self._fleet.workers.values()
        self._tasks += [asyncio.create_task(client(worker)) for worker in workers for _ in range(at_once)]

    async def close(self) -> None:
        """End all that is asked."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def screens(fleet: Fleet, tab: Tab) -> AsyncIterator[Screen]:
    """One after the other, while the fleet is at work; in the middle, the picture of the page in `tab`."""
    nats = fleet.nats.url

    async def show(title: str, about: str, command: str, wanted: str) -> Screen:
        terminal = Terminal(command, nats, 120, 50)
        try:
            return Screen(title, about, command, await terminal.until(wanted))
        finally:
            terminal.close()

    async def top(about: str, columns: int, rows: int, *keys: str) -> Screen:
        """While somebody holds a request."""
        terminal = Terminal("top", nats, columns, rows)
        try:
            await terminal.until("w1 ", "w2 ", "night ")
            await asyncio.sleep(SEEN_S)
            for key in keys:
                terminal.press(key)
            async with held():
                return Screen(f"`cox top`, {columns}×{rows}", about, "top", await terminal.until())
        finally:
            terminal.close()

    @asynccontextmanager
    async def held() -> AsyncIterator[None]:
        """An operator holds a request meanwhile, and what shows it has had time to."""
        stream = clients.ask(worker, "globex", 200)
        await stream.until(1)
        await _cox(nats, f"hold {stream.request} --lease 10m")
        await asyncio.sleep(1)
        yield
        await _cox(nats, f"continue {stream.request}")

    for words in SETUP:
        await _cox(nats, words)
    clients = Clients(fleet)
    worker = fleet.workers["w1"]
    try:
        clients.keep_asking("night", 5, 400)
        clients.keep_asking("globex", 2, 150)
        await asyncio.sleep(5)
        clients.keep_asking("acme", 1, 30, pause_s=1.5)
        victim = clients.ask(worker, "night", 120)
        about = "Everything fits the smallest terminal: here with the requests of one tenant."
        yield await top(about, 80, 24, "Up")
        about = "Classes, models and costs stand beside it; `a` lists the requests of all tenants."
        yield await top(about, 200, 60, "a")
        async with held():
            await tab.screenshot(path=PICTURE)
        await victim.end()
        about = "A request of the batch: whom it waited for, who cut in on it, and what it cost."
        yield await show(
            "`cox explain REQUEST`", about, f"explain {victim.request}", "input tokens to compute"
        )
        about = "Why a tenant is slow."
        yield await show("`cox explain --tenant`", about, "explain --tenant night --since 1m", "night")
        yield await show("`cox doctor`", "A fleet that is well.", "doctor", "all is well")
    finally:
        await clients.close()
    for leader in fleet.leaders.values():
        leader.kill()
    await fleet.cox.js.delete_stream(fleet.cox.subjects.stream)
    await asyncio.sleep(LEASE_TTL_S + 5)  # until the lease has ended, and workers have given the leader up
    about = "The same after both controllers were killed and the event log was removed."
    yield await show("`cox doctor`, when something is wrong", about, "doctor", "failure")


@asynccontextmanager
async def small_fleet() -> AsyncIterator[Fleet]:
    """That of the fault suite, in a folder that goes away."""
    with tempfile.TemporaryDirectory() as folder:
        async with running(Path(folder)) as fleet:
            yield fleet


@asynccontextmanager
async def page_of(fleet: Fleet) -> AsyncIterator[Tab]:
    """The page of the controller that leads, in a browser: what it draws over time begins now."""
    first, second = fleet.leaders.values()
    for leader in (first, second):
        leader.kill()
    port = free_port()
    first.arguments = ("--web", str(port))
    first.start()
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=browser_path())
        tab = await browser.new_page(viewport=VIEW, color_scheme="dark")
        deadline = time.monotonic() + WITHIN_S
        while True:
            try:
                await tab.goto(f"http://127.0.0.1:{port}/")
                break
            except Error:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.2)
        await expect(tab.locator("#controller")).to_contain_text("leads", timeout=WITHIN_S * 1000)
        second.start()
        yield tab
        await browser.close()


async def write() -> None:
    """Make the page."""
    async with small_fleet() as fleet, page_of(fleet) as tab:
        sections = [screen.markdown() async for screen in screens(fleet, tab)]
    PAGE.write_text("\n".join([HEAD, *sections]))


async def _cox(nats: str, words: str) -> None:
    """Run a command; beside this loop, for the fleet's proxy runs in it."""
    env = {**os.environ, "COX_NATS_URL": nats, "COX_FLEET": FLEET}
    code = "from coxswain.control.cli import main; main()"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *words.split(), env=env, stdout=subprocess.DEVNULL
    )
    if await process.wait():
        raise SystemExit(f"cox {words} failed")


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is not installed")
    return found


if __name__ == "__main__":
    asyncio.run(write())
