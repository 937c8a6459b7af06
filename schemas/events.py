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
    """`worker:incarnation:seq`: unique."""
    worker: str
    """The worker's name."""
    incarnation: str
    """One run of the worker, a ULID: of two, the one that started later is the greater."""
    seq: int
    """Counts every event of the incarnation, from 1."""
    at: float
    """When it happened: Unix s by the worker's clock, which never jumps."""
    step: int
    """The engine's last step at that time."""
    request: str | None = None
    """The request's public id."""
    child: int | None = None
    """Which of its completions, from 0."""
    tenant: str | None = None
    """The request's tenant."""
    class_: str | None = msgspec.field(default=None, name="class")
    """Its class at that time."""
    priority: int | None = None
    """Its priority at that time; lower runs first."""


class Queued(Event, frozen=True, kw_only=True, tag="queued"):
    """The request joined the queue. The fields describe the queue that it found, which explains why it waited."""

    prompt_tokens: int
    """Tokens of its prompt."""
    waiting: int = 0
    """Requests that already waited on this worker, of all tenants."""
    tenant_waiting: int = 0
    """Those of them that are its own tenant's."""
    running: int = 0
    """Requests that ran on this worker."""
    virtual_time: float | None = None
    """Its tenant's virtual time, as of the last frame or admission; in a `fair` class the lowest goes next."""
    next_request: str | None = None
    """The request whose turn it was; null if nothing waited."""
    next_tenant: str | None = None
    """That request's tenant."""
    next_class: str | None = None
    """That request's class."""
    next_priority: int | None = None
    """That request's priority."""
    next_virtual_time: float | None = None
    """The virtual time of that request's tenant, as of then too."""


class Admitted(Event, frozen=True, kw_only=True, tag="admitted"):
    """The request runs from this step on, for the first time or again after it lost its KV.

    In the second case (`resumed`), everything that it had computed counts as input.
    """

    uncached_input_tokens: int
    """Input that must be computed."""
    cached_input_tokens: int
    """Input that need not be."""
    external_input_tokens: int = 0
    """The part of the cached input that a KV connector loaded; the rest was in the prefix cache, or had been kept."""
    queued_s: float
    """How long it waited in the queue."""
    resumed: bool = False
    """Whether it ran before, and lost its KV."""
    virtual_time: float | None = None
    """Its tenant's virtual time, with this input charged."""
    waiting: int = 0
    """Requests that still wait on this worker."""


class FirstToken(Event, frozen=True, kw_only=True, tag="first_token"):
    """The first output token was delivered."""

    ttft_s: float
    """Time since the request arrived."""


class Held(Event, frozen=True, kw_only=True, tag="held"):
    """A hold was applied or replaced."""

    by: str
    """The role: `operator`, `controller`, or `engine` where the scheduler itself made room."""
    kv: str
    """`kept`, `parked`, `dropped`, or `none` if it had computed nothing."""
    reason: str
    """The command's issuer, or why the engine needed the room."""
    lease_s: float | None
    """Time after which the hold ends by itself; null: no lease."""
    in_flight_tokens: int = 0
    """Tokens of steps in flight, which still reach the client."""
    output_tokens: int = 0
    """Tokens delivered so far."""


class Parked(Event, frozen=True, kw_only=True, tag="parked"):
    """A held request gave back its slot and kept its KV."""

    reason: str = ""
    """What the slot was needed for."""


class Dropped(Event, frozen=True, kw_only=True, tag="dropped"):
    """A held request's KV was freed."""

    reason: str
    """What the KV blocks were needed for, or the issuer of the command that dropped them."""
    computed_tokens: int
    """Positions that must be recomputed on continue, unless a cache has them."""


class Continued(Event, frozen=True, kw_only=True, tag="continued"):
    """The last hold ended."""

    by: str
    """The role that ended it."""
    reason: str
    """`command`, `lease`, `failover`, `drain` or `room`."""
    held_s: float
    """How long it was held."""
    output_tokens: int = 0
    """Tokens delivered so far."""


class Preempted(Event, frozen=True, kw_only=True, tag="preempted"):
    """Its KV was freed and it waits again: vLLM wanted KV blocks, a cut-in did, or the prefix cache was reset."""

    reason: str
    """Which of these it was."""


class Reprioritized(Event, frozen=True, kw_only=True, tag="reprioritized"):
    """Priority or class changed."""

    from_priority: int
    """The priority before."""
    to_priority: int
    """The priority now."""
    from_class: str
    """The class before."""
    to_class: str
    """The class now."""
    by: str
    """The role that changed it."""


class Limited(Event, frozen=True, kw_only=True, tag="limited"):
    """A cap changed."""

    by: str
    """The role whose cap it is."""
    detail: str
    """The cap, as in `tenant acme: max_running=4`; or `failover: …` where a controller's caps ended."""


class Finished(Event, frozen=True, kw_only=True, tag="finished"):
    """The request ended.

    Positions that the device computed for it = uncached input − uncomputed input + recomputed + output
    − generations + discarded.
    """

    reason: str
    """vLLM's: `stop`, `length`, `abort` and so on."""
    uncached_input_tokens: int
    """Input that was to be computed when it was admitted."""
    cached_input_tokens: int
    """Input that was in the prefix cache, or with a KV connector."""
    external_input_tokens: int = 0
    """The part of the cached input that a KV connector loaded."""
    uncomputed_input_tokens: int = 0
    """The part of the uncached input that was never computed: the request ended first, or lost its KV and found more
    in a cache when it went on."""
    output_tokens: int
    """Tokens delivered."""
    generations: int = 1
    """0 without any output, else 1; in a streaming session, the number of turns that produced output."""
    recomputed_tokens: int
    """Positions computed again after their KV was lost."""
    restored_tokens: int = 0
    """Positions found in the prefix cache after their KV was lost."""
    reloaded_tokens: int = 0
    """Positions loaded by a KV connector after their KV was lost."""
    discarded_tokens: int = 0
    """Positions computed in vain: in flight when the request ended, or rejected drafts."""
    queued_s: float
    """Time spent in the queue."""
    ttft_s: float | None
    """Time from arrival to the first token; null without one."""
    held_s: float
    """Time spent held."""
    run_s: float
    """Time spent running."""


class CommandSeen(Event, frozen=True, kw_only=True, tag="command"):
    """A command was applied or refused."""

    command: str
    """The command's id."""
    verb: str
    """What it asked for: `preempt`, `continue` and so on; never `rank`."""
    role: str
    """The sender's role, proved by its subject."""
    issuer: str
    """What the sender calls itself."""
    outcome: str
    """`applied`, `partial` or `rejected`."""
    counts: dict[str, int] = {}
    """Targets by outcome."""
    code: int | None = None
    """Code of the refusal."""
    error: str | None = None
    """Its text."""
    reason: str = ""
    """Of an `abort`: why, in the issuer's words."""


class LeaderChanged(Event, frozen=True, kw_only=True, tag="leader_changed"):
    """A new leader was accepted, or the leader fell silent (null epoch)."""

    epoch: Epoch | None
    """The new leader's epoch."""
    reason: str
    """`silent`, or how the new leader became known."""


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
