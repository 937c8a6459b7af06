"""Logs: one line per event, secrets blanked."""

import io
import json

import pytest

from coxswain.common.logs import REDACTED, get_logger, redact


def test_json_lines_without_a_terminal() -> None:
    """Where nobody watches, each event is one JSON object with its level, time and bound fields."""
    out = io.StringIO()
    get_logger(out, {}, worker="w1").info("nats.connected", server="h:1")
    line = json.loads(out.getvalue())
    assert (line["event"], line["level"], line["worker"], line["server"]) == (
        "nats.connected",
        "info",
        "w1",
        "h:1",
    )
    assert "timestamp" in line


def test_text_on_demand() -> None:
    """`COX_LOG=text` gives key=value lines."""
    out = io.StringIO()
    get_logger(out, {"COX_LOG": "text"}).warning("bus.off", hint="why")
    assert "level=warning event=bus.off hint=why" in out.getvalue()


def test_secrets_do_not_reach_the_log() -> None:
    """Texts under secret keys and the user part of addresses are blanked; counts of tokens are not."""
    out = io.StringIO()
    get_logger(out, {}).info(
        "x", token="t0p", nkey_seed=b"t0p", error="no: nats://me:t0p@h:1", output_tokens=7
    )
    line = json.loads(out.getvalue())
    assert "t0p" not in out.getvalue()
    assert line["error"] == f"no: nats://{REDACTED}@h:1"
    assert line["output_tokens"] == 7
    assert (
        redact(None, "", {"error": "nats://me:p@t0p@h:1,h:2 c@h"})["error"]
        == f"nats://{REDACTED}@h:1,h:2 c@h"
    )


@pytest.mark.parametrize(
    ("key", "text", "shown"),
    [
        ("error", "no: nats://me:t0p/t0p@h:1", f"no: nats://{REDACTED}@h:1"),
        ("error", "nats://me:t0p/t0p@h:1,TLS://t0p/@i", f"nats://{REDACTED}@h:1,TLS://{REDACTED}@i"),
        ("urls", "me:t0p@h, t0p@i:1, j", f"{REDACTED}@h, {REDACTED}@i:1, j"),
        ("urls", "me:t0p/t0p t0p@h,wss://t0p@i:1/x", f"{REDACTED}@h,wss://{REDACTED}@i:1/x"),
        ("server", "t0p@h", f"{REDACTED}@h"),
        ("server", "h:1", "h:1"),
        ("tenant", "me@example.com", "me@example.com"),
        ("error", "see http://h/a@b", "see http://h/a@b"),
        ("observer", "me@h", "me@h"),
    ],
)
def test_whatever_a_password_holds_none_of_it_is_shown(key: str, text: str, shown: str) -> None:
    """With a slash in it, or without a scheme in front of it; and a name with an @ stays as it is."""
    assert redact(None, "", {key: text}) == {key: shown}


def test_exceptions_say_what_and_where() -> None:
    """`exception` adds what was raised and where, on the same line."""
    out = io.StringIO()
    try:
        int("broken")
    except ValueError:
        get_logger(out, {}).exception("bus.died")
    line = json.loads(out.getvalue())
    assert line["exception"].startswith("ValueError: invalid literal")
    assert "test_logs.py" in line["raised_at"][0]
