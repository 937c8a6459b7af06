"""What steering remembers of one request: identity, place, holds, counts and story. Pure data.

Made by the core when a request arrives, kept until it ends. `payload` is vLLM's `Request`, of which the core
reads two growing numbers and nothing else.
"""

from typing import Any, Final, Protocol

from coxswain.schemas.events import Event, Queued
from coxswain.schemas.status import StoryLine
from coxswain.service.scheduler.groups import ClassGroup
from coxswain.service.scheduler.states import QUEUED
from coxswain.service.scheduler.tenants import Account

MAX_STORY: Final = 64
"""Lines of a request's own story; the whole of it is in the event log."""


class Progress(Protocol):
    """What the core reads of a running request."""

    num_computed_tokens: int
    """Positions whose KV is computed or being computed."""


class Hold:
    """One role's hold on a request."""

    __slots__ = ("kv", "lease_until", "reason", "role", "since")

    def __init__(self, role: str, kv: str, since: float, lease_until: float | None, reason: str) -> None:
        self.role = role
        self.kv = kv
        self.since = since
        self.lease_until = lease_until
        self.reason = reason


class Record:
    """One request (one child, when a client's request has several).

    It is nobody's until it arrives (`SteeringCore.arrive` gives it account, group and payload), so that any thread may
    make it.
    """

    __slots__ = (
        "account", "admitted_at", "aged", "arrived_at", "asked_class", "cached_tokens", "came",
        "charged_input", "child", "discarded_tokens", "earlier_outputs", "earlier_turns", "external_tokens",
        "first_token_at", "group", "has_kv", "held_s", "held_since", "holds", "id", "lost_mark", "number", "outputs",
        "payload", "priority", "prompt_tokens", "protected_until", "queued_s", "queued_since",
        "recomputed_tokens", "reloaded_tokens", "request", "restored_tokens", "resumed_at",
        "set_class", "settled", "settled_recompute", "state", "story", "tenant", "ticket", "uncached_tokens",
        "uncomputed_tokens", "was_cut",
    )  # fmt: skip

    def __init__(
        self,
        *,
        id: str,  # noqa: A002
        request: str,
        tenant: str,
        asked_class: str,
        priority: int,
        arrived_at: float,
        prompt_tokens: int,
        outputs: list[Any],
    ) -> None:
        self.id = id
        self.request = request
        self.child = 0
        """Its number among the children of the client's request: `families.py` says it."""
        self.tenant = tenant
        """Whose it is; the account may be one that many share."""
        self.account: Account
        self.group: ClassGroup
        """Its class: counts, caps, policy and place."""
        self.asked_class = asked_class
        self.set_class = ""
        """The class that a command chose, if any: it goes before what was asked for and the tenant's."""
        self.priority = priority
        self.arrived_at = arrived_at
        self.prompt_tokens = prompt_tokens
        self.payload: Any = None
        self.outputs = outputs
        """vLLM's own list of delivered output tokens: its length is how many."""
        self.state = QUEUED
        self.holds: dict[str, Hold] = {}
        self.ticket = 0
        """The queue's: which heap item stands for this request; 0 when it is not in the queue."""
        self.settled = 0
        """Output tokens charged so far."""
        self.charged_input = 0.0
        self.earlier_outputs = 0
        """Output tokens of a streaming session's earlier turns, which vLLM folds into the prompt."""
        self.earlier_turns = 0
        self.uncached_tokens = 0
        self.cached_tokens = 0
        self.external_tokens = 0
        self.uncomputed_tokens = 0
        self.recomputed_tokens = 0
        self.restored_tokens = 0
        self.reloaded_tokens = 0
        self.discarded_tokens = 0
        self.has_kv = False
        """Whether it has computed KV of its own: from its admission until it loses it."""
        self.lost_mark = 0
        """Positions computed before the KV was last lost: what is computed again below it is recompute."""
        self.resumed_at = 0
        """Position at which computing began again after that loss."""
        self.settled_recompute = 0
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.queued_since = 0.0
        self.queued_s = 0.0
        self.held_since = 0.0
        self.held_s = 0.0
        self.aged = False
        """Whether ageing let it in: then nobody cuts in on it."""
        self.protected_until = 0.0
        """Until then nobody cuts in on it (its class's quantum or cool-down)."""
        self.was_cut = False
        """Whether a cut-in stopped it and it has not run since."""
        self.number = 0
        """By which status calls it while it is listed; 0: it is not."""
        self.came = (0.0, 0, prompt_tokens)
        """When it was first queued, in which step, its input tokens: the first line of its story."""
        self.story: list[tuple[float, int, type[Event], dict[str, Any]]] | None = None
        """The other lines; a request that waits has none."""

    @property
    def class_(self) -> str:
        """The class that it runs in."""
        return self.group.name

    def __repr__(self) -> str:
        return f"<Record {self.request}#{self.child} {self.account.name} {self.class_} {self.state.name}>"

    def tell(self, now: float, step: int, kind: type[Event], fields: dict[str, Any]) -> None:
        """Add to the story; past `MAX_STORY` lines the middle gives way, never the beginning."""
        if self.story is None:
            self.story = []
        elif len(self.story) >= MAX_STORY - 1:
            del self.story[MAX_STORY // 2]
        self.story.append((now, step, kind, fields))

    def summed_up(self, now: float, reason: str) -> dict[str, Any]:
        """All that it was and cost, as it ends: the fields of its `finished` event."""
        first = self.first_token_at
        ran_s = 0.0 if self.admitted_at is None else now - self.arrived_at - self.queued_s - self.held_s
        return {
            "reason": reason,
            "uncached_input_tokens": self.uncached_tokens,
            "cached_input_tokens": self.cached_tokens,
            "external_input_tokens": self.external_tokens,
            "uncomputed_input_tokens": self.uncomputed_tokens,
            "output_tokens": self.earlier_outputs + len(self.outputs),
            "generations": self.earlier_turns + bool(self.outputs),
            "recomputed_tokens": self.recomputed_tokens,
            "restored_tokens": self.restored_tokens,
            "reloaded_tokens": self.reloaded_tokens,
            "discarded_tokens": self.discarded_tokens,
            "queued_s": self.queued_s,
            "held_s": self.held_s,
            "ttft_s": None if first is None else first - self.arrived_at,
            "run_s": ran_s,
        }

    def told(self) -> tuple[StoryLine, ...]:
        """The story so far, for people."""
        at, step, prompt_tokens = self.came
        first = _line(at, step, Queued, {"prompt_tokens": prompt_tokens})
        return (first, *(_line(*line) for line in self.story or ()))


def _line(at: float, step: int, kind: type[Event], fields: dict[str, Any]) -> StoryLine:
    return StoryLine(at=at, step=step, kind=str(kind.__struct_config__.tag), detail=_detail(fields))


def _detail(fields: dict[str, Any]) -> str:
    """`by=operator kv=kept lease_s=5.000`: what is null is left out."""
    return " ".join(
        f"{name}={value:.3f}" if isinstance(value, float) else f"{name}={value}"
        for name, value in fields.items()
        if value is not None
    )
