"""The table of states: what it allows, and that everything else changes nothing."""

import re
from collections.abc import Callable
from itertools import product

import pytest

from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.states import (
    HELD,
    KV,
    TRANSITIONS,
    IllegalTransitionError,
    State,
    Transition,
    after,
)
from tests.support.fake_engine import FakeEngine, picture

LEGAL = {(state, event) for state, row in TRANSITIONS.items() for event in row}
ILLEGAL = sorted(set(product(State, Transition)) - LEGAL)


def test_every_state_has_a_row() -> None:
    """The table says of every state what may follow."""
    assert TRANSITIONS.keys() == set(State)


@pytest.mark.parametrize(("state", "event"), sorted(LEGAL))
def test_legal_event_leads_where_the_table_says(state: State, event: Transition) -> None:
    """What follows is a state of the table, and never the state itself."""
    assert after(state, event) is TRANSITIONS[state][event]
    assert after(state, event) is not state


@pytest.mark.parametrize(("state", "event"), ILLEGAL)
def test_illegal_event_is_named(state: State, event: Transition) -> None:
    """An event that the table does not list raises an error that names state and event."""
    with pytest.raises(IllegalTransitionError, match=re.escape(f"{state} cannot {event}")):
        after(state, event)


def test_every_state_can_be_reached_and_can_end() -> None:
    """No state is out of reach, each can finish at once, and nothing follows the end."""
    reached, fringe = set(), {State.QUEUED}
    while fringe:
        reached |= fringe
        fringe = {following for state in fringe for following in TRANSITIONS[state].values()} - reached
    assert reached == set(State)
    assert all(
        State.FINISHED in row.values() for state, row in TRANSITIONS.items() if state is not State.FINISHED
    )
    assert not TRANSITIONS[State.FINISHED]


def test_lost_kv_never_comes_back_without_waiting() -> None:
    """What was dropped or given up returns through the queue only; only what kept its KV runs on."""
    for state in HELD:
        assert (after(state, Transition.RELEASE) is State.RUNNING) == (KV.get(state) in ("kept", "parked"))
    assert not HELD & set(TRANSITIONS[State.HELD_DROPPED].values())


# The same table, through the core

CALLS: dict[Transition, Callable[[FakeEngine, Record], object]] = {
    Transition.ADMIT: lambda engine, record: engine.core.admitting(record, 0),
    Transition.EVICT: lambda engine, record: engine.core.evicted(engine.now, record),
    Transition.HOLD_KEEP: lambda engine, record: engine.core.holds.hold(
        engine.now, record, "operator", "keep", None, ""
    ),
    Transition.HOLD_DROP: lambda engine, record: engine.core.holds.hold(
        engine.now, record, "operator", "drop", None, ""
    ),
    Transition.FINISH: lambda engine, record: engine.core.finished(engine.now, record, "stop"),
}
"""What the shell calls for an event. (`hold` on a held one adds a hold, `release` without one says False.)"""


def in_state(engine: FakeEngine, state: State) -> Record:
    """A request that came to `state` by the usual way, with something computed where that is possible."""
    record = engine.submit(prompt=40)
    if state not in (State.QUEUED, State.HELD_NONE):
        engine.admit()
        engine.compute(record)
    if state in HELD:
        engine.core.holds.hold(
            engine.now, record, "engine", "drop" if state is State.HELD_DROPPED else "keep", None, ""
        )
    elif state is State.FINISHED:
        engine.finish(record)
    if state is State.HELD_PARKED:
        engine.core.holds.park(engine.now, record, "its slot is needed")
    assert record.state is state
    return record


@pytest.mark.parametrize(
    ("state", "event"),
    [
        (state, event)
        for state, event in ILLEGAL
        if event in CALLS and not (state in HELD and event in (Transition.HOLD_KEEP, Transition.HOLD_DROP))
    ],
)
def test_illegal_event_changes_nothing_in_the_core(state: State, event: Transition) -> None:
    """An illegal call raises before anything was changed, counted, charged or told."""
    engine = FakeEngine()
    other = engine.submit("b")
    record = in_state(engine, state)
    engine.deliver(record, 3)  # there is something to settle, so a half-done call would show
    before, told = picture(engine.core), len(engine.events)
    mine = {slot: getattr(record, slot) for slot in ("state", "settled", "lost_mark", "held_s", "queued_s")}
    with pytest.raises(IllegalTransitionError):
        CALLS[event](engine, record)
    assert picture(engine.core) == before
    assert {slot: getattr(record, slot) for slot in mine} == mine
    assert len(engine.events) == told
    assert other.state is State.QUEUED
