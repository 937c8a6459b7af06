"""The life of a request as steering sees it, as a table. The diagram in the docs is drawn from it.

              admit                    hold (keep)               park
    QUEUED ──────────▶ RUNNING ───────────────────▶ HELD_KEPT ─────────▶ HELD_PARKED
       ▲ ◀──────────────  │ ▲ ◀────────── release ─────  │                   │   │
       │     evict        │ └─────────────────── release, when there is room ┘   │ drop
       │                  │                              │ drop                  │
       │                  └──── hold (drop) ──▶ HELD_DROPPED ◀───────────────────┘
       ├───────────────── release ──────────────────┘
       └──────── hold ──▶ HELD_NONE ── release ──▶ QUEUED
    any state ── finish ──▶ FINISHED

`evict` frees the KV of a request, which waits again (event `preempted`). HELD_NONE is a request that was held while it
waited and had no KV to keep. A transition that the table does not list for a state is illegal: it raises and
changes nothing.
"""

from enum import StrEnum
from typing import Final

from coxswain.schemas.status import Kv


class State(StrEnum):
    """Where a request is."""

    QUEUED = "queued"
    RUNNING = "running"
    HELD_NONE = "held, nothing computed"
    HELD_KEPT = "held, KV kept"
    HELD_PARKED = "held, KV kept, slot given back"
    HELD_DROPPED = "held, KV dropped"
    FINISHED = "finished"


class Transition(StrEnum):
    """What can happen to it (events of the wire are `schemas.events`)."""

    ADMIT = "admit"
    EVICT = "evict"
    HOLD_KEEP = "hold (keep)"
    HOLD_DROP = "hold (drop)"
    PARK = "park"
    DROP = "drop"
    RELEASE = "release"
    FINISH = "finish"


TRANSITIONS: Final[dict[State, dict[Transition, State]]] = {
    State.QUEUED: {
        Transition.ADMIT: State.RUNNING,
        Transition.HOLD_KEEP: State.HELD_NONE,
        Transition.HOLD_DROP: State.HELD_NONE,
        Transition.FINISH: State.FINISHED,
    },
    State.RUNNING: {
        Transition.EVICT: State.QUEUED,
        Transition.HOLD_KEEP: State.HELD_KEPT,
        Transition.HOLD_DROP: State.HELD_DROPPED,
        Transition.FINISH: State.FINISHED,
    },
    State.HELD_NONE: {Transition.RELEASE: State.QUEUED, Transition.FINISH: State.FINISHED},
    State.HELD_KEPT: {
        Transition.RELEASE: State.RUNNING,
        Transition.PARK: State.HELD_PARKED,
        Transition.DROP: State.HELD_DROPPED,
        Transition.FINISH: State.FINISHED,
    },
    State.HELD_PARKED: {
        Transition.RELEASE: State.RUNNING,
        Transition.DROP: State.HELD_DROPPED,
        Transition.FINISH: State.FINISHED,
    },
    State.HELD_DROPPED: {Transition.RELEASE: State.QUEUED, Transition.FINISH: State.FINISHED},
    State.FINISHED: {},
}

# By names of their own: CPython 3.11 takes as long for `State.QUEUED` as for four calls.
QUEUED: Final = State.QUEUED
RUNNING: Final = State.RUNNING
HELD_KEPT: Final = State.HELD_KEPT
HELD_PARKED: Final = State.HELD_PARKED
FINISHED: Final = State.FINISHED

HELD: Final = frozenset({State.HELD_NONE, State.HELD_KEPT, State.HELD_PARKED, State.HELD_DROPPED})

SLOTTED: Final = frozenset({State.RUNNING, State.HELD_KEPT})
"""States with a slot in the model runner: only then are tokens computed, or in flight."""

KV: Final[dict[State, Kv]] = {
    State.HELD_KEPT: "kept",
    State.HELD_PARKED: "parked",
    State.HELD_DROPPED: "dropped",
}
"""What the wire calls a held state's KV; `none` for all others."""


class IllegalTransitionError(RuntimeError):
    """A transition that the table does not list for the state; nothing was changed."""


def after(state: State, transition: Transition) -> State:
    """The state that follows.

    Raises:
        IllegalTransitionError: if the table has no such row.
    """
    following = TRANSITIONS[state].get(transition)
    if following is None:
        raise IllegalTransitionError(f"a request that is {state} cannot {transition}")
    return following
