"""What crosses between the engine's process and its bus, and how: lengths and MessagePack over a socket.

Pure: items in, bytes out, and back. A `Batch` goes up to the bus, single messages come down from it. Both ends are
one version of one program, parent and child: there is nothing to negotiate. Used by `process.py` and `child.py`.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from coxswain.schemas.commands import COMMANDS, Command
from coxswain.schemas.commands import encode as encode_json
from coxswain.schemas.errors import Code, RefusedError
from coxswain.schemas.status import QueueQuery, RequestQuery
from coxswain.service.config import Settings
from coxswain.service.port import (
    AnswerOut,
    CommandIn,
    Draft,
    EventOut,
    FrameOut,
    Inbound,
    LeadIn,
    Outbound,
    QueryIn,
    ReplyOut,
)

LENGTH: Final = 4
"""Bytes of the length before each message, most significant first."""


class _Message(msgspec.Struct, array_like=True, gc=False):
    """Anything that crosses."""


class Begin(_Message, tag="begin"):
    """Up, first: who we are, and what the bus before this one had counted."""

    settings: Settings
    incarnation: str
    hello: dict[str, str]
    life: int
    """How many buses this worker had before."""
    refused: dict[str, dict[str, int]]
    unix_offset: float
    """The worker's clock: see `Port.unix`."""


class End(_Message, tag="end"):
    """Up, last: send what is left."""

    within_s: float


class AnswerUp(_Message, tag="answer"):
    """An `AnswerOut`: a draft, a refusal, or JSON that is ready."""

    token: str
    draft: Draft | None
    refused: tuple[int, str] | None
    ready: bytes


class FullUp(_Message, tag="full"):
    """What came down and found the port full, sent back to be refused."""

    message: bytes


class CommandDown(_Message, tag="command"):
    """A `CommandIn`."""

    role: str
    verb: str
    command: msgspec.Raw
    ignored: tuple[str, ...]
    token: str


class QueryDown(_Message, tag="query"):
    """A `QueryIn`."""

    what: str
    queue: QueueQuery | None
    request: RequestQuery | None
    token: str


class State(_Message, tag="state"):
    """Down, whenever it changes and as a sign of life: the state of the bus."""

    connected: bool
    settled: int
    """Events up to this `seq` are stored or given up."""
    events_dropped: int
    refused: dict[str, dict[str, int]]
    """Commands that it refused itself, by verb and code."""
    beginnings: int
    """How often it has missed something that the engine told."""


OutboundUp = ReplyOut | AnswerUp | FrameOut | EventOut
"""An event arrives with its fields as plain data, which is JSON the same."""
Up = OutboundUp | FullUp | Begin | End
InboundDown = CommandDown | QueryDown | LeadIn
Down = InboundDown | State


class Batch(_Message):
    """Up: what the engine has to say, and the number of its last step."""

    step: int
    messages: list[Up]


_encode = msgspec.msgpack.Encoder().encode
_decode_batch = msgspec.msgpack.Decoder(Batch).decode
_decode_down = msgspec.msgpack.Decoder(Down).decode
_decoders: Final = {verb: msgspec.msgpack.Decoder(struct).decode for verb, struct in COMMANDS.items()}


def pack_up(step: int, messages: Sequence[Up]) -> bytes:
    """A batch as it goes over the socket."""
    return _framed(_encode(Batch(step, list(messages))))


def pack_down(message: Down) -> bytes:
    """A message to the engine as it goes over the socket."""
    return _framed(_encode(message))


def _framed(body: bytes) -> bytes:
    return len(body).to_bytes(LENGTH, "big") + body


def unpack(buffer: bytearray) -> Iterator[bytes]:
    """The bodies that have arrived whole; what is left in the buffer is the beginning of the next."""
    at = 0
    try:
        while len(buffer) - at >= LENGTH:
            begin = at + LENGTH
            end = begin + int.from_bytes(buffer[at:begin], "big")
            if len(buffer) < end:
                break
            at = end
            yield bytes(buffer[begin:end])
    finally:  # whoever takes them may be interrupted (Ctrl-C): none comes twice
        del buffer[:at]


def read_batch(body: bytes) -> Batch:
    """A batch, up."""
    return _decode_batch(body)


def read_down(body: bytes) -> Down:
    """A message, down."""
    message: Down = _decode_down(body)
    return message


def up(item: Outbound) -> OutboundUp:
    """An item of the engine, to be sent."""
    if not isinstance(item, AnswerOut):
        return item
    token, answer = item
    if isinstance(answer, Draft):
        return AnswerUp(token, answer, None, b"")
    if isinstance(answer, RefusedError):
        return AnswerUp(token, None, (int(answer.code), answer.message), b"")
    return AnswerUp(token, None, None, encode_json(answer))


def from_up(message: OutboundUp) -> Outbound:
    """The item that the engine sent."""
    if not isinstance(message, AnswerUp):
        return message
    if message.refused is not None:
        code, text = message.refused
        return AnswerOut(message.token, RefusedError(Code(code), text))
    return AnswerOut(message.token, msgspec.Raw(message.ready) if message.draft is None else message.draft)


def down(item: Inbound) -> InboundDown:
    """An item for the engine, to be sent."""
    match item:
        case CommandIn(role, verb, command, ignored, token):
            return CommandDown(role, verb, msgspec.Raw(_encode(command)), ignored, token)
        case QueryIn(what, query, token):
            queue = query if isinstance(query, QueueQuery) else None
            return QueryDown(what, queue, query if isinstance(query, RequestQuery) else None, token)
        case LeadIn():
            return item


def from_down(message: InboundDown) -> Inbound:
    """The item for the engine."""
    match message:
        case CommandDown(role, verb, command, ignored, token):
            decoded: Command = _decoders[verb](command)
            return CommandIn(role, verb, decoded, ignored, token)
        case QueryDown(what, queue, request, token):
            return QueryIn(what, queue or request, token)
        case LeadIn():
            return message
