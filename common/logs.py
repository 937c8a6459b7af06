"""Logs: structured events on stderr, one line each, by the same rules for workers and controllers.

Names of events are `noun.what_happened` ("nats.connected"); everything else is a field. In an engine the logger is
our own (`get_logger`): neither structlog's global settings nor the standard library's logging are touched, since both
belong to the program that we are a guest of.
"""

import os
import re
import sys
import traceback
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, Final, TextIO

import structlog

from coxswain.common.connection import REDACTED, without_users

LEVELS: Final = ("info", "warning", "error")
FORMATS: Final = ("json", "text")
"""What `COX_LOG_LEVEL` and `COX_LOG` may be; `config.py` refuses anything else."""
_SECRET: Final = re.compile(
    r"pass(word|wd|phrase)?$|secret|seed|token$|creds|credential|api_?key|jwt|authorization", re.IGNORECASE
)
_ADDRESSES: Final = re.compile(r"(^|_)(urls?|servers?|address(es)?)$", re.IGNORECASE)
_NATS: Final = r"(?:(?<=nats://)|(?<=tls://)|(?<=ws://)|(?<=wss://))"
_USERINFO: Final = re.compile(rf"{_NATS}(?:(?!://)\S)+(?=@)|(?<=://)[^/\s]+(?=@)", re.IGNORECASE)
"""In an address of NATS a slash does not end the password; any other has a path, which may have an @."""


def redact(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Blank texts whose key looks secret, and the user and password of any address in the others."""
    for key, value in event.items():
        if isinstance(value, str | bytes):
            text = value if isinstance(value, str) else value.decode(errors="replace")
            text = without_users(text) if _ADDRESSES.search(key) else _USERINFO.sub(REDACTED, text)
            event[key] = REDACTED if _SECRET.search(key) else text
    return event


def explain(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Turn `exc_info` into what was raised and where, outermost first.

    Not `traceback.format_exception`: to place its carets it parses source with `ast`, whose depth counter is
    shared between threads on Python 3.11 (gh-106905), and the other thread is the engine's.
    """
    error = event.pop("exc_info", None)
    if error is True:
        error = sys.exc_info()[1]
    if isinstance(error, BaseException):
        frames = traceback.extract_tb(error.__traceback__)
        event["exception"] = f"{type(error).__name__}: {error}"
        event["raised_at"] = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    return event


def rules(stream: TextIO, env: Mapping[str, str]) -> dict[str, Any]:
    """What structlog is told: JSON when the stream is no terminal or `COX_LOG` is `json`; `key=value` otherwise.

    `COX_LOG_LEVEL` says from which level on (`info`, `warning`, `error`).
    """
    wanted, level = env.get("COX_LOG", "").strip(), env.get("COX_LOG_LEVEL", "").strip()
    as_json = wanted == "json" or (wanted != "text" and not stream.isatty())
    renderer: Any = (
        structlog.processors.JSONRenderer(default=str)
        if as_json
        else structlog.processors.KeyValueRenderer(
            key_order=["timestamp", "level", "event"], repr_native_str=False
        )
    )
    return {
        "processors": [
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            explain,
            redact,
            renderer,
        ],
        "wrapper_class": structlog.make_filtering_bound_logger(level if level in LEVELS else "info"),
    }


def get_logger(stream: TextIO | None = None, env: Mapping[str, str] | None = None, **fields: Any) -> Any:
    """A logger with `fields` on every line: `log.info("nats.connected", server=…)`.

    Args:
        stream: where lines go; stderr by default.
        env: the environment; this process's by default.
        fields: bound to every line.
    """
    stream = sys.stderr if stream is None else stream
    return structlog.wrap_logger(
        structlog.WriteLogger(stream),
        **rules(stream, os.environ if env is None else env),
        cache_logger_on_first_use=True,
        **fields,
    )
