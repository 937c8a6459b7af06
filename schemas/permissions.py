"""Who may publish and hear what: the subjects of every role, as NATS permissions are given on them.

Pure. `control/auth.py` makes the server's configuration of it, `docs/protocol.md` shows it, the tests hold a
real server to it. Least permission: what a role's own programs do, and nothing else.

Two accounts keep what is stored apart from what is said. JetStream lives in one without users of ours; the roles
live in the other and reach it through `crossing` alone. That is not for neatness: a publisher chooses the subject of
the answer, and NATS does not check whether it may publish there. With tables and workers in one account, an
event's acknowledgement could be sent into a row of the tenant table. Answers from the other account end in
this one's subjects, and none of those is stored.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from coxswain.schemas.subjects import CONTROLLER, OPERATOR, Subjects

WORKER: Final = "worker"
VIEWER: Final = "viewer"
EDGE: Final = "edge"
ADMIN: Final = "admin"
INBOX: Final = "_INBOX"
"""Answers to a user with an nkey go to `_INBOX.<its public key>.>`, which nobody else may hear."""
SERVICE: Final = "coxswain-worker"
"""The name by which NATS's service discovery knows workers."""

_DISCOVERY: Final = ("$SRV.*", f"$SRV.*.{SERVICE}", f"$SRV.*.{SERVICE}.*")


class Rights(NamedTuple):
    """What one user may publish, and hear beside its own inbox."""

    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()


def rights(subjects: Subjects, role: str, workers: Sequence[str] = ()) -> Rights:
    """The rights of a role in one fleet.

    Args:
        subjects: of the fleet.
        role: one of `ROLES`.
        workers: for role `worker`, the names that it may use: one, or one per data-parallel rank.

    Raises:
        KeyError: if there is no such role.
    """
    return _worker(subjects, workers) if role == WORKER else _ROLES[role](subjects)


def crossing(subjects: Subjects) -> tuple[str, ...]:
    """What the account of the roles may ask of the account with JetStream; who may is said by `rights`.

    The API as a whole: for a part of it the server (2.12 to 2.15) looks for JetStream in the asking account.
    """
    buckets = (subjects.lease_bucket, subjects.tenants_bucket, subjects.classes_bucket)
    stored = (f"$KV.{bucket}.>" for bucket in buckets)
    return ("$JS.API.>", "$JS.FC.>", *stored, f"{subjects.root}.event.*.*")


def _worker(subjects: Subjects, workers: Sequence[str]) -> Rights:
    publish: list[str] = []
    subscribe: list[str] = []
    for name in workers:
        publish += [subjects.status(name), subjects.event(name, "*")]
        subscribe += [*subjects.commands_of(name), *subjects.queries_of(name), subjects.status(name)]
        subscribe.append(subjects.event(name, "*"))  # its own HTTP edge makes spans of them
    # Answers: spelt out, for `allow_responses` would let whoever asks choose any subject, a table's row too.
    return Rights((*publish, f"{INBOX}.>"), (*dict.fromkeys(subscribe), subjects.lead, *_DISCOVERY))


def _controller(subjects: Subjects) -> Rights:
    stored = (subjects.lease_bucket, subjects.tenants_bucket, subjects.classes_bucket)
    return Rights(
        (
            f"{subjects.root}.cmd.{CONTROLLER}.>",
            f"{subjects.root}.query.*.queue",
            subjects.lead,
            f"$KV.{subjects.lease_bucket}.leader",
            *_read(f"KV_{bucket}" for bucket in stored),
        ),
        (subjects.status_all,),
    )


def _operator(subjects: Subjects) -> Rights:
    looking = _viewer(subjects)
    return Rights(
        (
            f"{subjects.root}.cmd.{OPERATOR}.>",
            f"$KV.{subjects.tenants_bucket}.>",
            f"$KV.{subjects.classes_bucket}.>",
            *looking.publish,
        ),
        looking.subscribe,
    )


def _viewer(subjects: Subjects) -> Rights:
    return Rights(
        (f"{subjects.root}.query.*.*", *_DISCOVERY, *_read(streams(subjects))),
        (subjects.status_all, subjects.events_all, subjects.lead),
    )


def _edge(subjects: Subjects) -> Rights:
    return Rights(subscribe=(subjects.status_all, subjects.events_all))  # events: spans are made of them


def _admin(subjects: Subjects) -> Rights:
    verbs = ("INFO", "CREATE", "UPDATE", "DELETE", "PURGE")
    return Rights(tuple(f"$JS.API.STREAM.{verb}.{stream}" for stream in streams(subjects) for verb in verbs))


_ROLES: Final[dict[str, Callable[[Subjects], Rights]]] = {
    CONTROLLER: _controller,
    OPERATOR: _operator,
    VIEWER: _viewer,
    EDGE: _edge,
    ADMIN: _admin,
}
ROLES: Final = (WORKER, *_ROLES)
"""Every role that a user can have."""


def streams(subjects: Subjects) -> tuple[str, ...]:
    """The event log and the streams under the three buckets."""
    buckets = (subjects.lease_bucket, subjects.tenants_bucket, subjects.classes_bucket)
    return (subjects.stream, *(f"KV_{bucket}" for bucket in buckets))


def _read(stored: Iterable[str]) -> tuple[str, ...]:
    """Reading streams: what they are, one message, and a push consumer into one's own inbox.

    No pull consumer and no direct get: both send what a stranger stored to a subject of the reader's choice.
    """
    return tuple(
        subject
        for stream in stored
        for subject in (
            f"$JS.API.STREAM.INFO.{stream}",
            f"$JS.API.STREAM.MSG.GET.{stream}",
            f"$JS.API.CONSUMER.CREATE.{stream}",
            f"$JS.API.CONSUMER.CREATE.{stream}.>",
            f"$JS.API.CONSUMER.INFO.{stream}.*",
            f"$JS.API.CONSUMER.DELETE.{stream}.*",
            f"$JS.FC.{stream}.>",
        )
    )
