"""What can go wrong on the control side, for people: every message says what was wrong and what to do.

Refusals by a worker are not here: they are `coxswain.schemas.errors.RefusedError`, with its own text.
"""


class ControlError(Exception):
    """Something on the control side failed; the text is meant to be shown as it is."""


class UnreachableError(ControlError):
    """NATS could not be reached, refused us, or was lost."""


class DeniedError(UnreachableError):
    """NATS is there and does not let this user: its role may not do this."""


class UnreadableError(ControlError):
    """An answer means nothing to us: of another version of the protocol, or of somebody who is no worker."""


class NoAnswerError(ControlError):
    """NATS is there, but no worker answered."""


class NotSetUpError(ControlError):
    """The fleet's stream or a bucket is missing: `cox init` makes them."""


class JetStreamRefusedError(NotSetUpError):
    """JetStream is there and refused what was asked of it; the text has its reason."""


class RowError(ControlError):
    """A row of the tenant or class table is not valid; nothing was stored."""


class PolicyError(ControlError):
    """No such policy, or a parameter that it does not take."""
