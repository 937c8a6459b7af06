"""What the page is tested with: frames as workers publish them, a served page, a browser."""

import os
import shutil
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

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
        self.page = Page("main", self._standing)

    def _standing(self) -> Standing:
        return Standing(name="ctl-1", leading=True, reaches_nats=self.reaches_nats)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.port}/"

    def hear(self, *frames: Frame) -> None:
        """Frames come, each on its worker's subject."""
        for each in frames:
            self.page.heard(each.worker, msgspec.json.encode(each))

    @asynccontextmanager
    async def up(self) -> AsyncIterator["Served"]:
        """Serve it while the block runs."""
        async with serving(self.page, Web("127.0.0.1", self.port, self.names)) as port:
            self.port = port
            yield self


def data(lines: Iterable[bytes]) -> list[Any]:
    """The documents in lines of an event stream."""
    return [msgspec.json.decode(line[6:]) for line in lines if line.startswith(b"data: ")]


def browser_path() -> str:
    """A headless browser of this machine; without one the test is skipped, and says what to do."""
    named = os.environ.get("COX_BROWSER")
    found = named or next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(
            "NO BROWSER: the page was not looked at. `make browser` installs one; COX_BROWSER names one"
        )
    return found
