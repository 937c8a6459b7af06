"""What the HTTP edge decides: who asks, may they, for what class and priority.

Pure: no ASGI, no vLLM, no files. Called by `asgi.py` once per request; O(number of headers), bodies
are never looked at.

Who asks, in this order:
  1. a peer in `COX_TRUSTED_PROXIES` that sends the header named by `COX_TENANT_HEADER`: that tenant;
  2. with `COX_KEYS`: the owner of the API key (`Authorization: Bearer …` or `x-api-key`), else 401;
  3. otherwise tenant `default`.

Which paths: probes (`OPEN_PATHS`) and OPTIONS stay open to all and pass untouched. With `COX_KEYS`, the
serving API needs a key, and everything else (vLLM's administration, the docs pages) a key with `admin`.
"""

import ipaddress
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from coxswain.schemas.names import NameRefusedError, check_client, check_token
from coxswain.schemas.policy import INT32_MAX, INT32_MIN
from coxswain.service import request_id
from coxswain.service.config import SettingRefusedError
from coxswain.service.keys import Grant, Keyring

if TYPE_CHECKING:
    from coxswain.service.edge.caps import Passage

Headers = list[tuple[bytes, bytes]]
"""As in an ASGI scope: names in lower case."""
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

HEALTH: Final = "/health"
READY: Final = "/ready"
"""Ours: whether new requests should come here. vLLM's own probe says only whether the engine is alive."""
OPEN_PATHS: Final = frozenset({HEALTH, READY, "/ping", "/version", "/metrics"})
"""Probes: they tell nothing of tenants, except `/metrics` to whoever `sees_tenants`."""
_API_PREFIXES: Final = ("/v1/", "/v2/", "/cohere/")
_API_PATHS: Final = frozenset(
    {
        "/inference/v1/generate",
        "/invocations",
        "/tokenize",
        "/detokenize",
        "/classify",
        "/pooling",
        "/rerank",
        "/score",
        "/generative_scoring",
    },
)
_ADMIN_PATHS: Final = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""Administration that stands among the API's paths."""

_WITHOUT_ENGINE: Final = frozenset({"/tokenize", "/detokenize"})
_WITHOUT_ENGINE_ENDS: Final = ("/cancel", "/count_tokens", "/render", "/derender")
"""POST requests that the front end answers without an engine."""

CLASS_HEADER: Final = b"x-cox-class"
PRIORITY_HEADER: Final = b"x-vllm-priority"
ID_HEADER: Final = b"x-request-id"
CLIENT_ID_HEADER: Final = b"x-client-request-id"
MAX_CLIENT_ID: Final = 128
"""Characters of the client's own id that the response repeats."""
FORWARDED: Final = "FORWARDED_ALLOW_IPS"
"""uvicorn's: the peers whose X-Forwarded-For replaces their address; unset means loopback, empty means nobody."""
_LOOPBACK: Final = "127.0.0.0/8,::1/128"
_INT: Final = re.compile(rb"[+-]?[0-9]{1,10}")
_HEADER_NAME: Final = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,128}")


_KINDS: Final = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}


class Refusal(NamedTuple):
    """An HTTP answer instead of the request: a status and an OpenAI-style error."""

    status: int
    message: str
    retry_after_s: int | None = None

    @property
    def kind(self) -> str:
        """The error's `type`."""
        return _KINDS[self.status]


class RefusedRequestError(Exception):
    """The request may not pass; `refusal` is the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.refusal = Refusal(status, message)


class Ticket(NamedTuple):
    """What goes along with an admitted request, out of the client's reach (a context variable)."""

    request: str
    """The signed public id."""
    priority_min: int
    priority_max: int
    """Where the header named a priority, both are that."""
    passage: "Passage | None" = None
    """Told when the engine is given what the request asks for."""


class Admitted(NamedTuple):
    """A request that may pass, with the headers that vLLM is to see."""

    ticket: Ticket
    headers: Headers
    tenant: str
    class_: str
    """The class that it may be in, by its header or its key; empty: the tenant table says."""


class EdgeSettings(NamedTuple):
    """The edge's part of the environment."""

    key: bytes
    """Signs request ids."""
    keys: Path | None = None
    tenant_header: bytes | None = None
    trusted: tuple[Network, ...] = ()

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "EdgeSettings":
        """Read `COX_IDENTITY_KEY`, `COX_KEYS`, `COX_TENANT_HEADER` and `COX_TRUSTED_PROXIES` (CIDRs).

        Raises:
            SettingRefusedError: for the first value that is not allowed; a missing signing key too, since
                without it every tenant would silently be `default`.
        """
        try:
            key = request_id.read_key(env)
        except ValueError as error:
            raise SettingRefusedError(str(error)) from error
        if key is None:
            raise SettingRefusedError(
                f"{request_id.KEY_VARIABLE} is not set: vLLM did not load the plugin `coxswain`; if "
                "VLLM_PLUGINS is set, add coxswain to it, or set the variable to the same key "
                "(`openssl rand -hex 32`) on every node",
            )
        keys = env.get("COX_KEYS")
        return cls(key, Path(keys) if keys else None, _tenant_header(env), _networks(env))


def _tenant_header(env: Mapping[str, str]) -> bytes | None:
    name = env.get("COX_TENANT_HEADER", "").strip().lower()
    if name and not _HEADER_NAME.fullmatch(name):
        raise SettingRefusedError(f"COX_TENANT_HEADER is {name!r}: not the name of an HTTP header")
    if name and env.get(FORWARDED):
        raise SettingRefusedError(
            f"{FORWARDED} is {env[FORWARDED]!r}, and COX_TENANT_HEADER is set: X-Forwarded-For could then name a "
            f"trusted proxy's address. Unset {FORWARDED}: COX_TRUSTED_PROXIES alone names the proxies",
        )
    return name.encode() or None


def _networks(env: Mapping[str, str]) -> tuple[Network, ...]:
    text = env.get("COX_TRUSTED_PROXIES", _LOOPBACK)
    try:
        return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise SettingRefusedError(
            f"COX_TRUSTED_PROXIES: {error}: use networks as in 10.0.0.0/8,fd00::/8",
        ) from error


class Edge:
    """The decisions for one server.

    Args:
        settings: from the environment.
        keys: where keys are looked up, or None if nobody needs one.
    """

    def __init__(self, settings: EdgeSettings, keys: Keyring | None = None) -> None:
        self._key = settings.key
        self._header = settings.tenant_header
        self._trusted = settings.trusted
        self._keys = keys
        self._ours = {ID_HEADER, PRIORITY_HEADER, CLASS_HEADER, *filter(None, (self._header,))}

    @staticmethod
    def is_open(method: str, path: str) -> bool:
        """Whether a request passes untouched: a probe, or a browser's preflight, which carries no key."""
        return method == "OPTIONS" or _tidy(path) in OPEN_PATHS

    @staticmethod
    def asks_engine(method: str, path: str) -> bool:
        """Whether a request becomes work for an engine: what caps on queues and draining are about."""
        path = _tidy(path)
        return (
            method == "POST"
            and is_api(path)
            and path not in _WITHOUT_ENGINE
            and not path.endswith(_WITHOUT_ENGINE_ENDS)
        )

    def sees_tenants(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether `/metrics` may tell of tenants: with `COX_KEYS`, to a key with `metrics` or `admin` only."""
        if self._keys is None:
            return True
        key = _secret(headers)
        grant = None if key is None else self._keys.find(key)
        return grant is not None and (grant.metrics or grant.admin)

    def anonymous_id(self, ulid: str) -> str:
        """A public id for a request that is refused before anybody knows who asks."""
        return request_id.make(self._key, "default", "", ulid)

    def admit(
        self, headers: Iterable[tuple[bytes, bytes]], path: str, peer: str | None, ulid: str
    ) -> Admitted:
        """Decide about one request.

        Args:
            headers: the client's, names in lower case.
            path: the path without the server's root path.
            peer: the address that the connection comes from; None for a Unix socket.
            ulid: a fresh one.

        Raises:
            RefusedRequestError: 400 malformed header, 401 no such key, 403 not allowed.
        """
        kept: Headers = []
        taken: dict[bytes, bytes] = {}
        for name, value in headers:
            if name not in self._ours:
                kept.append((name, value))
            elif name in taken and name != ID_HEADER:
                raise RefusedRequestError(400, f"header {name.decode()} is given twice")
            else:
                taken[name] = value
        grant = self._who(kept, taken, peer)
        if self._keys is not None and not grant.admin and not is_api(path):
            raise RefusedRequestError(
                403, "this path is not part of the serving API: it needs a key with `admin`"
            )
        class_ = _class(grant, taken.get(CLASS_HEADER))
        public = request_id.make(self._key, grant.tenant, class_, ulid)
        kept.append((ID_HEADER, public.encode()))
        priority = _priority(grant, taken.get(PRIORITY_HEADER))
        least, most = grant.priority_min, grant.priority_max
        if priority is not None:
            kept.append((PRIORITY_HEADER, b"%d" % priority))
            # For the paths where vLLM does not read the header: batches, scores, tokens in, tokens out.
            least = most = priority
        ticket = Ticket(public, least, most)
        return Admitted(ticket, kept, grant.tenant, class_)

    def _who(self, headers: Headers, taken: dict[bytes, bytes], peer: str | None) -> Grant:
        named = taken.get(self._header) if self._header else None
        if named is not None and self._trusts(peer):
            return Grant(tenant=_tenant(named))
        if self._keys is None:
            return Grant()
        key = _secret(headers)
        if key is None:
            raise RefusedRequestError(
                401, "no API key: send it as `Authorization: Bearer …` or `x-api-key: …`"
            )
        grant = self._keys.find(key)
        if grant is None:
            raise RefusedRequestError(401, "this API key is not known here, or was revoked")
        return grant

    def _trusts(self, peer: str | None) -> bool:
        if peer is None:
            # A Unix socket has no address; its file's permissions say who may connect, as for loopback.
            peer = "127.0.0.1"
        try:
            address = ipaddress.ip_address(peer)
        except ValueError:
            return False
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        return any(address in network for network in self._trusted)


def client_id(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The client's own X-Request-Id as a response may repeat it: printable ASCII, cut at 128."""
    value = next((value for name, value in headers if name == ID_HEADER), None)
    if value is None:
        return None
    return bytes(byte for byte in value[:MAX_CLIENT_ID] if 0x20 <= byte < 0x7F).strip() or None


def _tidy(path: str) -> str:
    return path if path == "/" else path.removesuffix("/")


def is_api(path: str) -> bool:
    """Whether a path is part of the serving API, which any key opens."""
    path = _tidy(path)
    return path in _API_PATHS or (path.startswith(_API_PREFIXES) and path not in _ADMIN_PATHS)


def _secret(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The API key in the headers: a bearer token before `x-api-key`."""
    found = None
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer" and key.strip():
                return key.strip().decode("latin-1")
        elif name == b"x-api-key" and value:
            found = value.decode("latin-1")
    return found


def _tenant(value: bytes) -> str:
    try:
        return check_client(value.decode())
    except (UnicodeDecodeError, NameRefusedError) as error:
        raise RefusedRequestError(400, f"the tenant header is not allowed: {error}") from error


def _class(grant: Grant, asked: bytes | None) -> str:
    if asked is None:
        return grant.class_
    try:
        name = check_token("class", asked.decode("latin-1"))
    except NameRefusedError as error:
        raise RefusedRequestError(400, f"X-Cox-Class: {error}") from error
    if grant.classes is None or name == grant.class_ or name in grant.classes:
        return name
    allowed = ", ".join(sorted({*grant.classes, *filter(None, (grant.class_,))})) or "none"
    raise RefusedRequestError(
        403, f"X-Cox-Class: class {name!r} is not allowed for this key; allowed: {allowed}"
    )


def _priority(grant: Grant, asked: bytes | None) -> int | None:
    if asked is None:
        return None
    if not _INT.fullmatch(asked) or not INT32_MIN <= int(asked) <= INT32_MAX:
        raise RefusedRequestError(
            400, f"X-Vllm-Priority: a whole number from {INT32_MIN} to {INT32_MAX} is allowed"
        )
    return min(max(int(asked), grant.priority_min), grant.priority_max)
