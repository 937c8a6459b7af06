"""The life of a request as steering sees it, as a table. The diagram in the docs is drawn from it.

              admit                    hold (keep)               park
    QUEUED ──────────▶ RUNNING ───────────────────▶ HELD_KEPT ─────────▶ HELD_PARKED
       ▲ ◀──────────────  │ ◀─────────────────────────  │                     │
       │     evict        │          release            │ drop                │ drop
       │                  └───────── hold (drop) ──┐    ▼                     ▼
       ├───────────────── release ──────────────── HELD_DROPPED ◀─────────────┘
       ├───────────────── release ──────────────── HELD_PARKED  (with its KV)
       └──────── hold ──▶ HELD_NONE ── release ──▶ QUEUED
    any state ── finish ──▶ FINISHED

`evict` is vLLM's own preemption for want of KV blocks. HELD_NONE is a request that was held while it waited
and had no KV to keep. An event that the table does not list for a state is illegal: it raises and changes nothing.
"""

from enum import StrEnum
from typing import Final, Literal


class State(StrEnum):
    """Where a request is."""

    QUEUED = "queued"
    RUNNING = "running"
    HELD_NONE = "held, nothing computed"
    HELD_KEPT = "held, KV kept"
    HELD_PARKED = "held, KV kept, slot given back"
    HELD_DROPPED = "held, KV dropped"
    FINISHED = "finished"


class Event(StrEnum):
    """What can happen to it."""

    ADMIT = "admit"
    EVICT = "evict"
    HOLD_KEEP = "hold (keep)"
    HOLD_DROP = "hold (drop)"
    PARK = "park"
    DROP = "drop"
    RELEASE = "release"
    FINISH = "finish"


TRANSITIONS: Final[dict[State, dict[Event, State]]] = {
    State.QUEUED: {
        Event.ADMIT: State.RUNNING,
        Event.HOLD_KEEP: State.HELD_NONE,
        Event.HOLD_DROP: State.HELD_NONE,
        Event.FINISH: State.FINISHED,
    },
    State.RUNNING: {
        Event.EVICT: State.QUEUED,
        Event.HOLD_KEEP: State.HELD_KEPT,
        Event.HOLD_DROP: State.HELD_DROPPED,
        Event.FINISH: State.FINISHED,
    },
    State.HELD_NONE: {Event.RELEASE: State.QUEUED, Event.FINISH: State.FINISHED},
    State.HELD_KEPT: {
        Event.RELEASE: State.RUNNING,
        Event.PARK: State.HELD_PARKED,
        Event.DROP: State.HELD_DROPPED,
        Event.FINISH: State.FINISHED,
    },
    State.HELD_PARKED: {
        Event.RELEASE: State.QUEUED,
        Event.DROP: State.HELD_DROPPED,
        Event.FINISH: State.FINISHED,
    },
    State.HELD_DROPPED: {Event.RELEASE: State.QUEUED, Event.FINISH: State.FINISHED},
    State.FINISHED: {},
}

HELD: Final = frozenset({State.HELD_NONE, State.HELD_KEPT, State.HELD_PARKED, State.HELD_DROPPED})

Kv = Literal["none", "kept", "parked", "dropped"]
KV: Final[dict[State, Kv]] = {
    State.HELD_KEPT: "kept",
    State.HELD_PARKED: "parked",
    State.HELD_DROPPED: "dropped",
}
"""What the wire calls a held state's KV; `none` for all others."""


class IllegalTransitionError(RuntimeError):
    """An event that the table does not list for the state; nothing was changed."""


def after(state: State, event: Event) -> State:
    """The state that follows.

    Raises:
        IllegalTransitionError: if the table has no such row.
    """
    following = TRANSITIONS[state].get(event)
    if following is None:
        raise IllegalTransitionError(f"a request that is {state} cannot {event}")
    return following
