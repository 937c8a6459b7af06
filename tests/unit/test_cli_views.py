"""What people see of a fleet, its requests and its events."""

from typing import Any

import msgspec
import pytest
from rich.cells import cell_len

from coxswain.control.cli import view_events, view_fleet, view_requests, view_tables
from coxswain.control.cli.view_requests import Listing, Told
from coxswain.control.view.picture import RequestRow
from coxswain.schemas import events as ev
from coxswain.schemas.policy import ClassPolicy, TenantPolicy
from coxswain.schemas.status import (
    Child,
    CommandStats,
    Frame,
    KvBlocks,
    Leader,
    RequestReport,
    RequestStatus,
    Slots,
    StoryLine,
    TenantStatus,
)

NOW = 1_700_000_000.0
LONG_ID = "cox.globex-research.batch.01M81VKVDV4BEA5YRAK2ZAM40M.d0927d58dc7fbcca"


def _tenant(name: str, **fields: Any) -> TenantStatus:
    plain: dict[str, Any] = dict.fromkeys(
        (
            "queued", "running", "held", "uncached_input_tokens_total", "cached_input_tokens_total",
            "output_tokens_total", "recomputed_tokens_total", "finished_total",
        ),
        0,
    )  # fmt: skip
    times = dict.fromkeys(("oldest_queued_s", "virtual_time", "base", "charged", "lift"), 0.0)
    return TenantStatus(**{**plain, **times, "class_": "chat", "weight": 1.0, "tenant": name, **fields})


def _frame(worker: str, **fields: Any) -> Frame:
    plain: dict[str, Any] = {
        "incarnation": "i", "seq": 1, "full": True, "part": 0, "parts": 1, "sent_at": NOW, "step": 9,
        "model": "meta-llama/Llama-3.1-8B-Instruct", "vllm_version": "0.32.0", "state": "serving",
        "slots": Slots(active=16, total=20, running=12, held=3),
        "kv_blocks": KvBlocks(total=1000, used=710, held=90),
        "step_s": 0.0384, "queued": 45, "running": 12, "held": 3, "preempted_total": 0,
        "recomputed_tokens_total": 0, "commands": CommandStats(),
        "leader": Leader(epoch=(1.0, 7), age_s=0.4, policy="vtc"), "config": "", "events_dropped_total": 0,
    }  # fmt: skip
    return Frame(**{**plain, "worker": worker, **fields})


def _status(name: str, **fields: Any) -> RequestStatus:
    plain: dict[str, Any] = {
        "child": 0, "tenant": "acme", "class_": "chat", "priority": 0, "state": "running",
        "kv": "none",
        "arrived_at": NOW - 30, "prompt_tokens": 100, "cached_tokens": 16, "output_tokens": 7,
        "deadline_s": None,
    }  # fmt: skip
    return RequestStatus(**{**plain, "request": name, **fields})


def test_tenants_are_summed_over_workers() -> None:
    """Counts add up, waits and virtual time are the worst, the share is of all output."""
    one = _tenant(
        "acme", queued=2, oldest_queued_s=1.0, virtual_time=50.0, output_tokens_total=30, weight=2.0
    )
    two = _tenant("acme", queued=3, oldest_queued_s=4.0, virtual_time=40.0, output_tokens_total=30)
    other = _tenant("globex", output_tokens_total=60)
    fleet = view_fleet.view(
        "main", {"b": _frame("b", tenants=(two, other)), "a": _frame("a", tenants=(one,))}, NOW
    )
    acme, globex = fleet.tenants
    assert [frame.worker for frame in fleet.workers] == ["a", "b"]
    assert (acme.queued, acme.oldest_queued_s, acme.virtual_time, acme.output_share) == (5, 4.0, 50.0, 0.5)
    assert acme.weights == (1.0, 2.0)
    assert globex.output_share == 0.5


@pytest.mark.parametrize("width", [80, 160])
def test_a_fleet_fits_the_terminal(width: int) -> None:
    """At 80 columns names stay whole and slots, KV, step time and leader are all there."""
    tenants = (_tenant("globex-research", queued=40, oldest_queued_s=71.0, output_tokens_total=261_922),)
    frames = {name: _frame(name, tenants=tenants) for name in ("gpu-node-07-dp0", "gpu-node-08-dp0")}
    text = view_fleet.text(view_fleet.view("main", frames, NOW), width).plain
    assert all(cell_len(line) <= width for line in text.split("\n"))
    for words in (
        "gpu-node-07-dp0",
        "globex-research",
        "12/16+3",
        "71% (9%)",
        "38ms",
        "vtc 400ms",
        "1m11s",
        "100%",
    ):
        assert words in text
    assert ("Llama-3.1-8B-Instruct" in text) == (width == 160)


def test_a_worker_without_leader_or_load_shows_so() -> None:
    """Nothing is invented for what is not known."""
    frame = _frame("w1", leader=Leader(), step_s=0.0, kv_blocks=KvBlocks(total=0, used=0, held=0))
    line = view_fleet.text(view_fleet.view("main", {"w1": frame}, NOW), 200).plain.split("\n")[-1]
    assert line.split()[-3:] == ["-", "-", "none"]


def _listing(*statuses: RequestStatus, truncated: bool = False) -> Listing:
    found = tuple(RequestRow(worker="w1", status=status) for status in statuses)
    return Listing(at=NOW, requests=found, queued_total=9, truncated=truncated)


def test_ids_are_never_cut() -> None:
    """Wide terminals have a column of ids, narrow ones a line below; both can be copied."""
    listing = _listing(_status(LONG_ID, tenant="globex-research"))
    assert view_requests.text(listing, 200).plain.count("\n") == 1
    narrow = view_requests.text(listing, 80).plain.split("\n")
    assert narrow[-1] == f"  {LONG_ID}"
    assert all(cell_len(line) <= 80 for line in narrow)


def test_states_say_where_and_why() -> None:
    """A place in the queue, who holds it and where its KV is."""
    assert view_requests.state(_status("r", state="queued", position=3)).plain == "queued #3"
    held = _status("r", state="held", kv="parked", held_by=("operator", "controller"))
    assert view_requests.state(held).plain == "held parked by operator+controller"


def test_a_list_that_is_cut_says_so() -> None:
    """The footer names how many wait in all."""
    assert view_requests.footer(_listing(_status("r"))) == ""
    assert "9 queued in all" in view_requests.footer(_listing(_status("r"), truncated=True))


def test_a_story_is_told_in_order_and_in_time() -> None:
    """Each line of the story has its time, step, kind and detail."""
    story = (
        StoryLine(at=NOW, step=1, kind="queued"),
        StoryLine(at=NOW + 1, step=5, kind="held", detail="by operator"),
    )
    child = Child(status=_status("r1", child=2, deadline_s=NOW - 5), story=story)
    text = view_requests.story(
        [Told(worker="w1", report=RequestReport(request="r1", children=(child,)))], NOW
    ).plain
    assert text.startswith("r1 child 2\n")
    assert "due 5.0s ago" in text
    assert text.index("queued") < text.index("held    by operator")


def _event(kind: str) -> ev.Event:
    """An event of any kind, made from its own fields."""
    plain: dict[str, Any] = {
        "id": "w1:i:1",
        "worker": "w1",
        "incarnation": "i",
        "seq": 1,
        "at": NOW,
        "step": 3,
    }
    about = {"request": LONG_ID, "tenant": "acme", "class": "chat", "priority": 0}
    values = {str: "word", int: 3, float: 1.5, bool: True}
    own = {
        field.encode_name: values.get(field.type)
        for field in msgspec.structs.fields(ev.KINDS[kind])
        if field.required and field.encode_name not in plain
    }
    return msgspec.convert({**plain, **about, **own, "kind": kind}, ev.KINDS[kind])


@pytest.mark.parametrize("kind", ev.KINDS)
def test_every_kind_of_event_has_a_line(kind: str) -> None:
    """Time, worker, kind and whose it is; the id stands apart."""
    facts, request = view_events.line(_event(kind), worker_width=4)
    assert kind in facts.plain
    assert "w1   " in facts.plain
    assert "acme/chat" in facts.plain
    assert "\n" not in facts.plain
    assert request.plain == LONG_ID


def test_an_event_of_a_later_version_is_shown_field_by_field() -> None:
    """Unknown kinds lose nothing, and cannot steer the terminal."""
    facts, request = view_events.line({"kind": "teleported", "at": NOW, "worker": "w1", "to": "w2\x1b[0m"})
    assert facts.plain.endswith(r"to=w2\x1b[0m")
    assert request.plain == ""


def test_finished_requests_tell_their_bill() -> None:
    """Tokens in and out, waiting and running times."""
    event = ev.Finished(
        id="x", worker="w1", incarnation="i", seq=1, at=NOW, step=3, reason="stop", uncached_input_tokens=100,
        cached_input_tokens=20, output_tokens=214, recomputed_tokens=0, queued_s=1.2, ttft_s=1.31, held_s=0.0,
        run_s=4.4,
    )  # fmt: skip
    facts, _ = view_events.line(event)
    assert facts.plain.endswith("stop: 100+20 in, 214 out, queued 1.2s, first token after 1.3s, ran 4.4s")


def test_commands_say_who_asked_for_what_and_why() -> None:
    """The reason of an abort is its issuer's text: it stands on the line, and cannot steer the terminal."""
    event = ev.CommandSeen(
        id="x", worker="w1", incarnation="i", seq=1, at=NOW, step=3, command="c", verb="abort", role="operator",
        issuer="ann", outcome="applied", counts={"applied": 2}, reason="ran away\x1b[0m",
    )  # fmt: skip
    facts, _ = view_events.line(event)
    assert facts.plain.endswith(r"abort by operator ann: applied 2, because: ran away\x1b[0m")


def test_tables_show_what_is_in_force() -> None:
    """Classes in the order in which they run; ranges only where they bound something."""
    classes = view_tables.classes(
        {"a": ClassPolicy(position=5), "b": ClassPolicy(position=1, slo_s=30.0)}, 200
    ).plain
    assert classes.index("b ") < classes.index("a ")
    tenants = view_tables.tenants(
        {"x": TenantPolicy(priority_min=0), "y": TenantPolicy(max_running=3)}, 200
    ).plain
    assert "0…" in tenants
    assert "any" in tenants


@pytest.mark.parametrize(
    ("title", "fields"),
    [
        ("QUANTUM", {"quantum_s": 1.0}),
        ("COOLDOWN", {"cooldown_s": 1.0}),
        ("AGEING", {"ageing_s": 9.0}),
        ("PREFILL/STEP", {"max_prefill_tokens_per_step": 64}),
        ("LINGER", {"linger_s": 1.0}),
        ("STAND ASIDE", {"stand_aside": True}),
        ("BORROW", {"borrow": True}),
        ("MAX RUNNING", {"max_running": 4}),
        ("MAX QUEUED", {"max_queued": 4}),
    ],
)
def test_what_a_class_was_given_is_shown_in_80_columns(title: str, fields: dict[str, Any]) -> None:
    """What no class has gives way to it."""
    rows = {"interactive": ClassPolicy(slo_s=30.0), "batch": ClassPolicy(position=10, **fields)}
    shown = view_tables.classes(rows, 80).plain
    assert title in shown.splitlines()[0]
    assert max(map(cell_len, shown.splitlines())) <= 80
