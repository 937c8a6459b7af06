"""Numbers, times and foreign text as people read them.

Pure. Called by the `view_*` modules and by `app.py` for whatever it prints.
"""

from datetime import UTC, datetime


def printable(text: str) -> str:
    """`text` without anything that could steer a terminal: tenants, ids and reasons come from strangers."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "replace").decode() for char in text
    )


def span(seconds: float) -> str:
    """A duration in s as two units at most: `38ms`, `4.2s`, `3m05s`, `2h10m`, `3d04h`."""
    if seconds < 0:
        return "-" + span(-seconds)
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02}h"


def count(number: float) -> str:
    """A count in five cells or so: `980`, `9800`, `12.3k`, `4.5M`."""
    if number < 0:
        return "-" + count(-number)
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # Up to four digits read well as they are; what would be rounded to 1000.0 takes the next unit.
        if number >= 0.99995 * size and number >= 10_000:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def share(part: float, whole: float) -> str:
    """A percentage, or `-` of nothing."""
    return f"{100 * part / whole:.0f}%" if whole else "-"


def clock(at: float) -> str:
    """The local time of day of a Unix time, to the millisecond."""
    moment = datetime.fromtimestamp(at, UTC).astimezone()
    return f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03}"


def plural(number: int, noun: str) -> str:
    """`1 request`, `3 requests`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
