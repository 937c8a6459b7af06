"""Words of the user turned into values: durations, `NAME=VALUE` pairs, optional counts.

Pure. Every function raises `ValueError` with a text that says what was wrong, what it was and what to write
instead; `app.py` shows it as a usage error. Called by the command modules as option parsers.
"""

import math
import re
from typing import Final, NamedTuple

from coxswain.schemas.events import KINDS
from coxswain.schemas.names import ALL, check_tenant, check_token
from coxswain.schemas.policy import INT32_MAX, INT32_MIN
from coxswain.schemas.request_id import MAX_CHARS

MAX_PORT: Final = 65_535
MAX_LEASE_S: Final = 86_400.0
MAX_DURATION_S: Final = 3_650 * 86_400.0
"""Ten years: more is a slip of the finger, and dates and NATS's own limits end not far beyond."""
CADENCE_S: Final = (0.01, 1.0)
"""Between two steps of a controller. Its heartbeats go out at steps, and workers wait 5 s for one."""
MAX_CONTROLLER_CHARS: Final = 128
"""The `issuer` of a command is no longer."""
_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?")
_NONE: Final = ("none", "null")


def duration_s(text: str) -> float:
    """Seconds in a duration such as `250ms`, `30`, `30s`, `10m`, `1h30m`, `2d`; a bare number is seconds."""
    rest, total = text.strip().lower(), 0.0
    if not rest:
        raise ValueError("empty duration: write for example 30s, 10m or 1h30m")
    while rest:
        match = _DURATION.match(rest)
        if match is None or (match[2] is None and rest != text.strip().lower()):
            raise ValueError(f"{text!r} is not a duration: write for example 250ms, 30s, 10m or 1h30m")
        total += float(match[1]) * _UNITS_S[match[2] or "s"]
        rest = rest[match.end() :]
    if total > MAX_DURATION_S:
        raise ValueError(f"{text!r} is longer than ten years")
    return total


def positive_duration_s(text: str) -> float:
    """As `duration_s`, and more than zero."""
    if not (seconds := duration_s(text)) > 0:
        raise ValueError(f"{text!r} is not more than zero")
    return seconds


def cadence_s(text: str) -> float:
    """A controller's cadence in seconds, 10 ms to 1 s."""
    least, most = CADENCE_S
    if not least <= (seconds := duration_s(text)) <= most:
        raise ValueError(f"{text!r} is not between {1000 * least:g}ms and {most:g}s")
    return seconds


def controller_name(text: str) -> str:
    """A controller's name: any short text."""
    if len(text) > MAX_CONTROLLER_CHARS or not text.isprintable():
        raise ValueError(f"a controller's name has at most {MAX_CONTROLLER_CHARS} printable characters")
    return text


class Address(NamedTuple):
    """Where to listen."""

    host: str
    port: int


def address(text: str) -> Address:
    """Where to listen, `[HOST:]PORT`: this machine's own address if there is no host; IPv6 in brackets."""
    host, _, number = text.rpartition(":")
    if not number.isascii() or not number.isdigit() or int(number) > MAX_PORT:
        raise ValueError(f"{text!r} is not [HOST:]PORT: write for example 8080, or 0.0.0.0:8080")
    bare = host.removeprefix("[").removesuffix("]")
    if ":" in bare and bare == host:
        raise ValueError(f"{text!r}: an IPv6 address goes into brackets, [::1]:8080")
    return Address(bare or "127.0.0.1", int(number))


def positive(text: str) -> float:
    """A finite number over zero."""
    if not (value := number(text)) > 0:
        raise ValueError(f"{text!r} is not more than zero")
    return value


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    return value


def tenant_number(text: str) -> tuple[str, float]:
    """A `TENANT=NUMBER` pair; the tenant may contain `=`, the number may not."""
    tenant, equals, value = text.rpartition("=")
    if not equals:
        raise ValueError(f"{text!r} is not a TENANT=NUMBER pair: write for example acme=2")
    return check_tenant(tenant), number(value)


def tenant_weight(text: str) -> tuple[str, float]:
    """A `TENANT=WEIGHT` pair; a weight is more than zero."""
    tenant, weight = tenant_number(text)
    if not weight > 0:
        raise ValueError(f"weight {weight:g} of tenant {tenant!r} is not more than zero")
    return tenant, weight


def priority(text: str) -> int:
    """A priority, or the position of a class: a whole number of 32 bits; lower runs first."""
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None
    if not INT32_MIN <= value <= INT32_MAX:
        raise ValueError(f"{value} is not between {INT32_MIN} and {INT32_MAX}")
    return value


def count_or_none(text: str) -> int | None:
    """A whole number from 0, or None for `none`."""
    if text.strip().lower() in _NONE:
        return None
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{text!r} is neither a whole number from 0 nor `none`")
    return int(text)


def yes_or_no(text: str) -> bool:
    """What is on or off."""
    word = text.strip().lower()
    if word not in ("yes", "no"):
        raise ValueError(f"{text!r} is neither `yes` nor `no`")
    return word == "yes"


def duration_or_none_s(text: str) -> float | None:
    """A duration in seconds, or None for `none`."""
    return None if text.strip().lower() in _NONE else duration_s(text)


def positive_or_none_s(text: str) -> float | None:
    """A duration of more than zero in seconds, or None for `none`."""
    return None if text.strip().lower() in _NONE else positive_duration_s(text)


def tokens(text: str) -> tuple[str, ...]:
    """Comma-separated class names; empty text is none at all."""
    return tuple(check_token("class", part.strip()) for part in text.split(",") if part.strip())


def class_name(text: str) -> str:
    """A class name."""
    return check_token("class", text)


def worker_or_all(text: str) -> str:
    """A worker's name, or `all`."""
    return text if text == ALL else check_token("worker", text)


def worker_name(text: str) -> str:
    """One worker's name."""
    return check_token("worker", text)


def tenant(text: str) -> str:
    """A tenant's name."""
    return check_tenant(text)


def request(text: str) -> str:
    """A request id, as the X-Request-Id of the response gave it."""
    if not 0 < len(text) <= MAX_CHARS:
        raise ValueError(f"a request id has 1 to {MAX_CHARS} characters, not {len(text)}")
    return text


def lease_s(text: str) -> float:
    """A lease in seconds, up to a day."""
    if (seconds := positive_duration_s(text)) > MAX_LEASE_S:
        raise ValueError(
            f"a lease of {text} is longer than a day: shorten it, or leave it out to hold until continued"
        )
    return seconds


def kind(text: str) -> str:
    """A kind of event."""
    if text not in KINDS:
        raise ValueError(f"no kind of event {text!r}: one of {', '.join(KINDS)}")
    return text
