"""Events: what happened to requests, one struct per kind, kept by a JetStream stream.

`seq` counts all kinds per incarnation and is given before the bounded queue, so a gap is a drop.
`id` = `worker:incarnation:seq` is also the `Nats-Msg-Id`: JetStream stores a repeated one once.
"""

from typing import Any, Final

import msgspec

from coxswain.schemas.policy import Epoch


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="event"):
    """The envelope of every event. Events that concern no request have null request fields."""

    id: str
    """`worker:incarnation:seq`: nobody else has it."""
    worker: str
    incarnation: str
    """One life of the worker, a ULID: of two, the later started is the greater."""
    seq: int
    """Counts every event of the incarnation, from 1."""
    at: float
    """When it happened: Unix s by the worker's clock, which never jumps."""
    step: int
    """The engine's last step by then."""
    request: str | None = None
    """The request's public id."""
    child: int | None = None
    """Which of its completions, from 0."""
    tenant: str | None = None
    class_: str | None = msgspec.field(default=None, name="class")
    priority: int | None = None
    """As they are now; null where no request is concerned."""


class Queued(Event, frozen=True, kw_only=True, tag="queued"):
    """The request joined the queue. What it met there tells later why it waited."""

    prompt_tokens: int
    waiting: int = 0
    """Requests that waited here already, its own tenant's among them."""
    tenant_waiting: int = 0
    """Of these: its own tenant's."""
    running: int = 0
    """Requests that ran here."""
    virtual_time: float | None = None
    """Its tenant's; in a `fair` class the lowest goes next."""
    next_request: str | None = None
    """The request that was to run next; null: nothing waited."""
    next_tenant: str | None = None
    next_class: str | None = None
    next_priority: int | None = None
    next_virtual_time: float | None = None
    """Of that request: its tenant, class and priority, and its tenant's virtual time."""


class Admitted(Event, frozen=True, kw_only=True, tag="admitted"):
    """The request runs from this step on: first admission, or again after a drop.

    Resumed, its "input" is all that it had computed: what of it must be computed again, and what is there.
    """

    uncached_input_tokens: int
    cached_input_tokens: int
    external_input_tokens: int = 0
    """Of the cached ones: loaded by a KV connector; the others were in the prefix cache, or had been kept."""
    queued_s: float
    resumed: bool = False
    virtual_time: float | None = None
    """Its tenant's, this input charged."""
    waiting: int = 0
    """Requests that go on waiting."""


class FirstToken(Event, frozen=True, kw_only=True, tag="first_token"):
    """The first output token was delivered."""

    ttft_s: float


class Held(Event, frozen=True, kw_only=True, tag="held"):
    """A hold was applied or replaced."""

    by: str
    """The role: `operator`, `controller`, or `engine` where the scheduler itself made room."""
    kv: str
    reason: str
    lease_s: float | None
    in_flight_tokens: int = 0
    output_tokens: int = 0


class Parked(Event, frozen=True, kw_only=True, tag="parked"):
    """A held request gave back its slot and kept its KV."""

    reason: str = ""


class Dropped(Event, frozen=True, kw_only=True, tag="dropped"):
    """A held request's KV was freed."""

    reason: str
    computed_tokens: int
    """Positions that continue must recompute, unless a cache has them."""


class Continued(Event, frozen=True, kw_only=True, tag="continued"):
    """The last hold ended."""

    by: str
    reason: str
    """`command`, `lease`, `failover`, `drain` or `room`."""
    held_s: float
    output_tokens: int = 0


class Preempted(Event, frozen=True, kw_only=True, tag="preempted"):
    """Its KV was freed and it waits again: vLLM wanted KV blocks, a cut-in did, or the prefix cache was reset."""

    reason: str


class Reprioritized(Event, frozen=True, kw_only=True, tag="reprioritized"):
    """Priority or class changed."""

    from_priority: int
    to_priority: int
    from_class: str
    to_class: str
    by: str


class Limited(Event, frozen=True, kw_only=True, tag="limited"):
    """A cap changed."""

    by: str
    detail: str


class Finished(Event, frozen=True, kw_only=True, tag="finished"):
    """The request ended.

    Positions that the device computed for it = uncached input − uncomputed input + recomputed + output
    − generations + discarded.
    """

    reason: str
    uncached_input_tokens: int
    cached_input_tokens: int
    external_input_tokens: int = 0
    """Of the cached input: loaded by a KV connector."""
    uncomputed_input_tokens: int = 0
    """Of the uncached input: never computed, because the request ended before, or lost its KV and found more in a
    cache when it went on."""
    output_tokens: int
    generations: int = 1
    """0 without any output; in a streaming session, one for every turn that said anything."""
    recomputed_tokens: int
    """Positions computed again after their KV was lost."""
    restored_tokens: int = 0
    """Positions found in the prefix cache after their KV was lost."""
    reloaded_tokens: int = 0
    """Positions loaded by a KV connector after their KV was lost."""
    discarded_tokens: int = 0
    """Positions computed for nothing: in flight when the request ended, or drafts that were rejected."""
    queued_s: float
    ttft_s: float | None
    held_s: float
    run_s: float


class CommandSeen(Event, frozen=True, kw_only=True, tag="command"):
    """A command was applied or refused."""

    command: str
    verb: str
    role: str
    issuer: str
    outcome: str
    counts: dict[str, int] = {}
    code: int | None = None
    error: str | None = None
    reason: str = ""
    """Of an `abort`: why, in the issuer's words."""


class LeaderChanged(Event, frozen=True, kw_only=True, tag="leader_changed"):
    """A new leader was accepted, or the leader fell silent (null epoch)."""

    epoch: Epoch | None
    reason: str


KINDS: Final[dict[str, type[Event]]] = {
    struct.__struct_config__.tag: struct  # type: ignore[misc]
    for struct in (
        Queued,
        Admitted,
        FirstToken,
        Held,
        Parked,
        Dropped,
        Continued,
        Preempted,
        Reprioritized,
        Limited,
        Finished,
        CommandSeen,
        LeaderChanged,
    )
}

_decoders: Final = {kind: msgspec.json.Decoder(struct) for kind, struct in KINDS.items()}
_any: Final = msgspec.json.Decoder()


def decode_event(payload: bytes) -> Event | dict[str, Any]:
    """The event in a payload; a kind of a later version comes as a plain dict.

    Raises:
        errors.UNREADABLE: if the payload is not JSON or does not fit its kind.
    """
    raw = _any.decode(payload)
    if not isinstance(raw, dict):
        raise msgspec.ValidationError(f"Expected `object`, got `{type(raw).__name__}`")
    kind = raw.get("kind")
    if not isinstance(kind, str):
        raise msgspec.ValidationError("Expected `str` - at `$.kind`")
    decoder = _decoders.get(kind)
    return raw if decoder is None else decoder.decode(payload)
