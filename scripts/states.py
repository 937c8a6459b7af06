"""Draw `docs/states.md` from the table in `service/scheduler/states.py`; `generated.py` compares or renews it."""

from pathlib import Path
from typing import Final

from coxswain.service.scheduler.states import HELD, KV, TRANSITIONS, State

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "states.md"

INTRODUCTION: Final = """\
# The life of a request

Drawn by `make generate` from the table in `service/scheduler/states.py`; do not edit. A transition that is not in
the table for a state is illegal there: it raises and changes nothing. A request can *finish* in every state.
"""


def page() -> str:
    """The page: the diagram, and the table of what each state is called on the wire."""
    return "\n".join([INTRODUCTION, *diagram(), "", *names()]) + "\n"


def diagram() -> list[str]:
    """A mermaid state diagram; the events that lead from one state to another share an arrow."""
    lines = ["```mermaid", "stateDiagram-v2"]
    lines += [f'    state "{state}" as {state.name}' for state in State if state is not State.FINISHED]
    lines.append(f"    [*] --> {State.QUEUED.name}: arrive")
    for state, row in TRANSITIONS.items():
        events: dict[State, list[str]] = {}
        for event, following in row.items():
            if following is not State.FINISHED:
                events.setdefault(following, []).append(event)
        lines += [f"    {state.name} --> {to.name}: {', '.join(why)}" for to, why in events.items()]
    return [*lines, "```"]


def names() -> list[str]:
    """A table: state, its names in status, what may happen to it."""
    lines = ["| state | `state` in status | `kv` | what may happen |", "|---|---|---|---|"]
    for state, row in TRANSITIONS.items():
        if row:
            wire = "held" if state in HELD else state
            lines.append(f"| {state} | `{wire}` | `{KV.get(state, 'none')}` | {', '.join(row)} |")
    return lines


def texts() -> dict[Path, str]:
    """The page."""
    return {PAGE: page()}
