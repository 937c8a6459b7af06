"""The bus itself: keeps a NATS connection and never lets the engine wait.

Shell only: it connects for ever, moves items from the port to the session, keeps the heartbeat of an idle engine
and stops in bounded time. Run by `child.py` in a process of its own, or by `thread.py` in one of the engine's threads.
"""

import asyncio
import time
from collections.abc import Awaitable, Mapping
from math import inf
from typing import Any, Final, TypeVar

from nats.errors import Error as NatsError
from nats.errors import SlowConsumerError

from coxswain.common.logs import get_logger
from coxswain.common.nats_client import NatsClient
from coxswain.common.throttle import Throttle
from coxswain.schemas.errors import Code, RefusedError
from coxswain.schemas.subjects import Subjects
from coxswain.service.bus.board import Board
from coxswain.service.bus.connect import CLOSE_S, Backoff, close, connect
from coxswain.service.bus.eventlog import EventLog
from coxswain.service.bus.frames import Frames
from coxswain.service.bus.session import LOG_PERIOD_S, Session
from coxswain.service.config import Settings
from coxswain.service.port import AnswerOut, Draft, EventOut, Inbound, LeadIn, Outbound, Port, ReplyOut

DENIED: Final = "permissions violation"
"""In the error by which nats-py says that the server refused a subject; only `on_error` hears of it."""

T = TypeVar("T")


class Bus:
    """What joins one worker to NATS, on whatever loop `run` is awaited.

    Args:
        settings: who we are and where NATS is.
        port: where the engine is met.
        incarnation: a ULID, new with every start of the worker.
        hello: what service discovery shows of this worker (model, versions).
        life: how many buses this incarnation had before this one.
        refused: commands that they had refused, by verb and code.
        log: a structlog logger; our own by default.
    """

    def __init__(
        self,
        settings: Settings,
        port: Port,
        *,
        incarnation: str,
        hello: dict[str, str],
        life: int = 0,
        refused: Mapping[str, Mapping[str, int]] | None = None,
        log: Any = None,
    ) -> None:
        fleet = settings.connection.fleet
        self._settings = settings
        self._port = port
        self._incarnation = incarnation
        self._hello = hello
        self._log = log or get_logger(fleet=fleet, worker=settings.worker)
        self._events = EventLog(Subjects(fleet), settings.worker, port, self._log)
        self._frames = Frames(life, refused, self._events.age)
        self._board = Board(settings.full_interval_s, port.begin_anew)
        self._throttle = Throttle(LOG_PERIOD_S)
        self._session: Session | None = None
        self._reachable: bool | None = None
        self._last_error: Exception | None = None
        self._work = asyncio.Event()
        self._stopping = asyncio.Event()
        self._deadline = inf

    async def run(self) -> None:
        """Serve until `stop`."""
        self._work.set()  # for what came before we were there
        tasks = [asyncio.create_task(self._pump()), asyncio.create_task(self._live())]
        await self._stopping.wait()
        await self._farewell()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=2 * CLOSE_S)

    # On the loop of `run`

    def wake(self) -> None:
        """Items wait in the port."""
        self._work.set()

    def stop(self, deadline: float) -> None:
        """Send what is left and end `run`, by about `deadline` (monotonic s)."""
        self._deadline = deadline
        self._stopping.set()

    async def full(self, item: Inbound) -> None:
        """Answer what the engine had no room for."""
        if isinstance(item, LeadIn):
            return  # nobody waits for a heartbeat's answer
        if self._session is not None:
            await self._session.refuse_full(item)

    @property
    def settled(self) -> int:
        """Events up to this `seq` are stored or given up."""
        return self._events.settled

    @property
    def refused(self) -> dict[str, dict[str, int]]:
        """Commands refused without the engine, by verb and code, also by the buses before this one."""
        return self._frames.refused

    async def _farewell(self) -> None:
        await self._move()
        # Leave time to close: a connection that is cut loses what it has not sent.
        while self._session and self._events.hopeful and time.monotonic() < self._deadline - CLOSE_S:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        if lost := self._events.waiting:
            self._log.warning("bus.events_lost_at_stop", events=lost)

    # From the port to NATS

    async def _pump(self) -> None:
        beat_at = inf
        while not self._stopping.is_set():
            try:
                async with asyncio.timeout(None if beat_at == inf else max(0.0, beat_at - time.monotonic())):
                    await self._work.wait()
            except TimeoutError:
                pass
            self._work.clear()
            sent = await self._move()
            if time.monotonic() >= beat_at and self._session is not None:
                await self._tried(self._session.heartbeat())
                sent = True
            if self._session is None or not self._frames.idle:
                beat_at = inf
            elif sent or beat_at == inf:
                beat_at = time.monotonic() + self._settings.full_interval_s

    async def _move(self) -> bool:
        """Hand on everything that waits; whether a frame was among it."""
        frame_sent = False
        for item in self._port.collect():
            frame_sent |= await self._tried(self._hand_on(item)) or False
        return frame_sent

    async def _tried(self, work: Awaitable[T]) -> T | None:
        """What comes of it; None if it fails: one bad item must not stop the rest."""
        try:
            return await work
        except Exception as error:  # noqa: BLE001 - whatever it was
            if (held := self._throttle.allow("failed", type(error).__name__)) is not None:
                self._log.exception("bus.pump_failed", times=held + 1)
            return None

    async def _hand_on(self, item: Outbound) -> bool:
        """Hand on one item; whether it was a frame that was sent.

        Without a connection there is nobody to answer; events, and what an idle engine last said, are kept.
        """
        session = self._session
        if isinstance(item, EventOut):
            self._events.add(item.event(self._settings.worker, self._incarnation))
        elif isinstance(item, ReplyOut):
            if session is not None:
                await session.reply(item)
        elif isinstance(item, AnswerOut):
            whole = self._complete(item)
            if session is not None:
                await session.answer(whole)
        elif self._board.take(item.draft):
            if session is not None:
                await self._show(session, idle=item.idle)
                return True
            idle = item.idle and self._board.complete
            frame = self._board.full(peek=True) if idle else item.draft.frame
            self._frames.remember(frame, self._port.unix(), idle=idle)
        return False

    def _complete(self, item: AnswerOut) -> AnswerOut:
        """The answer in full: of its status, the engine told only what is new."""
        if not isinstance(item.answer, Draft):
            return item
        if self._board.take(item.answer):
            return AnswerOut(item.token, self._board.full(peek=True))
        return AnswerOut(item.token, RefusedError(Code.CLOSING, "the bus has just been restarted: ask again"))

    async def _show(self, session: Session, *, idle: bool) -> None:
        """Send what changed, then everything if that is due: whoever has the first need not read the second's rows."""
        board, now = self._board, time.monotonic()
        if (delta := board.delta()) is not None:
            await session.status(delta, idle=False)
        if board.due(now):
            began = time.thread_time()
            await session.status(board.full(), idle=idle)
            board.paid(now, time.thread_time() - began)
        elif idle and board.complete:
            self._frames.remember(board.full(peek=True), self._port.unix(), idle=True, known=True)

    # One connection after the other

    async def _live(self) -> None:
        backoff = Backoff()
        while not self._stopping.is_set():
            lost = asyncio.Event()
            try:
                client = await connect(
                    self._settings.connection,
                    name=f"coxswain-worker {self._settings.worker}",
                    on_error=self._on_error,
                    on_closed=lost.set,
                )
                await self._serve(client, lost)
            except Exception as error:  # noqa: BLE001 - whatever it was, the engine serves on and we try again
                self._say_unreachable(error)
            await backoff.pause()

    async def _serve(self, client: NatsClient, lost: asyncio.Event) -> None:
        session = Session(
            client,
            self._settings,
            self._port,
            self._frames,
            self._events,
            incarnation=self._incarnation,
            hello=self._hello,
            log=self._log,
        )
        sending: asyncio.Task[None] | None = None
        try:
            await session.open()
            self._say_connected(client)
            self._session = session
            self._port.tell_connected(True)
            self._work.set()  # the heartbeat goes on, unless the engine has news
            sending = asyncio.create_task(self._events.run(client))
            await session.until_lost(lost)
        finally:
            self._session = None
            self._port.tell_connected(False)
            await close(client)
            if sending is not None:
                sending.cancel()
                await asyncio.wait((sending,), timeout=CLOSE_S)
                self._check(sending)
        self._reachable = False
        self._log.warning("nats.lost", hint="this worker serves on and reconnects for ever")

    def _check(self, task: asyncio.Task[None]) -> None:
        """Log what ended a task, unless it was the end of its connection."""
        error = task.exception() if task.done() and not task.cancelled() else None
        if error is not None and not isinstance(error, NatsError):
            self._log.error("events.failed", exc_info=error)

    def _say_connected(self, client: NatsClient) -> None:
        url = client.connected_url
        self._reachable = True
        self._log.info(
            "nats.connected",
            server=f"{url.hostname}:{url.port}" if url else "",
            max_payload=client.max_payload,
            incarnation=self._incarnation,
        )

    def _say_unreachable(self, error: Exception) -> None:
        """Log once per change of state; the client's own reason says more than "no servers"."""
        if self._reachable is not False:
            self._reachable = False
            reason = self._last_error or error
            self._log.warning(
                "nats.unreachable",
                error=str(reason) or type(reason).__name__,
                hint="this worker serves on and retries for ever",
            )

    def _on_error(self, error: Exception) -> None:
        """Hear of an error on the connection. Must not raise: nats-py's read loop would end in silence."""
        self._last_error = error
        if DENIED in str(error):
            # Also while a session opens: NATS would call us connected, and we would be deaf.
            if (held := self._throttle.allow("denied", str(error)[:256])) is not None:
                hint = "NATS does not let this user: its key must be worker:NAME of COX_WORKER (`cox init --auth`)"
                self._log.error("nats.denied", error=str(error), hint=hint, times=held + 1)
            return
        if self._session is None:
            return  # `_say_unreachable` says it
        kind = type(error).__name__
        subject = error.subject if isinstance(error, SlowConsumerError) else ""
        if (held := self._throttle.allow("error", kind, subject, str(error)[:80])) is not None:
            self._log.warning(
                "nats.error", kind=kind, error=str(error) or kind, subject=subject, times=held + 1
            )
