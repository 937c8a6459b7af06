"""What a slow or lossy control path costs: two tenants of weights 4 and 1 over several workers, in virtual time.

    python -m bench.staleness [--json PATH] [--workers 4] [--requests 375] [--path 0 4] [--draws 10]

Both are backlogged on every worker, most requests of each on another one. Reported for the time until the first of them
has nothing left to begin on some worker: how far service ÷ weight drifts apart, at most, and the ratio of service
(`ratio_warm`: from 5 s on). Beside it Σ R × D, what the fleet serves in the time D by which decisions are behind
(docs/scaling.md).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from coxswain.lab.devices import DEVICES
from coxswain.lab.experiment import run
from coxswain.lab.life import Life
from coxswain.lab.setup import Setup, Tables
from coxswain.lab.trace import Arrival
from coxswain.schemas.policy import TenantPolicy

WEIGHTS: Final = {"a": 4.0, "b": 1.0}
STATUS_S: Final = 0.05
WARM_UP_S: Final = 5.0
PATHS: Final = (
    (0.05, 0.01, 0.0), (0.2, 0.1, 0.05), (1.0, 0.25, 0.1), (1.0, 1.0, 0.0), (1.0, 1.0, 0.3),
    (0.25, 0.01, 0.0), (0.4, 0.01, 0.0),
)  # fmt: skip
"""Cadence and latency in seconds, loss as a part. The last two are as in a large fleet, whose workers take turns."""


def served(lives: Sequence[Life], tenant: str, at_s: float) -> float:
    """Weighted tokens until then: a request's output evenly between its first token and its end."""
    total = 0.0
    for life in lives:
        if life.arrival.tenant == tenant and (life.first_token_s or at_s) < at_s:
            assert life.first_token_s is not None
            assert life.finished_s is not None
            part = min(1.0, (at_s - life.first_token_s) / (life.finished_s - life.first_token_s))
            total += life.arrival.prompt_tokens + 2 * life.arrival.output_tokens * part
    return total


def measure(
    workers: int, requests: int, cadence_s: float, latency_s: float, loss: float, seed: int = 3
) -> dict[str, Any]:
    """One path, and one draw of which messages are lost."""
    arrivals = [
        Arrival(at_s=0.003 * number, tenant=tenant, prompt_tokens=128, output_tokens=128)
        for number in range(requests * workers)
        for tenant in WEIGHTS
    ]
    tables = Tables(tenants={name: TenantPolicy(weight=weight) for name, weight in WEIGHTS.items()})
    setup = Setup(
        policy="vtc", device=DEVICES["a10g-7b"], tables=tables, workers=workers, route="skewed",
        cadence_s=cadence_s, latency_s=latency_s, loss=loss, status_interval_s=STATUS_S, seed=seed,
    )  # fmt: skip
    outcome = run(arrivals, setup)
    lives = outcome.lives
    last: dict[tuple[str, str], float] = {}
    for life in lives:
        where = life.worker, life.arrival.tenant
        last[where] = max(last.get(where, 0.0), life.first_token_s or 0.0)
    end_s = 0.9 * min(last.values())
    gaps = [
        abs(served(lives, "a", at) / WEIGHTS["a"] - served(lives, "b", at) / WEIGHTS["b"])
        for at in np.linspace(WARM_UP_S, end_s, 60)
    ]
    both = {name: served(lives, name, end_s) for name in WEIGHTS}
    warm = {name: both[name] - served(lives, name, WARM_UP_S) for name in WEIGHTS}
    behind_s = STATUS_S + latency_s + cadence_s + latency_s
    return {
        "workers": workers, "cadence_s": cadence_s, "latency_s": latency_s, "loss": loss, "seed": seed,
        "ratio": round(both["a"] / both["b"], 3),
        "ratio_warm": round(warm["a"] / warm["b"], 3),
        "most_apart": round(max(gaps)), "rate_times_d": round(sum(both.values()) / end_s * behind_s),
        "commands": outcome.commands, "until_s": round(end_s, 1),
    }  # fmt: skip


def main() -> None:
    """Measure all paths."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--requests", type=int, default=375, help="of each tenant, per worker")
    parser.add_argument("--path", type=int, nargs="*", choices=range(len(PATHS)), default=range(len(PATHS)))
    parser.add_argument("--draws", type=int, default=1, help="of what is lost, and where requests go")
    options = parser.parse_args()
    results = []
    for path in (PATHS[number] for number in options.path):
        for seed in range(1, 1 + options.draws):
            results.append(measure(options.workers, options.requests, *path, seed=seed))
            print(json.dumps(results[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
