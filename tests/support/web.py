"""What the page is tested with: frames as workers publish them, a served page, a browser."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from coxswain.control.web.board import Standing
from coxswain.control.web.page import Page, Web
from coxswain.control.web.site import serving
from coxswain.schemas.status import Frame

BROWSERS = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome-stable",
    "google-chrome",
)


class Served:
    """A page with no controller behind it: the test says what is heard.

    Args:
        port: 0 for any.
        names: host names under which it may be asked for.
    """

    def __init__(self, port: int = 0, names: tuple[str, ...] = ()) -> None:
        self.port = port
        self.names = names
        self.reaches_nats = True
        self.frames: dict[str, Frame] = {}
        """What workers say again and again while the page is up, by their names."""
        self.page = Page("main", self._standing)

    def _standing(self) -> Standing:
        return Standing(name="ctl-1", leading=True, reaches_nats=self.reaches_nats)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.port}/"

    def hear(self, *frames: Frame) -> None:
        """Frames come, each on its worker's subject, from now on until the worker says something else."""
        for each in frames:
            self.frames[each.worker] = each
            self.page.heard(each.worker, msgspec.json.encode(each))

    @asynccontextmanager
    async def up(self) -> AsyncIterator["Served"]:
        """Serve it while the block runs."""
        async with serving(self.page, Web("127.0.0.1", self.port, self.names)) as port:
            self.port = port
            saying = asyncio.create_task(self._say())
            try:
                yield self
            finally:
                saying.cancel()

    async def _say(self) -> None:
        while True:
            await asyncio.sleep(0.3)
            self.hear(*(msgspec.structs.replace(each, seq=each.seq + 1) for each in self.frames.values()))


def browser_path() -> str:
    """A headless browser of this machine; without one the test is skipped, and says what to do."""
    named = os.environ.get("COX_BROWSER")
    found = named or next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(
            "NO BROWSER: the page was not looked at. `make browser` installs one; COX_BROWSER names one"
        )
    return found
