"""Identity in a request id: how tenant and class travel from the HTTP edge to the scheduler.

vLLM hands the scheduler nothing of a request but its id, so the id carries who asks. The middleware makes it
and signs it; the scheduler believes only a signed one, so no client can name another tenant, with or
without the middleware in place. Shape: `cox.<tenant, percent-encoded>.<class>.<ULID>.<signature>`.
"""

import hashlib
import hmac
import re
from typing import Final, NamedTuple
from urllib.parse import quote, unquote

MARK: Final = "cox."
_ID = re.compile(
    r"cox\.([A-Za-z0-9_~%-]{1,384})\.([a-z0-9_-]{1,64})\.([0-9A-HJKMNP-TV-Z]{26})\.([0-9a-f]{16})"
)


class Identity(NamedTuple):
    """Who asks, for what class, and the public id of the request."""

    tenant: str
    class_: str
    request: str


def _sign(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()[:16]


def make(key: bytes, tenant: str, class_: str, ulid: str) -> str:
    """The public request id for a request of `tenant` in `class_` (both already checked)."""
    text = f"{MARK}{quote(tenant, safe='').replace('.', '%2E')}.{class_}.{ulid}"
    return f"{text}.{_sign(key, text)}"


def find(key: bytes, text: str) -> Identity | None:
    """The identity inside any longer id (`chatcmpl-cox.…-0-1a2b3c4d`); None if none or forged."""
    match = _ID.search(text)
    if match is None:
        return None
    public, tenant, class_ = match[0], match[1], match[2]
    if not hmac.compare_digest(_sign(key, public.rpartition(".")[0]), match[4]):
        return None
    return Identity(unquote(tenant), class_, public)
