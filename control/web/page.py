"""Who watches, and when the picture is made: at most once a second, once for all, and not at all for nobody.

The controller hands every status message over (`heard`) and goes on; decoding and drawing happen on a thread of
their own, so that a step of the controller never waits for a picture. No HTTP here: `site.py` calls `follow`.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

from coxswain.common.throttle import Throttle
from coxswain.control.errors import ControlError
from coxswain.control.logs import log
from coxswain.control.web.board import MAX_SENT, Board, Message, Of, SentRow, Standing

EVERY_S: Final = 1.0
"""Between two pictures, if drawing one takes less than `DUTY` of it."""
DUTY: Final = 0.2
"""The part of a core that drawing may take: pictures of a fleet that is too large for it come less often."""
MOST_S: Final = 3.0
"""But no less often than this: the page takes longer silence for a break."""
LINGER_S: Final = 30.0
"""After the last watcher left we go on for so long: who reloads the page finds shares and happenings as they were."""
MAX_WATCHERS: Final = 32
MAX_MESSAGES: Final = 8_192
MAX_BYTES: Final = 64 << 20
"""Of status messages between two pictures; what is beyond is passed over, and full frames repair it."""


class Web(NamedTuple):
    """Where and under which names a page is served."""

    host: str
    port: int
    """0: any that is free."""
    names: tuple[str, ...] = ()
    """Host names beside `localhost` and addresses under which browsers come: a proxy's."""


class FullError(ControlError):
    """As many watch as may."""


class Page:
    """The picture that browsers are shown, and how many of them there are.

    Args:
        fleet: its name.
        standing: says how the controller is, whenever a picture is made.
    """

    def __init__(self, fleet: str, standing: Callable[[], Standing]) -> None:
        self.watchers = 0
        self._fleet = fleet
        self._standing = standing
        self._sent: dict[tuple[str, str], SentRow] = {}
        self._board: Board | None = None
        """None while nobody watches."""
        self._messages: list[Message] = []
        self._bytes = self._missed = 0
        self._latest: bytes | None = None
        self._drawn = asyncio.Condition()
        self._wanted = asyncio.Event()
        self._closed = False
        self._thread: ThreadPoolExecutor | None = None
        self._throttle = Throttle()

    # What the controller calls

    def heard(self, worker: str, payload: bytes) -> None:
        """A status message came on the subject of `worker`."""
        if self._board is None:
            return
        if len(self._messages) >= MAX_MESSAGES or self._bytes + len(payload) > MAX_BYTES:
            self._missed += 1
            return
        self._bytes += len(payload)
        self._messages.append(Message(time.time(), worker, payload))

    def told(self, worker: str, verb: str, *, ok: bool, code: int | None, reason: str) -> None:
        """A command to `worker` was answered, refused, or not answered."""
        old = self._sent.pop((worker, verb), None)
        if len(self._sent) >= MAX_SENT:
            del self._sent[next(iter(self._sent))]
        self._sent[worker, verb] = SentRow(
            worker=worker,
            verb=verb,
            sent_total=(old.sent_total if old else 0) + 1,
            refused_total=(old.refused_total if old else 0) + (not ok),
            at=time.time(),
            ok=ok,
            code=code,
            reason=reason,
        )

    # What the site calls

    @asynccontextmanager
    async def drawing(self) -> AsyncGenerator[None, None]:
        """While this block runs, pictures are made for those who `follow`; at its end they are let go."""
        with ThreadPoolExecutor(1, thread_name_prefix="web") as thread:
            self._thread = thread
            task = asyncio.create_task(self._draw())
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await self.let_go()

    async def let_go(self) -> None:
        """End every `follow`."""
        self._closed = True
        async with self._drawn:
            self._drawn.notify_all()

    async def follow(self) -> AsyncGenerator[bytes, None]:
        """Pictures as they are made, as JSON in one line; who is slow misses some, and gets the latest.

        Raises:
            FullError: `MAX_WATCHERS` are there already.
        """
        if self.watchers >= MAX_WATCHERS:
            raise FullError(
                f"{MAX_WATCHERS} watch already: close a page, or put a proxy that shares in between"
            )
        self.watchers += 1
        self._wanted.set()
        seen: bytes | None = None
        try:
            while not self._closed:
                if self._latest is seen:
                    async with self._drawn:
                        await self._drawn.wait_for(lambda: self._closed or self._latest is not seen)
                elif (seen := self._latest) is not None:
                    yield seen
        finally:
            self.watchers -= 1

    async def requests(self, of: Of, name: str) -> bytes | None:
        """The requests of a tenant or worker as of the latest picture; None if nobody watches."""
        board, thread = self._board, self._thread
        if board is None or thread is None:
            return None
        return await asyncio.get_running_loop().run_in_executor(thread, board.requests, of, name)

    async def _draw(self) -> None:
        """Draw for as long as anybody watches; then forget, and wait until somebody comes."""
        while True:
            self._wanted.clear()
            if not self.watchers:
                await self._wanted.wait()
            self._board = Board(self._fleet)
            try:
                await self._draw_while_watched(self._board)
            except Exception as error:  # noqa: BLE001  (a page that stands still for ever, and nobody is told)
                if self._throttle.allow("picture", str(error)) is not None:
                    log.error("page.failed", exc_info=error)
                await asyncio.sleep(EVERY_S)
            self._board = self._latest = None
            self._messages, self._bytes = [], 0

    async def _draw_while_watched(self, board: Board) -> None:
        loop = asyncio.get_running_loop()
        left_at = loop.time()
        while self.watchers or loop.time() - left_at < LINGER_S:
            began = loop.time()
            if self.watchers:
                left_at = began
            messages, self._messages, self._bytes = self._messages, [], 0
            latest = await loop.run_in_executor(
                self._thread,
                board.draw,
                messages,
                self._standing(),
                tuple(self._sent.values()),
                self._missed,
                time.time(),
            )
            async with self._drawn:
                self._latest = latest
                self._drawn.notify_all()
            took_s = loop.time() - began
            await asyncio.sleep(min(max(EVERY_S, took_s / DUTY), MOST_S) - took_s)
