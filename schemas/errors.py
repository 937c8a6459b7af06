"""Refusals: the numeric codes that a reply can carry, the one exception that carries them, and `UNREADABLE`.

A refused command changes nothing. The code also travels in the header `Nats-Service-Error-Code` and the
text in `Nats-Service-Error`, as NATS services do (ADR-32), so that any NATS tool shows them.
"""

from enum import IntEnum
from typing import Final

import msgspec

ERROR_HEADER = "Nats-Service-Error"
CODE_HEADER = "Nats-Service-Error-Code"

UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding untrusted bytes can raise. msgspec has no error of its own for text that is not UTF-8, nor for brackets
nested too deep: code that catches `MsgspecError` alone dies of either."""


class Code(IntEnum):
    """Why a command was refused. The values follow HTTP where HTTP has a word for it."""

    MALFORMED = 400
    """A field is missing or wrong; the text names it."""
    ROLE = 403
    """The subject's role may not use this verb."""
    NOT_FOUND = 404
    """No such request or class (never said of a tenant)."""
    STALE = 409
    """An older epoch than the newest seen, another incarnation, or no leader heard yet."""
    EXPIRED = 410
    """`expires_at` has passed; never applied late."""
    TOO_LARGE = 413
    """More than 10,000 targets, or a payload over the server's limit."""
    NOT_POSSIBLE = 422
    """The target exists but cannot do this now; the text says why."""
    QUEUE_FULL = 429
    """The worker's command queue is full; nothing was queued."""
    CLOSING = 503
    """The worker is draining or shutting down."""


class RefusedError(Exception):
    """A command was refused: `code` says why, the text what was wrong and what to do."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
