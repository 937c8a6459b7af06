"""How to reach NATS: the same environment variables for workers, controllers and the command line.

Reads a mapping, and the file of a seed in `options`; opens nothing else. The shells turn it into a connection
(`service/bus/connect.py`, `control/transport.py`).
"""

import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from coxswain.schemas.names import check_token
from coxswain.schemas.permissions import INBOX

DEFAULT_URL: Final = "nats://127.0.0.1:4222"
DEFAULT_FLEET: Final = "main"
REDACTED: Final = "[redacted]"
"""Stands for a secret, in messages and logs."""
PING_INTERVAL_S: Final = 1.5
MAX_PINGS: Final = 2
"""A server that is silent for (MAX_PINGS + 1) x PING_INTERVAL_S, less at most one interval, is given up. So a client of
a frozen server has moved to another before workers give up their leader, which is after 5 s. Shorter would gain
nothing: a leader that cannot renew its lease has lost it by then. A stall of our own counts as one, however long."""

_USER: Final = re.compile(r"(^|,)(\s*(?:(?:nats|tls|wss?)://)?)[^,]*@", re.IGNORECASE)
"""All that stands in front of an address's last @, whatever it is: passwords hold anything."""
_SCHEMES: Final = ("nats", "tls", "ws", "wss")
_SEED: Final = re.compile("S[A-Z2-7]{40}|-----BEGIN ")
"""What may be a seed or another secret, given in place of its file's path: never to be shown."""


class AddressRefusedError(ValueError):
    """An address of NATS that cannot be one; the text says which by its place, since it may hold a password."""


class IdentityRefusedError(ValueError):
    """A file that should say who we are, or who the server is, cannot be used; the text never shows a secret."""


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
                usable = (
                    parts.scheme in _SCHEMES
                    and parts.hostname
                    and parts.port != 0
                    and url.count("@") == parts.netloc.count("@")
                )
            except ValueError:  # whose text quotes the address
                usable = False
            if not usable:
                raise AddressRefusedError(
                    f"address {place} of {len(self.urls)} has no host, no port from 1 to 65535, a scheme "
                    f"other than {', '.join(_SCHEMES)}, or a password with a /, ? or #: use nats://host:port, "
                    "several separated by commas",
                )
        return self

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `nats.connect`, without TLS (see `tls`).

        With an nkey, answers go to an inbox that has our public key in its name: only we may subscribe to it, and its
        prefix needs no setting.

        Raises:
            IdentityRefusedError: the seed's file cannot be read or has none, or the credentials stand in place of a
                path.
        """
        options: dict[str, Any] = {
            "servers": list(self.urls),
            "ping_interval": PING_INTERVAL_S,
            "max_outstanding_pings": MAX_PINGS,
        }
        if self.creds:
            _check_path("COX_NATS_CREDS", self.creds)
            options["user_credentials"] = self.creds
        if self.nkey:
            options["nkeys_seed"] = self.nkey
            options["inbox_prefix"] = f"{INBOX}.{public_nkey(self.nkey)}"
        return options

    def tls(self) -> ssl.SSLContext | None:
        """The TLS context for `ca`, `cert` and `key`, or None where neither is set.

        Raises:
            IdentityRefusedError: a file cannot be read or is not PEM.
        """
        if not (self.ca or self.cert):
            return None
        for name, path in (("CA", self.ca), ("CERT", self.cert), ("KEY", self.key)):
            _check_path(f"COX_NATS_{name}", path or "")
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.cert:
                context.load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(filter(None, (self.ca, self.cert, self.key)))
            raise IdentityRefusedError(
                f"TLS files cannot be used ({files}): {error}. Check COX_NATS_CA, _CERT and _KEY.",
            ) from error
        return context


def without_users(addresses: str) -> str:
    """Addresses of NATS, separated by commas, as messages and logs may show them: without user, password or token."""
    return _USER.sub(rf"\1\2{REDACTED}@", addresses)


def public_nkey(path: str) -> str:
    """The public key of the seed in a file; the seed itself is neither kept nor in any error.

    Raises:
        IdentityRefusedError: the file cannot be read or has no seed of a user.
    """
    import nkeys  # type: ignore[import-untyped]

    try:
        seed = bytearray(Path(path).read_bytes().strip())
        public: str = nkeys.from_seed(seed).public_key.decode()
    except OSError as error:
        _check_path("COX_NATS_NKEY", path)
        raise IdentityRefusedError(f"COX_NATS_NKEY: {path} cannot be read: {error.strerror}") from error
    except (nkeys.NkeysError, ValueError):
        raise IdentityRefusedError(f"COX_NATS_NKEY: {path} holds no nkey seed (SU…)") from None
    return public


def _check_path(name: str, path: str) -> None:
    """Before nats-py or an error quotes it."""
    if _SEED.search(path):
        raise IdentityRefusedError(f"{name} must be the path of a file, not what such a file holds") from None
