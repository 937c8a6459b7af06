"""Everything that decides a run, as data. Pure; made by `cox lab`, tests and benchmarks; `experiment` runs it."""

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

import msgspec

from coxswain.control.policy import Tables
from coxswain.lab.devices import DEVICES, Device

Admission = Literal["reserve", "vllm"]
"""Who may enter: whose whole output is sure to fit (`admission`), or whose prompt fits, as vLLM has it."""
Route = Literal["least", "round", "random", "skewed"]
"""To the worker with the fewest requests; to each tenant's in turn; to any; to any, each tenant preferring another."""
Kind = Literal["steered", "fcfs", "priority"]
"""Our scheduler, or vLLM's own with this policy."""

STOCK: Final[Mapping[str, Kind]] = {"stock-fcfs": "fcfs", "stock-priority": "priority"}
"""vLLM's own schedulers as policies: without a controller."""
RPM: Final = "rpm"
"""`rpm20`: as fcfs, but a tenant's request is refused when 20 of it were accepted in the last 60 s."""

BUCKET: Final = "bucket"
"""`bucket60`: as fcfs, but each tenant has a token bucket of 60 requests a minute that holds ten seconds' worth."""

ORACLES: Final[Mapping[str, float]] = {"vtc-oracle": 0.0, "vtc-oracle50": 0.5}
"""vtc that is told how long outputs will be, and how far off that may be: 0.5 is ± 50 %, evenly."""


class Outage(NamedTuple):
    """The controller is dead from `at_s` on, for `for_s`. Seconds."""

    at_s: float
    for_s: float


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides a run but its traffic. Times in seconds."""

    policy: str = "vtc"
    """A policy's name, or one of `STOCK`, or `rpm` or `bucket` with a number."""
    settings: tuple[str, ...] = ()
    """`key=value` for the policy."""
    device: Device = DEVICES["a10g-7b"]
    admission: Admission = "vllm"
    tables: Tables = Tables()
    workers: int = 1
    route: Route = "least"
    cadence_s: float = 0.05
    """Between two steps of the controller."""
    status_interval_s: float = 0.05
    """Between two status frames of a busy worker."""
    latency_s: float = 0.01
    """Of a message, either way."""
    loss: float = 0.0
    """The part of messages that is lost, either way."""
    outages: tuple[Outage, ...] = ()
    seed: int = 0
    """Of routes and losses; traffic has its own."""
