"""Identity in a request id: how tenant and class travel from the HTTP edge to the scheduler.

vLLM hands the scheduler nothing of a request but its id, so the id carries who asks. The edge makes it and
signs it; the scheduler believes only a signed one, so no client can name another tenant, with or without the
edge in place. Shape: `cox.<tenant, percent-encoded>.<class or nothing>.<ULID>.<signature>`.

Pure text work, no I/O. Called by `edge/core.py` and `edge/hook.py` (make, insert) and by the scheduler (parse).
The id that comes of it, and what else people may give for it, is `schemas/request_id.py`.
"""

import hmac
import re
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final, NamedTuple
from urllib.parse import quote, unquote

from coxswain.schemas.request_id import MARK, last_signed, normalise

KEY_VARIABLE: Final = "COX_IDENTITY_KEY"
"""Environment variable with the signing key in hexadecimal, the same in every process of a deployment."""
MIN_KEY_BYTES: Final = 16

_BLOCK: Final = 64
"""Bytes of a block of SHA-256."""
_INNER, _OUTER = (bytes(byte ^ pad for byte in range(256)) for pad in (0x36, 0x5C))

# What vLLM 0.32 puts around the id that a client sent (or its own uuid):
#   [<child>_]chatcmpl-<id>[_<prompt>][-<8 hex>]      [<child>_]cmpl-<id>-<prompt>[-<8 hex>]
#   [<child>_]resp_<id>_<turn>[-<8 hex>]              [<child>_]generate-tokens-<id>[-<8 hex>]
#   beam search: <any of these without suffix>-<uuid>-beam-<i>[-<8 hex>]
_CHILD = re.compile(r"\d+_(?=chatcmpl-|cmpl-|resp_|generate-tokens-)")
_SUFFIX = re.compile(r"-[0-9a-f]{8}\Z")
_BEAM = re.compile(r"-[0-9a-f]{32}-beam-\d+\Z")
_PROMPT = re.compile(r"-\d+\Z")
_TURN = re.compile(r"_\d+\Z")
# A chat's `_<prompt>` looks like the end of a client's own id (`job_7`): cut it only behind vLLM's uuid.
_UUID_PROMPT = re.compile(r"(?<=[0-9a-f]{32})_\d+\Z")


class Claim(NamedTuple):
    """What an internal id says: who asks for what class, if that is proven, and the public id that commands take."""

    tenant: str | None
    """None: nothing is proven."""
    class_: str
    """Empty: none is named."""
    request: str


def read_key(env: Mapping[str, str]) -> bytes | None:
    """The signing key of this process, or None if its environment has none (see `plugin.py`).

    Raises:
        ValueError: if it is not at least 32 hexadecimal digits.
    """
    text = env.get(KEY_VARIABLE, "").strip()
    if not text:
        return None
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) < MIN_KEY_BYTES:
        # Not the text itself: it may be most of a real key.
        raise ValueError(
            f"{KEY_VARIABLE} is not allowed: at least {2 * MIN_KEY_BYTES} hexadecimal digits are needed, "
            "as `openssl rand -hex 32` prints them",
        )
    return key


def _sign(key: bytes, text: str) -> str:
    # 64 bits: a forger has one try per HTTP request, and every try is a request that he pays for.
    inner, outer = _keyed(key)
    inner, outer = inner.copy(), outer.copy()
    inner.update(text.encode())
    outer.update(inner.digest())
    return str(outer.hexdigest()[:16])


@lru_cache(maxsize=8)
def _keyed(key: bytes) -> tuple[Any, Any]:
    """HMAC-SHA256 (RFC 2104) with its key set up: inner and outer hash.

    Every arriving request is checked on the engine's thread, and Python's `hmac.HMAC` takes twice the time: it copies
    three contexts for each of its own copies.
    """
    block = key.ljust(_BLOCK, b"\0") if len(key) <= _BLOCK else sha256(key).digest().ljust(_BLOCK, b"\0")
    return sha256(block.translate(_INNER)), sha256(block.translate(_OUTER))


def make(key: bytes, tenant: str, class_: str, ulid: str) -> str:
    """The public id for a request of `tenant` in `class_` (both already checked; the class may be empty)."""
    text = f"{MARK}{quote(tenant, safe='').replace('.', '%2E')}.{class_}.{ulid}"
    return f"{text}.{_sign(key, text)}"


def parse(key: bytes | None, internal_id: str) -> Claim:
    """Turn vLLM's internal request id into the public id and the identity.

    Never raises, whatever the text. Without a key nothing is proven: no claim has a tenant. Only the last
    id counts: text that a client chose (a body's `request_id`) can only stand before it.

    Args:
        key: the signing key, or None if this process has none.
        internal_id: the id as the scheduler sees it.
    """
    match = last_signed(internal_id)
    if match is None:
        # A client may send an empty id: then vLLM's own is what commands can name.
        return Claim(None, "", normalise(_strip(internal_id)) or normalise(internal_id))
    text, tenant, class_, signature = match.groups()
    public = match[0]
    # Compared as bytes of ASCII text, in constant time.
    if key is None or not hmac.compare_digest(_sign(key, text), signature):
        return Claim(None, "", public)
    return Claim(unquote(tenant) if "%" in tenant else tenant, class_, public)


def insert(internal_id: str, public: str) -> str:
    """Put a signed id into an internal id that lacks it, before vLLM's random suffix."""
    suffix = _SUFFIX.search(internal_id)
    cut = suffix.start() if suffix else len(internal_id)
    return f"{internal_id[:cut]}-{public}{internal_id[cut:]}"


def _strip(internal_id: str) -> str:
    """Take vLLM's own additions off an unsigned id, as far as they can be told from the client's text."""
    text = _CHILD.sub("", internal_id, count=1) if internal_id[:1].isdigit() else internal_id
    text = _SUFFIX.sub("", text)
    beam = _BEAM.search(text)
    if beam:
        text = text[: beam.start()]
    if text.startswith("cmpl-"):
        return _PROMPT.sub("", text)
    if text.startswith("resp_"):
        return _TURN.sub("", text)
    if text.startswith("chatcmpl-"):
        return _UUID_PROMPT.sub("", text)
    return text
