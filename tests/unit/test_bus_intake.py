"""What the bus refuses by itself, and what it lets through: pure checks, one clock reading."""

import json

import pytest

from coxswain.schemas.errors import Code, RefusedError
from coxswain.schemas.status import QueueQuery, RequestQuery
from coxswain.schemas.subjects import CommandSubject
from coxswain.service.bus import intake

NOW = 1_000_000.0
OPERATOR = ("operator", "w1")
CONTROLLER = ("controller", "w1")
TARGETS = {"requests": ["r1"]}
FENCED = {"id": "c1", "epoch": [1.0, 2], "expires_at": NOW + 5, "targets": TARGETS}


def command(who: tuple[str, str], verb: str, **fields):
    """Check one command sent by `who`."""
    role, worker = who
    return intake.command(CommandSubject(role, worker, verb), json.dumps(fields).encode(), NOW)


REFUSALS = [
    (("engine", "w1"), "abort", {"id": "c", "targets": TARGETS}, 403, "role 'engine'"),
    (OPERATOR, "fly", {"id": "c"}, 400, "unknown verb 'fly'"),
    (OPERATOR, "abort", {"id": "c"}, 400, "targets"),
    (OPERATOR, "abort", {"id": "c", "targets": {}}, 400, "targets are empty"),
    (OPERATOR, "abort", {"targets": TARGETS}, 400, "id"),
    (OPERATOR, "preempt", {"id": "c", "targets": TARGETS, "kv": "burn"}, 400, "kv"),
    (OPERATOR, "preempt", {"id": "c", "targets": TARGETS, "lease_s": -1}, 400, "lease_s"),
    (OPERATOR, "abort", {"id": "c", "targets": {"requests": ["r"] * 10_001}}, 413, "10001 targets"),
    (OPERATOR, "abort", {"id": "c", "targets": TARGETS, "expires_at": NOW - 0.01}, 410, "passed"),
    (OPERATOR, "abort", {"id": "c", "targets": TARGETS, "expires_at": NOW + 61.1}, 400, "61.1 s ahead"),
    (CONTROLLER, "abort", {"id": "c", "epoch": [1, 1], "targets": TARGETS}, 400, "expires_at is missing"),
    (CONTROLLER, "abort", {"id": "c", "expires_at": NOW + 1, "targets": TARGETS}, 400, "epoch is missing"),
    (CONTROLLER, "abort", {**FENCED, "epoch": [NOW + 301, 2]}, 409, "301 s ahead"),
    (CONTROLLER, "preempt", FENCED, 400, "lease_s is missing"),
    (("operator", "all"), "rank", {"id": "c", "incarnation": "i"}, 400, "never for all"),
    (OPERATOR, "configure", {"id": "c", "tenants": {"é" * 100: {}}}, 400, "200 bytes"),
    (OPERATOR, "limit", {"id": "c", "targets": TARGETS, "max_running": -1}, 400, "max_running"),
    (OPERATOR, "drain", {"id": "c"}, 400, "on"),
]


@pytest.mark.parametrize(("who", "verb", "fields", "code", "text"), REFUSALS)
def test_refusal(who, verb, fields, code, text) -> None:
    """A command that breaks a rule is refused with the rule's code and a text that names what was wrong."""
    with pytest.raises(RefusedError) as refused:
        command(who, verb, **fields)
    assert refused.value.code == code
    assert text in refused.value.message


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"id": 1e999}'])
def test_payload_that_is_no_command(payload: bytes) -> None:
    """Bytes that are not a JSON object are malformed, whatever they are."""
    with pytest.raises(RefusedError) as refused:
        intake.command(CommandSubject("operator", "w1", "abort"), payload, NOW)
    assert refused.value.code is Code.MALFORMED


def test_size_comes_before_everything() -> None:
    """A payload over the limit is refused for its size without being read."""
    with pytest.raises(RefusedError) as refused:
        intake.command(CommandSubject("nobody", "w1", "fly"), b"x" * (intake.MAX_PAYLOAD + 1), NOW)
    assert refused.value.code is Code.TOO_LARGE


def test_good_commands_pass() -> None:
    """An operator needs neither epoch nor deadline; a controller that gives both and a lease passes too."""
    asked, ignored = command(OPERATOR, "preempt", id="c1", targets=TARGETS)
    assert (asked.id, ignored) == ("c1", ())
    asked, ignored = command(CONTROLLER, "preempt", **FENCED, lease_s=3)
    assert asked.epoch == (1.0, 2)


def test_deadline_at_the_edges() -> None:
    """A full minute passes even if the sender's clock runs a second ahead, and so does this very moment."""
    for expires_at in (NOW, NOW + 60, NOW + 61):
        command(OPERATOR, "abort", id="c", targets=TARGETS, expires_at=expires_at)


def test_unknown_fields_are_named() -> None:
    """A typo does not go unseen: unknown fields come back by path."""
    _, ignored = command(OPERATOR, "preempt", id="c", targets={**TARGETS, "request": ["r"]}, lease=3)
    assert set(ignored) == {"lease", "targets.request"}


@pytest.mark.parametrize(
    ("what", "payload", "text"),
    [
        ("weather", b"", "unknown query"),
        ("queue", b'{"limit": 0}', "limit is 0"),
        ("queue", b'{"limit": 1001}', "limit is 1001"),
        ("queue", b'{"limit": "all"}', "limit"),
        ("queue", b"{", "queue"),
        ("request", b"", "request"),
    ],
)
def test_bad_query(what: str, payload: bytes, text: str) -> None:
    """A question that cannot be answered is malformed, and the text says why."""
    with pytest.raises(RefusedError) as refused:
        intake.query(what, payload)
    assert refused.value.code is Code.MALFORMED
    assert text in refused.value.message


def test_query_defaults() -> None:
    """An empty payload asks for the first page, and for the whole of what needs no payload."""
    assert intake.query("queue", b"") == QueueQuery(after=None, limit=100)
    assert intake.query("request", b'{"request": "r"}') == RequestQuery(request="r")
    assert intake.query("config", b"") is None
    assert intake.query("status", b"anything") is None


def test_lead_that_is_none() -> None:
    """Whatever is not a leader's heartbeat is none, without an error."""
    assert intake.lead(b'{"epoch": [1.0, 2], "controller": "c", "policy": "vtc", "at": 1.0}') is not None
    for payload in (b"", b"{}", b"\xff", b'{"epoch": [1.0]}', b" " * (intake.MAX_PAYLOAD + 1)):
        assert intake.lead(payload) is None


@pytest.mark.parametrize(
    ("payload", "named"),
    [
        (b'{"id": "c7", "targets": 3}', "c7"),
        (b'{"id": 7}', ""),
        (b"{", ""),
        (b'{"id": "' + b"x" * 99 + b'"}', "x" * 64),
    ],
)
def test_refusal_names_the_command_it_could_read(payload: bytes, named: str) -> None:
    """A refusal carries the command's id if that much could be read, cut to an id's length."""
    error = RefusedError(Code.MALFORMED, "no")
    reply = intake.refusal(error, payload, worker="w1", incarnation="i", now=NOW, step=5)
    assert (reply.id, reply.code, reply.outcome, reply.step) == (named, 400, "rejected", 5)


def test_an_epoch_of_the_far_future_is_not_believed():
    """Clocks may differ by minutes; a date that no bucket can have would shut out every controller."""
    assert intake.epoch_ahead_s((NOW + 300.0, 2**62), NOW) is None
    assert intake.epoch_ahead_s((NOW + 301.0, 0), NOW) == 301.0
    assert intake.epoch_ahead_s((NOW * 1000, 0), NOW) == NOW * 999  # milliseconds by mistake


def test_answers_go_to_inboxes_not_to_subjects_that_mean_something():
    """Whoever asks chooses the subject of the answer: none of ours, of JetStream or of a table's rows."""
    assert all(intake.answerable(reply) for reply in ("", "_INBOX.x.1", "my_inbox.1"))
    named = (
        "$KV.cox_main_tenants.x",
        "$JS.API.INFO",
        "$JS.ACK.s.c.1.1.1.1.1",
        "cox.v1.main.lead",
        "$SRV.PING",
    )
    assert not any(intake.answerable(reply) for reply in named)
