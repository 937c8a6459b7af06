"""Traffic: who asks for what and when, from a CSV file or made by `suites`.

    arrival_s,tenant,prompt_tokens,output_tokens[,class][,slo_s]

Lengths are what the request has and what it will say: nothing ends early. An SLO is its class's, of which there is one:
lines that name a class share it, lines that name none are of class `default`. Pure apart from reading the file.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from coxswain.schemas.names import DEFAULT, check_tenant, check_token

NEEDED: Final = ("arrival_s", "tenant", "prompt_tokens", "output_tokens")
OPTIONAL: Final = ("class", "slo_s")


class TraceError(Exception):
    """A trace cannot be used; the text says which, where and why."""


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """One request to come. Times in seconds since the beginning of the traffic, lengths in tokens."""

    at_s: float
    tenant: str
    prompt_tokens: int
    output_tokens: int
    class_: str = ""
    """Empty: it asks for none."""
    slo_s: float | None = None
    """By when its first token is wanted, after its arrival."""

    @property
    def cost(self) -> int:
        """Its service in full, in weighted tokens: prompt + 2 × output (VTC's wp = 1, wq = 2)."""
        return self.prompt_tokens + 2 * self.output_tokens


def read(path: Path) -> tuple[Arrival, ...]:
    """The arrivals of a CSV file, in order of time.

    Raises:
        TraceError: the file cannot be read, lacks a column, is empty, or has a value that does not fit.
    """
    try:
        with path.open(newline="") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or ()
            if lacking := [name for name in NEEDED if name not in columns]:
                raise TraceError(
                    f"{path}: column {', '.join(lacking)} is missing: it has {', '.join(columns)}"
                )
            if unknown := [name for name in columns if name not in (*NEEDED, *OPTIONAL)]:
                raise TraceError(
                    f"{path}: unknown column {', '.join(unknown)}: allowed are {', '.join((*NEEDED, *OPTIONAL))}"
                )
            arrivals = [_arrival(path, rows.line_num, row) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path} cannot be read: {error}") from error
    if not arrivals:
        raise TraceError(f"{path} has no arrivals")
    return ordered(arrivals)


def ordered(arrivals: Iterable[Arrival]) -> tuple[Arrival, ...]:
    """In order of time; equal times stay in the order given."""
    return tuple(sorted(arrivals, key=lambda arrival: arrival.at_s))


def slos(arrivals: Iterable[Arrival]) -> dict[str, float]:
    """The SLO (s) of every class that has one; of a class, any of its lines may say it.

    Raises:
        TraceError: a class is given two.
    """
    found: dict[str, float] = {}
    for arrival in arrivals:
        class_, slo_s = arrival.class_ or DEFAULT, arrival.slo_s
        if slo_s is not None and found.setdefault(class_, slo_s) != slo_s:
            raise TraceError(
                f"class {class_} has an slo_s of {found[class_]:g} and of {slo_s:g}: one is allowed. Requests with "
                "another belong into another class (column class)"
            )
    return found


def tenants(arrivals: Sequence[Arrival]) -> list[str]:
    """Who is in it: by name, numbers in names by value (c2 before c10)."""
    return sorted({arrival.tenant for arrival in arrivals}, key=natural)


def natural(name: str) -> tuple[str, int, str]:
    """The key that sorts c2 before c10."""
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or -1), name


def _arrival(path: Path, line: int, row: dict[str, Any]) -> Arrival:
    try:
        at_s, slo = float(row["arrival_s"]), row.get("slo_s")
        prompt, output = int(row["prompt_tokens"]), int(row["output_tokens"])
        class_, slo_s = row.get("class") or "", float(slo) if slo else None
        check_tenant(row["tenant"])
        if class_:
            check_token("class", class_)
    except (TypeError, ValueError) as error:
        raise TraceError(f"{path}, line {line}: {error}") from error
    if (
        not (math.isfinite(at_s) and at_s >= 0)
        or prompt < 1
        or output < 1
        or not (slo_s is None or slo_s > 0)
    ):
        raise TraceError(
            f"{path}, line {line}: a time from 0, at least one token in and out, and an SLO over 0 are allowed"
        )
    return Arrival(
        at_s=at_s,
        tenant=row["tenant"],
        prompt_tokens=prompt,
        output_tokens=output,
        class_=class_,
        slo_s=slo_s,
    )
