"""What may come in: every check of a message that needs no state of the engine.

Pure: bytes and a clock's reading in, something for the engine or a refusal out. What needs state (the order
of epochs, targets, repeated ids, incarnations) is the engine's to check. Called by `session.py`.
"""

from typing import Final

import msgspec

from coxswain.schemas.commands import MAX_AHEAD_S, Command, Preempt, Rank, Reply, decode
from coxswain.schemas.errors import CODE_HEADER, ERROR_HEADER, UNREADABLE, Code, RefusedError
from coxswain.schemas.names import ALL
from coxswain.schemas.policy import Epoch, Lead
from coxswain.schemas.status import MAX_PAGE, QueueQuery, RequestQuery
from coxswain.schemas.subjects import CONTROLLER, QUERIES, ROLES, CommandSubject

MAX_PAYLOAD: Final = 1024 * 1024
"""Bytes of one message: NATS's own default. Decoding more would take the interpreter away from the engine."""
AHEAD_GRACE_S: Final = 1.0
"""How far the sender's clock may run ahead before a full minute of deadline is refused."""
MAX_EPOCH_AHEAD_S: Final = 300.0
"""How far in our future the bucket of an epoch may have been made. An epoch is only ever superseded by a higher
one: an absurd one, once believed, would shut out every controller until this worker restarts."""

_decode_lead = msgspec.json.Decoder(Lead).decode
_decode_queue = msgspec.json.Decoder(QueueQuery).decode
_decode_request = msgspec.json.Decoder(RequestQuery).decode


class _Named(msgspec.Struct):
    id: str = ""


_decode_named = msgspec.json.Decoder(_Named).decode


def command(subject: CommandSubject, payload: bytes, now: float) -> tuple[Command, tuple[str, ...]]:
    """The command in a payload, and the fields that were ignored.

    Args:
        subject: who asks whom for what.
        payload: JSON.
        now: this worker's clock (Unix s).

    Raises:
        RefusedError: 413, 403, 400 or 410, in this order.
    """
    _check_size(payload)
    if subject.role not in ROLES:
        raise RefusedError(Code.ROLE, f"role {subject.role!r} may not command: one of {', '.join(ROLES)}")
    asked, ignored = decode(subject.verb, payload)
    _check_deadline(subject.role, asked, now)
    if subject.role == CONTROLLER:
        if asked.epoch is None:
            raise RefusedError(
                Code.MALFORMED, "epoch is missing: a controller's commands carry its lease's epoch"
            )
        if (ahead_s := epoch_ahead_s(asked.epoch, now)) is not None:
            raise RefusedError(
                Code.STALE,
                f"epoch {list(asked.epoch)} lies {ahead_s:.6g} s ahead of this worker's clock and is not believed "
                f"(at most {MAX_EPOCH_AHEAD_S:g} s): its first number is when the lease's bucket was made, in Unix s",
            )
        if isinstance(asked, Preempt) and asked.lease_s is None:
            raise RefusedError(Code.MALFORMED, "lease_s is missing: a controller's holds end by themselves")
    if isinstance(asked, Rank) and subject.worker == ALL:
        raise RefusedError(
            Code.MALFORMED, "rank is for one worker, never for all: bases differ between workers"
        )
    return asked, ignored


def query(what: str, payload: bytes) -> QueueQuery | RequestQuery | None:
    """The question in a payload; None where the subject says it all.

    Raises:
        RefusedError: 413 or 400.
    """
    _check_size(payload)
    if what not in QUERIES:
        raise RefusedError(Code.MALFORMED, f"unknown query {what!r}: one of {', '.join(QUERIES)}")
    try:
        if what == "queue":
            asked = _decode_queue(payload or b"{}")
            if not 1 <= asked.limit <= MAX_PAGE:
                raise RefusedError(
                    Code.MALFORMED, f"queue: limit is {asked.limit}: 1 to {MAX_PAGE} is allowed"
                )
            return asked
        return _decode_request(payload or b"{}") if what == "request" else None
    except UNREADABLE as error:
        raise RefusedError(Code.MALFORMED, f"{what}: {error}") from error


def lead(payload: bytes) -> Lead | None:
    """The leader's heartbeat in a payload, or None if it is not one."""
    if len(payload) > MAX_PAYLOAD:
        return None
    try:
        return _decode_lead(payload)
    except UNREADABLE:
        return None


def epoch_ahead_s(epoch: Epoch, now: float) -> float | None:
    """How far an epoch that nobody can have lies in the future, or None for one that may be believed."""
    ahead_s = epoch[0] - now
    return ahead_s if ahead_s > MAX_EPOCH_AHEAD_S else None


def answerable(reply: str) -> bool:
    """Whether an answer may go to a subject: whoever asks chooses it, and NATS would let us publish there.

    Not to our own subjects, JetStream's, or a table's rows. A message that JetStream delivers has such a reply subject
    too: a stored command is one from the past.
    """
    return not reply.startswith(("cox.", "$"))


def refusal(
    error: RefusedError,
    payload: bytes,
    *,
    worker: str,
    incarnation: str,
    now: float,
    step: int,
) -> Reply:
    """The reply that says why a command was refused; its `id` is the command's as far as it can be read."""
    return Reply(
        id=_named(payload),
        worker=worker,
        incarnation=incarnation,
        worker_now=now,
        step=step,
        outcome="rejected",
        code=int(error.code),
        error=error.message,
    )


def error_headers(code: int, text: str) -> dict[str, str]:
    """The headers by which NATS tools know a refusal (ADR-32), the text cut to a header's size."""
    return {CODE_HEADER: str(int(code)), ERROR_HEADER: text[:512]}


def _named(payload: bytes) -> str:
    if len(payload) > MAX_PAYLOAD:
        return ""
    try:
        return _decode_named(payload).id[:64]
    except UNREADABLE:
        return ""


def _check_size(payload: bytes) -> None:
    if len(payload) > MAX_PAYLOAD:
        raise RefusedError(
            Code.TOO_LARGE, f"payload has {len(payload)} bytes, at most {MAX_PAYLOAD}: split it"
        )


def _check_deadline(role: str, asked: Command, now: float) -> None:
    if asked.expires_at is None:
        if role == CONTROLLER:
            raise RefusedError(
                Code.MALFORMED, "expires_at is missing: a controller's commands never apply late"
            )
        return
    ahead_s = asked.expires_at - now
    if ahead_s > MAX_AHEAD_S + AHEAD_GRACE_S:
        raise RefusedError(
            Code.MALFORMED,
            f"expires_at is {ahead_s:.6g} s ahead of this worker's clock (see worker_now), "
            f"at most {MAX_AHEAD_S:g} s are allowed",
        )
    if ahead_s < 0:
        raise RefusedError(Code.EXPIRED, f"expires_at passed {-ahead_s:.3f} s ago by this worker's clock")
