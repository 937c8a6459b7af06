"""nats-py's client with the one habit that nobody of ours may lack: TLS where it was asked for, or nothing.

Called by `service/bus/connect.py` and `control/link.py`, which have more habits, each its own.
"""

from typing import Any

from nats.aio.client import Client
from nats.errors import Error


class NatsClient(Client):
    """Never goes on in the clear where TLS was asked for; nats-py's own does what the server says."""

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if self.options.get("tls") and not info.get("tls_required"):
            raise Error("the server offers no TLS, and COX_NATS_CA or _CERT asks for it")
        await super()._process_info(info, initial_connection)
