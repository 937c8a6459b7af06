"""How to reach NATS: the same environment variables for workers, controllers and the command line.

Pure: reads a mapping, opens nothing. The shells turn it into a connection (`service/bus.py`,
`control/client.py`).
"""

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from coxswain.schemas.names import check_token

DEFAULT_URL: Final = "nats://127.0.0.1:4222"
DEFAULT_FLEET: Final = "main"


class AddressRefusedError(ValueError):
    """An address of NATS that is none; the text says which by its place, for it may hold a password."""


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """Where NATS is, who we are there, and which fleet is meant."""

    urls: tuple[str, ...] = (DEFAULT_URL,)
    fleet: str = DEFAULT_FLEET
    creds: str | None = None
    """Path of a credentials file (JWT and seed)."""
    nkey: str | None = None
    """Path of a file with an nkey seed."""
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    """Paths of PEM files; `ca` alone verifies the server, `cert` and `key` name us to it."""

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Connection":
        """Read the environment.

        `COX_NATS_URL` (several, comma-separated), `COX_FLEET`, and `COX_NATS_CREDS`, `COX_NATS_NKEY`,
        `COX_NATS_CA`, `COX_NATS_CERT`, `COX_NATS_KEY`; an empty variable counts as absent.

        Raises:
            NameRefusedError: if the fleet's name is not a subject token.
        """
        urls = tuple(url.strip() for url in env.get("COX_NATS_URL", "").split(",") if url.strip())
        return cls(
            urls=urls or (DEFAULT_URL,),
            fleet=check_token("fleet", env.get("COX_FLEET") or DEFAULT_FLEET),
            creds=env.get("COX_NATS_CREDS") or None,
            nkey=env.get("COX_NATS_NKEY") or None,
            ca=env.get("COX_NATS_CA") or None,
            cert=env.get("COX_NATS_CERT") or None,
            key=env.get("COX_NATS_KEY") or None,
        )

    def check(self) -> "Connection":
        """Return this, if every address can be one.

        Raises:
            AddressRefusedError: says which is not, and what one looks like.
        """
        for place, url in enumerate(self.urls, 1):
            try:
                parts = urlsplit(url if "://" in url else f"nats://{url}")
                why = "" if parts.hostname and parts.port != 0 else "no host, or port 0"
            except ValueError as error:
                why = str(error)
            if why:
                raise AddressRefusedError(
                    f"address {place} of {len(self.urls)} is not an address ({why}): "
                    "use nats://host:port, several separated by commas",
                )
        return self

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `nats.connect`, without TLS (the caller's, from `ca`, `cert`, `key`)."""
        options: dict[str, Any] = {"servers": list(self.urls)}
        if self.creds:
            options["user_credentials"] = self.creds
        if self.nkey:
            options["nkeys_seed"] = self.nkey
        return options
