"""nats-py's client with the habits that nobody of ours may lack: TLS where it was asked for, and an orderly end.

Called by `service/bus/connect.py` and `control/link.py`, which have more habits, each its own.
"""

from typing import Any

from nats.aio.client import Client
from nats.errors import Error


class NatsClient(Client):
    """Never goes on in the clear where TLS was asked for; nats-py's own does what the server says.

    A connection that breaks with bytes unsent is closed as any other; nats-py (2.15, `_close`) writes them into it once
    more, which uvloop answers with a RuntimeError: nobody would be told, and its subscriptions never end.
    """

    @property
    def unsent(self) -> int:
        """Bytes that wait for a server which does not read; nats-py counts those alone that its transport lacks."""
        writer = getattr(self._transport, "_io_writer", None)
        return self._pending_data_size + (
            writer.transport.get_write_buffer_size() if writer is not None else 0
        )

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if self.options.get("tls") and not info.get("tls_required"):
            raise Error("the server offers no TLS, and COX_NATS_CA or _CERT asks for it")
        await super()._process_info(info, initial_connection)

    async def _process_op_err(self, e: Exception) -> None:
        if not self.options.get("allow_reconnect"):
            self._pending, self._pending_data_size = [], 0
        await super()._process_op_err(e)
