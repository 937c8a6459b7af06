"""One connection to NATS, from its first subscription to its loss.

A lost connection is never revived: the loop opens the next one, with fresh subscriptions, so nothing stale
can be left in a buffer, an inbox or a queue. `frames` and the event log outlive it. Called by `loop.py`.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
from msgspec.structs import replace
from nats import micro
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from coxswain import __version__
from coxswain.common.nats_client import NatsClient
from coxswain.common.throttle import Throttle
from coxswain.schemas.commands import encode
from coxswain.schemas.errors import UNREADABLE, Code, RefusedError
from coxswain.schemas.permissions import SERVICE
from coxswain.schemas.status import Frame
from coxswain.schemas.subjects import Subjects
from coxswain.service.bus import intake
from coxswain.service.bus.eventlog import EventLog
from coxswain.service.bus.frames import Frames, split
from coxswain.service.config import Settings
from coxswain.service.port import AnswerOut, CommandIn, LeadIn, Port, QueryIn, ReplyOut

PENDING_MESSAGES: Final = 8_192
"""Messages of one subscription that wait for us; beyond it nats-py drops and reports them."""
PENDING_BYTES: Final = 16 * 1024 * 1024
MAX_UNSENT: Final = 8 * 1024 * 1024
"""Bytes that may wait for a server which does not read. Beyond it a frame is left out, which the next one repairs, and
an answer is refused; a single larger one goes out when nothing else waits."""
MARGIN: Final = 1_024
"""Bytes by which a message, headers included, stays below the server's `max_payload`."""
CHECK_S: Final = 1.0
"""How soon a connection that nats-py gave up in silence is noticed."""
LOG_PERIOD_S: Final = 60.0

Handler = Callable[[Msg], Awaitable[None]]


def _full(item: CommandIn | QueryIn) -> RefusedError:
    what = "queries" if isinstance(item, QueryIn) else "commands"
    return RefusedError(Code.QUEUE_FULL, f"too many {what} wait for this worker: try again later")


class _Origin(msgspec.Struct):
    incarnation: str


_decode_origin = msgspec.json.Decoder(_Origin).decode


class Session:
    """A connected client and what this worker does with it.

    Args:
        client: just connected, with `no_echo`: what arrives on our own status subject is not ours.
        settings: who we are.
        port: the engine.
        frames: status, numbered across sessions.
        events: the event log, kept across sessions.
        incarnation: this run of the worker.
        hello: what discovery shows beside our name.
        log: a structlog logger.
    """

    def __init__(
        self,
        client: NatsClient,
        settings: Settings,
        port: Port,
        frames: Frames,
        events: EventLog,
        *,
        incarnation: str,
        hello: dict[str, str],
        log: Any,
    ) -> None:
        self._client = client
        self._subjects = Subjects(settings.connection.fleet)
        self._worker = settings.worker
        self._port = port
        self._frames = frames
        self._events = events
        self._incarnation = incarnation
        self._hello = hello
        self._log = log
        self._throttle = Throttle(LOG_PERIOD_S)

    # The life of a connection

    async def open(self) -> None:
        """Subscribe, and be found by NATS's service discovery."""
        # Plain subscriptions: with a queue group only one worker would get what is meant for all.
        for subject in self._subjects.commands_of(self._worker):
            await self._subscribe(subject, self._on_command)
        for subject in self._subjects.queries_of(self._worker):
            await self._subscribe(subject, self._on_query)
        await self._subscribe(self._subjects.lead, self._on_lead)
        await self._subscribe(self._subjects.status(self._worker), self._on_own_name)
        try:
            await micro.add_service(
                self._client,
                name=SERVICE,
                version=__version__,
                description="A vLLM engine steered by Coxswain",
                metadata={
                    **self._hello,
                    "fleet": self._subjects.fleet,
                    "worker": self._worker,
                    "incarnation": self._incarnation,
                },
            )
        except Exception as error:  # noqa: BLE001 - discovery is a convenience: whatever fails, steering goes on
            self._log.warning("nats.not_discoverable", error=str(error))
        await self._client.flush(timeout=5)

    async def until_lost(self, lost: asyncio.Event) -> None:
        """Wait until the connection is gone; `lost` is set by the client when it has closed."""
        # Also ask the client: it sets `lost` after the socket has closed, which a frozen server can put off.
        while not (lost.is_set() or self._client.is_closed):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECK_S):
                    await lost.wait()

    # What goes out

    async def reply(self, item: ReplyOut) -> None:
        """Send the engine's answer to a command."""
        if not item.token:
            return
        reply = item.reply
        payload = encode(reply)
        if self._too_large(payload):
            omitted = reply.results_omitted + len(reply.results)
            payload = encode(replace(reply, results=(), results_omitted=omitted))
        headers = None if reply.code is None else intake.error_headers(reply.code, reply.error or "")
        await self._publish(item.token, payload, headers)

    async def answer(self, item: AnswerOut) -> None:
        """Send the engine's answer to a query."""
        if not item.token:
            return
        answer = item.answer
        if not isinstance(answer, RefusedError):
            parts = self._encoded(answer)
            if too_large := self._too_large(parts[0]):
                answer = RefusedError(Code.TOO_LARGE, f"the answer does not fit: {too_large}; ask for less")
            elif not self._fits(parts):
                why = "this worker is asked for more than NATS takes from it: try again later"
                answer = RefusedError(Code.QUEUE_FULL, why)
            else:
                for part in parts:
                    await self._publish(item.token, part)
                return
        body = encode({"error": answer.message, "code": int(answer.code)})
        await self._publish(item.token, body, intake.error_headers(answer.code, answer.message))

    async def status(self, frame: Frame, *, idle: bool) -> None:
        """Send a frame of the engine."""
        await self._send_parts(self._frames.outgoing(frame, self._port.unix(), self._room, idle=idle))

    async def heartbeat(self) -> None:
        """Repeat the idle frame, if the engine sleeps."""
        await self._send_parts(self._frames.heartbeat(self._port.unix(), self._room))

    @property
    def _room(self) -> int:
        return int(self._client.max_payload) - MARGIN

    def _encoded(self, answer: Any) -> list[bytes]:
        if isinstance(answer, Frame):
            return split(self._frames.stamp(answer, self._port.unix()), self._room)
        return [encode(answer)]

    def _fits(self, parts: list[bytes]) -> bool:
        """Whether these may wait with what waits already."""
        unsent = self._client.unsent
        return not unsent or unsent + sum(map(len, parts)) <= MAX_UNSENT

    async def _send_parts(self, parts: list[bytes]) -> None:
        if not self._fits(parts):
            return
        for part in parts:
            await self._publish(self._subjects.status(self._worker), part)

    def _too_large(self, payload: bytes) -> str:
        size = len(payload)
        return f"{size} bytes, the server allows {self._room}" if size > self._room else ""

    async def _publish(self, subject: str, payload: bytes, headers: dict[str, str] | None = None) -> None:
        try:
            await self._client.publish(subject, payload, headers=headers)
        except NatsError as error:
            # Lost with its connection, or a reply subject that is none: whoever waits asks again.
            self._warn("nats.not_sent", error=str(error) or type(error).__name__)

    # What comes in

    async def _subscribe(self, subject: str, handler: Handler) -> None:
        async def guarded(msg: Msg) -> None:
            # Let others on: a full queue of messages would otherwise be worked off in one go.
            await asyncio.sleep(0)
            try:
                await handler(msg)
            except Exception:  # noqa: BLE001 - one bad message must not end the subscription
                self._log.exception("nats.handler_failed", subject=msg.subject)

        await self._client.subscribe(
            subject,
            cb=guarded,
            pending_msgs_limit=PENDING_MESSAGES,
            pending_bytes_limit=PENDING_BYTES,
        )

    async def _on_command(self, msg: Msg) -> None:
        now = self._port.unix()
        if not intake.answerable(msg.reply):
            self._warn("command.not_answerable", subject=msg.subject, reply=msg.reply[:128])
            return
        try:
            self._take_command(msg, now)
        except RefusedError as error:
            await self._refuse(msg.subject, msg.reply, msg.data, error, now)
        except Exception:  # noqa: BLE001 - whoever asked gets an answer, without our internals
            self._log.exception("command.check_failed", subject=msg.subject)
            unread = RefusedError(Code.MALFORMED, "this command could not be read")
            await self._refuse(msg.subject, msg.reply, msg.data, unread, now)

    def _take_command(self, msg: Msg, now: float) -> None:
        subject = self._subjects.parse_command(msg.subject)
        command, ignored = intake.command(subject, msg.data, now)
        self._offer(CommandIn(subject.role, subject.verb, command, ignored, msg.reply))

    def _offer(self, item: CommandIn | QueryIn) -> None:
        if self._port.closing:
            raise RefusedError(Code.CLOSING, "this worker is shutting down")
        if not self._port.offer(item):
            raise _full(item)

    async def refuse_full(self, item: CommandIn | QueryIn) -> None:
        """Refuse what the port took and the engine had no room for."""
        if isinstance(item, QueryIn):
            await self.answer(AnswerOut(item.token, _full(item)))
        else:
            subject = self._subjects.command(item.role, self._worker, item.verb)
            await self._refuse(
                subject, item.token, encode({"id": item.command.id}), _full(item), self._port.unix()
            )

    async def _refuse(
        self, subject: str, token: str, payload: bytes, error: RefusedError, now: float
    ) -> None:
        self._frames.refuse(self._subjects.parse_command(subject).verb, error.code)
        self._warn("command.refused", key=str(int(error.code)), subject=subject, error=error.message)
        reply = intake.refusal(
            error,
            payload,
            worker=self._worker,
            incarnation=self._incarnation,
            now=now,
            step=self._port.step,
        )
        await self.reply(ReplyOut(token, reply))

    async def _on_query(self, msg: Msg) -> None:
        if not msg.reply or not intake.answerable(msg.reply):
            return  # nobody to tell
        what = msg.subject.rpartition(".")[2]
        try:
            query = intake.query(what, msg.data)
            self._offer(QueryIn(what, query, msg.reply))
        except RefusedError as error:
            await self.answer(AnswerOut(msg.reply, error))

    async def _on_lead(self, msg: Msg) -> None:
        lead = intake.lead(msg.data)
        if lead is None:
            self._warn("lead.malformed", subject=msg.subject, size=len(msg.data))
        elif (ahead_s := intake.epoch_ahead_s(lead.epoch, self._port.unix())) is not None:
            self._warn(
                "lead.not_believed", epoch=lead.epoch, ahead_s=round(ahead_s), why="it lies in the future"
            )
        elif not self._port.offer(LeadIn(lead)):
            self._warn("lead.dropped", why="the engine's process does not read")
        else:
            self._frames.led(lead.epoch, self._port.unix())

    async def _on_own_name(self, msg: Msg) -> None:
        try:
            other = _decode_origin(msg.data).incarnation
        except UNREADABLE:
            return
        # Ours can come back from a connection that we gave up.
        if other != self._incarnation and (held := self._throttle.allow("twin")) is not None:
            self._log.error(
                "worker.second_incarnation",
                worker=self._worker,
                incarnation=self._incarnation,
                other=other[:64],
                times=held + 1,
                hint="two workers use one name and both obey its commands: give each its own COX_WORKER",
            )

    def _warn(self, event: str, *, key: str = "", **fields: Any) -> None:
        """Log what peers can cause at will, once a minute per kind."""
        held = self._throttle.allow(event, key)
        if held is not None:
            self._log.warning(event, times=held + 1, **fields)
