"""Traffic by name: the suites of VTC's evaluation, made exactly as its authors make them, and their real trace.

Source: VTC-artifact, fair_bench/{exp_suite,trace}.py, with their generator and seed, so that the arrivals are theirs
to the last digit; where a committed result has another duration or rate than exp_suite.py, the result's. `real` is
read from a file that does not come with Coxswain (docs/lab.md says where it is from).
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec
import numpy as np

from coxswain.control.policy import Tables
from coxswain.lab.setup import Admission
from coxswain.lab.trace import Arrival, TraceError, ordered, read
from coxswain.schemas.policy import TenantPolicy

SEED: Final = 42
"""The authors'."""
FOLDER_VARIABLE: Final = "COX_TRACES"
"""Environment variable with the folder that holds trace files."""
REAL: Final = "vtc_arena.csv"

Make = Callable[[np.random.RandomState], list[Arrival]]


class Suite(msgspec.Struct, frozen=True, kw_only=True):
    """Traffic with a name, and the tables that it is to run under."""

    name: str
    what: str
    """In a line."""
    make: Make | None = None
    """From a generator of random numbers; None for traffic that is read from a file."""
    file: str = ""
    """That file, in the folder of traces."""
    tables: Tables = Tables()
    admission: Admission = "reserve"
    """How requests are admitted unless somebody says otherwise: as in the run that it is compared with."""
    device: str = "vtc-a10g"

    def arrivals(self, *, seed: int = SEED, path: Path | None = None) -> tuple[Arrival, ...]:
        """The traffic, in order of time.

        Args:
            seed: of the generator; traffic from a file has none.
            path: where the file is; by default in the folder that COX_TRACES names.

        Raises:
            TraceError: the file is not there, or is no trace.
        """
        if self.make is not None:
            return ordered(self.make(np.random.RandomState(seed)))
        return read(path or find(self.file))


def find(file: str) -> Path:
    """Where a trace file is.

    Raises:
        TraceError: nobody said, or it is not there.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None:
        raise TraceError(
            f"this suite needs {file}, which does not come with Coxswain: give it with --trace PATH, or name its "
            f"folder in {FOLDER_VARIABLE}; docs/lab.md says where it is from"
        )
    path = Path(folder) / file
    if not path.is_file():
        raise TraceError(f"{path} does not exist: docs/lab.md says where {file} comes from")
    return path


# The authors' generators. They draw in this order; lengths that do not vary draw nothing, as theirs.

Lengths = tuple[int, int]
"""Prompt and output, in tokens."""
EVEN: Final = (256, 256)


def steady(
    rates: tuple[float, ...], duration_s: float, *, on_off_s: float = 0.0, begins_s: float = 0.0
) -> Make:
    """Evenly spaced requests, `rates` per second and tenant; tenant 0 pauses every other `on_off_s`, if any."""

    def make(draw: np.random.RandomState) -> list[Arrival]:
        arrivals = []
        for place, rate in enumerate(rates):
            at_s = begins_s + draw.rand() / rate
            for _ in range(int(rate * duration_s)):
                at_s += 1 / rate
                if not (on_off_s and place == 0 and int(at_s // on_off_s) & 1):
                    arrivals.append(_arrival(at_s, place, EVEN))
        return arrivals

    return make


def increasing(rate: float, begin: float, end: float, duration_s: float) -> Make:
    """Tenant 0 at `rate`; tenant 1 from `begin` to `end` requests per second."""

    def make(draw: np.random.RandomState) -> list[Arrival]:
        del draw
        arrivals = [_arrival((place + 1) / rate, 0, EVEN) for place in range(int(rate * duration_s))]
        at_s = 0.0
        for _ in range(int(0.5 * (begin + end) * duration_s)):
            at_s += 1 / (begin + (end - begin) * at_s / duration_s)
            arrivals.append(_arrival(at_s, 1, EVEN))
        return arrivals

    return make


def poisson(rates: tuple[float, float], duration_s: float, first: Lengths, second: Lengths) -> Make:
    """Two tenants whose requests come in one Poisson process and have lengths of their own."""

    def make(draw: np.random.RandomState) -> list[Arrival]:
        count, total = int(sum(rates) * duration_s), sum(rates)
        places = (draw.rand(count) > rates[0] / total).astype(int)
        intervals = draw.gamma(1.0, 1 / total, count)
        return [
            _arrival(at_s, place, second if place else first)
            for at_s, place in zip(np.cumsum(intervals), places, strict=True)
        ]

    return make


def shifting(duration_s: float) -> Make:
    """Three phases: tenant 0 on and off below its share, both overloading, tenant 0 below its share."""
    third = duration_s / 3
    phases = (
        steady((0.5, 2.0), third, on_off_s=60.0),
        steady((1.0, 1.0), third, begins_s=third),
        steady((0.5, 1.5), third, begins_s=2 * third),
    )

    def make(draw: np.random.RandomState) -> list[Arrival]:
        return [arrival for phase in phases for arrival in phase(draw)]

    return make


def _arrival(at_s: float, place: int, lengths: Lengths) -> Arrival:
    prompt, output = lengths
    return Arrival(at_s=float(at_s), tenant=f"c{place}", prompt_tokens=prompt, output_tokens=output)


def adversary(requests: int, lengths: Lengths) -> Make:
    """VTC's theorem 4.8: tenant 0 has filled the batch when tenant 1 comes; both want more than they get from then."""

    def make(draw: np.random.RandomState) -> list[Arrival]:
        del draw
        both = ((0.0, 0), (1.0, 1))
        return [_arrival(at_s, place, lengths) for at_s, place in both for _ in range(requests)]

    return make


_WEIGHTS: Final = Tables(tenants={f"c{place}": TenantPolicy(weight=place + 1.0) for place in range(4)})

_ALL: Final = (
    Suite(name="real", what="27 tenants of a chat arena over 10 min, 1,500 requests; needs a file", file=REAL),
    Suite(name="overload", what="2 tenants at 1.5 and 3 req/s, 256 in and out, 6 min", make=steady((1.5, 3.0), 360)),
    Suite(name="overload-fcfs", what="the same for 10 min, as published for FCFS", make=steady((1.5, 3.0), 600)),
    Suite(
        name="overload-multi", what="8 tenants at 0.4 (3) and 0.6 (5) req/s, 6 min",
        make=steady((0.4,) * 3 + (0.6,) * 5, 360),
    ),
    Suite(
        name="weighted", what="4 tenants of weight 1 to 4 at 0.4 to 1.6 req/s, 6 min",
        make=steady((0.4, 0.8, 1.2, 1.6), 360), tables=_WEIGHTS,
    ),
    Suite(
        name="overload-weighted", what="4 tenants of equal weight at 0.8, 0.8, 1.2 and 1.6 req/s, 6 min",
        make=steady((0.8, 0.8, 1.2, 1.6), 360),
    ),
    Suite(name="proportional", what="3 tenants at 0.25, 0.5 and 1.5 req/s, 10 min", make=steady((0.25, 0.5, 1.5), 600)),
    Suite(
        name="on_off_less", what="tenant 0 on and off at 0.5 req/s, tenant 1 at 2, 10 min",
        make=steady((0.5, 2.0), 600, on_off_s=60.0),
    ),
    Suite(
        name="on_off_overload", what="tenant 0 on and off at 2 req/s, tenant 1 at 3, 10 min",
        make=steady((2.0, 3.0), 600, on_off_s=60.0),
    ),
    Suite(
        name="poisson_short_long", what="many short (64/64) against few long (256/256), Poisson, 10 min",
        make=poisson((8.0, 1.5), 600, (64, 64), EVEN),
    ),
    Suite(
        name="poisson_short_long_2", what="long in (512/32) against long out (32/512), Poisson, 10 min",
        make=poisson((8.0, 1.5), 600, (512, 32), (32, 512)),
    ),
    Suite(
        name="poisson_short_long_2-fcfs", what="the same for 5 min, as published for FCFS",
        make=poisson((8.0, 1.5), 300, (512, 32), (32, 512)),
    ),
    Suite(
        name="increase", what="tenant 0 at 0.5 req/s, tenant 1 from 0.2 to 2, 10 min",
        make=increasing(0.5, 0.2, 2.0, 600),
    ),
    Suite(
        name="adversary", what="tenant 0 fills 10 slots with long outputs, then tenant 1 comes: theorem 4.8's instance",
        make=adversary(60, (1, 512)), admission="vllm", device="ten-slots",
    ),
    Suite(name="dist_shift", what="on and off, then overload, then below share, 15 min", make=shifting(900)),
)  # fmt: skip

SUITES: Final[Mapping[str, Suite]] = MappingProxyType({suite.name: suite for suite in _ALL})
"""By name."""
