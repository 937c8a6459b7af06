"""Names that cross the wire: what a fleet, worker, class, role or tenant may be called.

Called by whoever reads configuration or a payload. A name that becomes part of a subject is a *token*;
a tenant travels in payloads only and may be any short text.
"""

import base64
import re
from typing import Annotated

import msgspec

DEFAULT = "default"
"""The tenant of requests without identity, and the class of requests that name none."""
ALL = "all"
OTHER = "other"
"""The account shared by tenants for which a worker has none left; in metrics, the label of the rest."""
RESERVED = frozenset({ALL, OTHER})

MAX_TENANT_BYTES = 128
MAX_TOKEN_CHARS = 64

_TOKEN = re.compile(r"[a-z0-9_-]{1,64}")
_NOT_TOKEN = re.compile(r"[^a-z0-9_-]+")

Token = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9_-]{1,64}(?!\n)$")]
"""A subject token: a fleet, worker, class or role name. (A bare `$` would allow a newline at the end.)"""
TenantName = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TENANT_BYTES)]
"""A tenant: any UTF-8 of 1 to 128 bytes (a schema can only bound characters; `check_tenant` bounds bytes)."""

RequestId = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
"""A request, as clients and commands name it."""
MAX_LABEL_CHARS = 128
Label = Annotated[str, msgspec.Meta(max_length=MAX_LABEL_CHARS)]
"""What a program calls itself, for people to read."""


class NameRefusedError(ValueError):
    """A name that the contract does not allow; the text says which, why, and what is allowed."""


def check_token(kind: str, name: str) -> str:
    """Return `name` if it may be a subject token; `kind` says what it names ("worker", "fleet", "class").

    Raises:
        NameRefusedError: for other characters, more than 64 of them, none, or a reserved name.
    """
    if not _TOKEN.fullmatch(name):
        raise NameRefusedError(
            f"{kind} name {name!r} is not allowed: use 1 to {MAX_TOKEN_CHARS} of the characters a-z 0-9 _ -",
        )
    if name in RESERVED:
        raise NameRefusedError(f"{kind} name {name!r} is reserved: choose another")
    return name


def is_class(name: str) -> bool:
    """Whether there can be a class of that name."""
    try:
        check_token("class", name)
    except NameRefusedError:
        return False
    return True


def sanitise_token(name: str) -> str:
    """Turn any text (a host name) into a token: lower case, other characters become `-`; may be empty."""
    return _NOT_TOKEN.sub("-", name.lower()).strip("-")[:MAX_TOKEN_CHARS]


def check_tenant(name: str) -> str:
    """Return `name` if it may be a tenant.

    Raises:
        NameRefusedError: if it is empty, longer than 128 bytes in UTF-8, or not encodable.
    """
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise NameRefusedError(f"tenant {name!r} is not valid UTF-8") from error
    if not 0 < size <= MAX_TENANT_BYTES:
        raise NameRefusedError(f"tenant name has {size} bytes: 1 to {MAX_TENANT_BYTES} are allowed")
    return name


def check_client(tenant: str) -> str:
    """Return `tenant` if a client may be it: any tenant but `OTHER`, whose account is shared.

    Raises:
        NameRefusedError: as `check_tenant`, and for the reserved name.
    """
    if tenant == OTHER:
        raise NameRefusedError(f"tenant name {tenant!r} is reserved: choose another")
    return check_tenant(tenant)


def is_tenant(name: str) -> bool:
    """Whether there can be a tenant of that name."""
    try:
        check_tenant(name)
    except NameRefusedError:
        return False
    return True


def tenant_key(tenant: str) -> str:
    """The tenant's key in the KV bucket: base64url of its name, without padding."""
    return base64.urlsafe_b64encode(tenant.encode()).decode().rstrip("=")


def tenant_of_key(key: str) -> str:
    """The inverse of `tenant_key`.

    Raises:
        NameRefusedError: if the key is not base64url of a tenant name.
    """
    try:
        tenant = base64.urlsafe_b64decode(key + "=" * (-len(key) % 4)).decode()
    except ValueError as error:
        raise NameRefusedError(f"KV key {key!r} is not base64url of a tenant name") from error
    if tenant_key(tenant) != key:  # the decoder skips characters that it does not know
        raise NameRefusedError(f"KV key {key!r} is not base64url of a tenant name")
    return check_tenant(tenant)
