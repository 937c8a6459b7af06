"""The client: send commands, ask questions, watch a fleet. For the command line and for your own programs.

Lives here: one connection and what can be asked over it. May not live here: what to do with the answers.
Called by `cli` and the demo; the controller uses `command`, the tables and the connection as well.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, Literal, Self, TypeVar, overload

import msgspec
import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from coxswain.common.connection import Connection
from coxswain.control.errors import NoAnswerError, UnreachableError, UnreadableError
from coxswain.control.history import replay
from coxswain.control.link import Link
from coxswain.control.tables import Table
from coxswain.control.transport import Notice, open_link
from coxswain.schemas import commands, status
from coxswain.schemas.commands import Command, Reply
from coxswain.schemas.errors import CODE_HEADER, ERROR_HEADER, UNREADABLE, Code, RefusedError
from coxswain.schemas.events import Event, decode_event
from coxswain.schemas.names import ALL, check_token, tenant_key, tenant_of_key
from coxswain.schemas.parts import join
from coxswain.schemas.policy import ClassPolicy, TenantPolicy
from coxswain.schemas.request_id import normalise
from coxswain.schemas.status import Config, Frame, QueuePage, RequestReport
from coxswain.schemas.subjects import OPERATOR, Subjects

T = TypeVar("T")

KEPT = 8
"""Reasons why answers were passed over."""
QUIET_S = 0.25
"""A question to `all` is answered once nobody has said anything for this long after the last answer."""

_DECODE = {
    "queue": status.decode_page,
    "request": status.decode_report,
    "config": status.decode_config,
    "status": status.decode_frame,
}


class Client:
    """A connection to a fleet: send commands, ask questions, watch.

    Use `async with await Client.connect(...) as client:`; its tables are `classes` and `tenants`.
    """

    def __init__(self, nc: Link, fleet: str) -> None:
        self.nc = nc
        self.js = nc.jetstream()
        self.subjects = Subjects(fleet)
        self.unreadable: list[str] = []
        """Why answers to `all` were passed over, the last `KEPT`: one broken worker hides no other."""
        self.classes = Table(
            self.js, self.subjects.classes_bucket, ClassPolicy, key_of=_class_key, name_of=_class_key
        )
        self.tenants = Table(
            self.js, self.subjects.tenants_bucket, TenantPolicy, key_of=tenant_key, name_of=tenant_of_key
        )

    @classmethod
    async def connect(
        cls,
        connection: Connection,
        *,
        name: str = "cox",
        timeout_s: float = 2.0,
        notice: Notice = lambda _: None,
    ) -> Self:
        """Connect to NATS; `name` shows in its monitoring.

        Raises:
            UnreachableError: what was tried, why it failed and what to do.
        """
        nc = await open_link(connection, name=name, timeout_s=timeout_s, notice=notice)
        return cls(nc, connection.fleet)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; safe to call twice."""
        await self.nc.close()

    async def command(
        self,
        worker: str,
        verb: str,
        command: Command,
        *,
        role: str = OPERATOR,
        timeout_s: float = 2.0,
    ) -> list[Reply]:
        """Send a command; a named worker gives exactly one reply, `all` every one that comes.

        A refusal is a reply too (`outcome` is `rejected`, `code` and `error` say why).

        Raises:
            NoAnswerError: nobody listens, or nobody answered in `timeout_s`.
            UnreachableError: the connection is lost; nothing was sent.
        """
        subject = self.subjects.command(role, self._worker(worker), verb)
        messages = await self._ask(worker, subject, commands.encode(command), timeout_s)
        return self._read(worker, commands.decode_reply, messages)

    @overload
    async def query(
        self,
        worker: str,
        what: Literal["queue"],
        payload: status.QueueQuery | None = ...,
        *,
        timeout_s: float = ...,
    ) -> list[QueuePage]: ...
    @overload
    async def query(
        self,
        worker: str,
        what: Literal["request"],
        payload: status.RequestQuery | None = ...,
        *,
        timeout_s: float = ...,
    ) -> list[RequestReport]: ...
    @overload
    async def query(
        self, worker: str, what: Literal["config"], payload: None = ..., *, timeout_s: float = ...
    ) -> list[Config]: ...
    @overload
    async def query(
        self, worker: str, what: Literal["status"], payload: None = ..., *, timeout_s: float = ...
    ) -> list[Frame]: ...

    async def query(
        self, worker: str, what: str, payload: msgspec.Struct | None = None, *, timeout_s: float = 2.0
    ) -> list[Any]:
        """Ask a worker, or `all`, and decode what they answer.

        Raises:
            NoAnswerError, UnreachableError: as `command`.
            RefusedError: a named worker, or every worker of `all`, refused to answer; with its code and text.
        """
        subject = self.subjects.query(self._worker(worker), what)
        body = commands.encode(payload) if payload is not None else b""
        messages = await self._ask(worker, subject, body, timeout_s, parts=what == "status")
        refusals = [refusal for message in messages if (refusal := _refusal(message))]
        told = [message for message in messages if not _refusal(message)]
        answers: list[Any] = self._read(worker, _DECODE[what], told)
        if refusals and not answers:
            raise refusals[0]
        return list(join(answers).values()) if what == "status" else answers

    async def statuses(self, *, wait_s: float = 1.0) -> dict[str, Frame]:
        """A full frame of every worker that answers within `wait_s`, by name; empty if there is none."""
        try:
            frames = await self.query(ALL, "status", timeout_s=wait_s)
        except (NoAnswerError, RefusedError, UnreadableError):
            return {}
        return {frame.worker: frame for frame in sorted(frames, key=lambda frame: frame.worker)}

    async def frames(self) -> AsyncGenerator[Frame, None]:
        """Status frames of all workers as they are published, for ever; malformed ones are passed over."""
        subscription = await self.nc.subscribe(self.subjects.status_all)
        try:
            async for message in subscription.messages:
                try:
                    yield status.decode_frame(message.data)
                except UNREADABLE:
                    continue
        finally:
            await _unsubscribe(subscription)

    async def events(
        self,
        *,
        start: float | Literal["all"] | None = None,
        follow: bool = True,
        request: str | None = None,
        tenant: str | None = None,
        worker: str | None = None,
    ) -> AsyncGenerator[Event | dict[str, Any], None]:
        """Events of the fleet; kinds of a later version come as plain dicts.

        Args:
            start: None for those from now on (core NATS, nothing stored is needed); a Unix time in seconds or
                "all" to read the log first.
            follow: False ends at the end of the log.
            request: only those about it, by its public id or the body's id.
            tenant: only those about it.
            worker: only its own.

        Raises:
            NotSetUpError: the log was asked for and the stream is missing.
        """
        subject = self.subjects.event(worker, "*") if worker else self.subjects.events_all
        public = None if request is None else normalise(request)
        if start is None:
            messages = self._live(subject)
        else:
            messages = replay(self.nc, self.subjects.stream, subject, start, follow=follow)
        try:
            async for message in messages:
                try:
                    event = decode_event(message.data)
                except UNREADABLE:
                    continue
                if _about(event, public, tenant):
                    yield event
        finally:
            await messages.aclose()

    async def _live(self, subject: str) -> AsyncGenerator[Msg, None]:
        subscription = await self.nc.subscribe(subject)
        try:
            async for message in subscription.messages:
                yield message
        finally:
            await _unsubscribe(subscription)

    def _worker(self, worker: str) -> str:
        return worker if worker == ALL else check_token("worker", worker)

    async def _ask(
        self, worker: str, subject: str, payload: bytes, timeout_s: float, *, parts: bool = False
    ) -> list[Msg]:
        if not self.nc.is_connected:
            raise UnreachableError(
                "the connection to NATS is lost; nothing was sent. Try again once it is back."
            )
        try:
            if worker == ALL or parts:
                messages = await self._gather(subject, payload, timeout_s, until_joined=worker != ALL)
            else:
                messages = [await self.nc.request(subject, payload, timeout=timeout_s)]
        except nats.errors.NoRespondersError:
            messages = []
        except nats.errors.MaxPayloadError as error:
            raise RefusedError(
                Code.TOO_LARGE, f"{len(payload)} bytes are over the server's max_payload: name fewer targets"
            ) from error
        except nats.errors.TimeoutError as error:
            raise NoAnswerError(
                f"worker {worker!r} did not answer within {timeout_s:g} s. It may still apply a command: "
                "look with `cox ps`, then send it again with the same id.",
            ) from error
        except nats.errors.Error as error:
            raise UnreachableError(
                f"NATS: {error}. Whether the message arrived is unknown: try again."
            ) from error
        if messages:
            return messages
        fleet = self.subjects.fleet
        if worker == ALL:
            raise NoAnswerError(
                f"no worker of fleet {fleet!r} answers. Start one (`cox worker MODEL`), or set COX_FLEET."
            )
        raise NoAnswerError(f"no worker {worker!r} in fleet {fleet!r}. `cox ps` lists the live ones.")

    def _read(self, worker: str, decoder: Callable[[bytes], T], messages: list[Msg]) -> list[T]:
        """Decoded answers; of `all`, those that can be read, if any can."""
        answers: list[T] = []
        failure: UnreadableError | RefusedError | None = None
        for message in messages:
            try:
                answers.append(_decode(decoder, message))
            except (UnreadableError, RefusedError) as error:
                if worker != ALL:
                    raise
                failure = error
                self.unreadable = [*self.unreadable, str(error)][-KEPT:]
        if failure is not None and not answers:
            raise failure
        return answers

    async def _gather(
        self, subject: str, payload: bytes, timeout_s: float, *, until_joined: bool
    ) -> list[Msg]:
        inbox = self.nc.new_inbox()
        subscription = await self.nc.subscribe(inbox)
        try:
            return await self.nc.unless_denied(
                subject,
                lambda: self._collect(
                    subscription, subject, payload, inbox, timeout_s, until_joined=until_joined
                ),
            )
        finally:
            await _unsubscribe(subscription)

    async def _collect(
        self,
        subscription: Subscription,
        subject: str,
        payload: bytes,
        inbox: str,
        timeout_s: float,
        *,
        until_joined: bool,
    ) -> list[Msg]:
        loop = asyncio.get_running_loop()
        messages: list[Msg] = []
        await self.nc.publish(subject, payload, reply=inbox)
        end = loop.time() + timeout_s
        while (left := end - loop.time()) > 0:
            try:
                message = await subscription.next_msg(timeout=min(left, QUIET_S) if messages else left)
            except nats.errors.TimeoutError:
                if until_joined and not messages:
                    raise
                break
            if (message.headers or {}).get("Status") == "503":
                break
            messages.append(message)
            if until_joined and _is_last(message, len(messages)):
                break
        return messages


def _class_key(name: str) -> str:
    return check_token("class", name)


def _is_last(message: Msg, count: int) -> bool:
    return _refusal(message) is not None or _decode(status.decode_frame, message).parts <= count


def _refusal(message: Msg) -> RefusedError | None:
    """The refusal that a reply's headers carry, if any; an unknown code counts as malformed."""
    headers = message.headers or {}
    text = headers.get(CODE_HEADER)
    if text is None:
        return None
    code = int(text) if text.isdigit() and int(text) in Code._value2member_map_ else Code.MALFORMED
    return RefusedError(Code(code), headers.get(ERROR_HEADER, "refused without a reason"))


def _decode(decoder: Callable[[bytes], T], message: Msg) -> T:
    try:
        return decoder(message.data)
    except UNREADABLE as error:
        if refusal := _refusal(message):
            raise refusal from error
        raise UnreadableError(
            f"an answer is not of this protocol's version ({error}). Update `cox` or the worker.",
        ) from error


def _about(event: Event | dict[str, Any], request: str | None, tenant: str | None) -> bool:
    if isinstance(event, dict):
        about_request, about_tenant = event.get("request"), event.get("tenant")
    else:
        about_request, about_tenant = event.request, event.tenant
    if tenant is not None and about_tenant != tenant:
        return False
    return request is None or about_request == request


async def _unsubscribe(subscription: Any) -> None:
    try:
        await subscription.unsubscribe()
    except nats.errors.Error:
        return  # the connection is closed or lost: there is nothing left to end
