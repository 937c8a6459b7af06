"""nats-py's client as all of ours need it: TLS where it is asked for, an orderly end, and no message that stops it.

Called by `service/bus/connect.py` and `control/link.py`, which add what only their side needs.
"""

import re
from secrets import token_hex
from types import FunctionType
from typing import Any, Final

from nats.aio.client import Client
from nats.errors import Error
from nats.nuid import NUID
from nats.protocol import parser

_NAME: Final = rb"([^ \t\n]+)[ \t]+"
_LINES: Final = {
    "MSG_RE": re.compile(rb"\AMSG[ \t]+" + _NAME + rb"(\d+)[ \t]+(" + _NAME + rb")?(\d+)\r\n"),
    "HMSG_RE": re.compile(rb"\AHMSG[ \t]+" + _NAME + rb"(\d+)[ \t]+(" + _NAME + rb")?(\d+)[ \t]+(\d+)\r\n"),
}
"""How a message begins: to nats-server only a space or a tab ends a name. nats-py's own patterns also take \\r, \\v and
\\f for space: the rest of such a subject becomes the number of a subscription, or a line that it gives up at. Whoever
may publish at all could pass a message off as one on a subject that is closed to them."""
_LOST: Final = sorted(_LINES.keys() - set(parser.Parser.parse.__code__.co_names))
"""Of these patterns, those that the parser of this nats-py does not use."""
_parse: Any = FunctionType(
    parser.Parser.parse.__code__, vars(parser) | _LINES, argdefs=parser.Parser.parse.__defaults__
)


class _Parser(parser.Parser):
    """nats-py's, with our patterns instead of its own; other clients of this process keep theirs."""

    parse = _parse


class _Names(NUID):
    """Names of inboxes that nobody can guess; nats-py's own grow by a constant, so that two reveal all others."""

    def next(self) -> bytearray:
        """22 characters, as many as nats-py counts on."""
        return bytearray(token_hex(11), "ascii")


class NatsClient(Client):
    """Never goes on in the clear where TLS was asked for; nats-py's own does what the server says.

    One address with TLS asks for it at all of them, as in nats.go: a list must not be as safe as its weakest.

    A connection that breaks with bytes unsent is closed like any other; nats-py (2.15, `_close`) writes them to it once
    more, which uvloop answers with a RuntimeError: no callback would be told, and its subscriptions would never end.

    No message stops the reading. nats-server passes on any bytes in a subject, a reply subject or headers, whoever
    sends them; nats-py (2.16) stops reading at some, and believes itself connected. Here names are made readable, and
    unreadable headers are dropped. The message is kept: a stream's consumer that never gets one asks for it for ever.
    """

    def __init__(self) -> None:
        # Not when this is imported: engines import it too, and serve on without a bus.
        if _LOST:
            raise RuntimeError(
                f"this nats-py reads messages in another way: its parser has no {', '.join(_LOST)}"
            )
        super().__init__()
        self._ps = _Parser(self)
        self._nuid = _Names()
        self._encrypted = False

    @property
    def unsent(self) -> int:
        """Bytes that wait for a server which does not read; nats-py leaves out those that its transport has."""
        writer = getattr(self._transport, "_io_writer", None)
        return self._pending_data_size + (
            writer.transport.get_write_buffer_size() if writer is not None else 0
        )

    def _setup_server_pool(self, connect_url: str | list[str]) -> None:
        super()._setup_server_pool(connect_url)  # type: ignore[arg-type]
        # Not asked of the pool later: servers that fail leave it.
        self._encrypted = any(server.uri.scheme in {"tls", "wss"} for server in self._server_pool)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        scheme = self._current_server.uri.scheme if self._current_server else ""
        # Over ws:// nats-py goes on in the clear even if the server says otherwise; wss:// is encrypted by now.
        encrypted = scheme == "wss" or (scheme != "ws" and info.get("tls_required"))
        asked = self.options.get("tls") or self._encrypted or scheme == "tls"
        if asked and not encrypted:
            raise Error("the server offers no TLS, and an address (tls://), COX_NATS_CA or _CERT asks for it")
        await super()._process_info(info, initial_connection)

    async def _process_op_err(self, e: Exception) -> None:
        if not self.options.get("allow_reconnect"):
            self._pending, self._pending_data_size = [], 0
        await super()._process_op_err(e)

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        try:
            await super()._process_msg(sid, _readable(subject), _readable(reply), data, headers)
        except Exception as error:  # noqa: BLE001 - nats-py's reader would end in silence
            await self._error_cb(error)

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            return await super()._process_headers(headers)
        except (ValueError, IndexError):
            return None


def _readable(name: bytes) -> bytes:
    return name if name.isascii() else name.decode(errors="replace").encode()
