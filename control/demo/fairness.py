"""Act 1, fairness: the same load under first-come-first-served and under VTC.

Drives the load, measures it from outside (client's clock, worker's status), decides nothing about the result.
Called by `__init__`.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from rich.table import Table
from rich.text import Text

from coxswain.control.demo import metrics
from coxswain.control.demo.load import BUSY, FLOOD, POLITE, TENANTS, Ask, Closed, asks, moments, starts
from coxswain.control.demo.processes import DemoError, first_error
from coxswain.control.demo.report import Fairness
from coxswain.control.demo.screen import View
from coxswain.control.demo.stack import Scene, new_id
from coxswain.control.demo.streams import Stream
from coxswain.schemas.commands import Abort, Rank, Targets
from coxswain.schemas.policy import TenantRank
from coxswain.schemas.status import TenantStatus

SEED: Final = 1
RAMP_S: Final = 2.0
"""From the first request to the measured time: the queue builds up."""
LAST_POLITE_S: Final = 20.0
"""How long the last polite requests may take after the measured time; then what they waited so far counts."""
BAR_CHARS: Final = 16
"""Of a bar that is all of the service: the table fits 80 columns, where one tenant has most of it, too."""


@dataclass
class Round:
    """One policy's turn."""

    policy: str
    seconds: float
    began_at: float = 0.0
    """When the measured time begins, Unix s."""
    before: dict[str, int] = field(default_factory=dict)
    """Output tokens of each tenant when the measured time began."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Output tokens of each tenant in the measured time; empty until it is over."""
    polite: list[Stream] = field(default_factory=list)
    samples: list[metrics.Sample] = field(default_factory=list)
    stopped: bool = False

    def ttfts(self) -> list[float]:
        """The polite tenant's waits; those that wait still count with the time that they have waited."""
        now = time.monotonic()
        return [
            stream.ttft_s if stream.ttft_s is not None else (stream.ended_at or now) - stream.sent_at
            for stream in self.polite
        ]

    def output(self, rows: Mapping[str, TenantStatus]) -> dict[str, int]:
        """Output tokens of each tenant in this turn, given the worker's rows now."""
        return {
            tenant: rows[tenant].output_tokens_total - self.before.get(tenant, 0) if tenant in rows else 0
            for tenant in TENANTS
        }

    def window(self) -> list[metrics.Sample]:
        """Samples of the measured time."""
        end = self.began_at + self.seconds
        return [sample for sample in self.samples if self.began_at <= sample.at <= end]

    def gap(self) -> metrics.Gap | None:
        """The service gap so far."""
        return metrics.service_gap(self.window(), FLOOD.tenant, BUSY.tenant)

    def share(self, tenant: str) -> float:
        """A tenant's share of all service in the measured time."""
        window = self.window()
        total = sum(metrics.growth(window, each) for each in TENANTS)
        return metrics.growth(window, tenant) / total if total else 0.0


async def play(scene: Scene, policy: str, order: str, seconds: float) -> tuple[Round, Fairness]:
    """Run the load under one policy for `seconds`.

    Returns:
        The round, and what the report says of it.

    Raises:
        DemoError: there was nothing to measure, or something failed.
    """
    await scene.stop_controller()
    await _level(scene)
    await scene.start_controller(policy, order)
    turn = Round(policy, seconds, before=_output(scene))
    scene.watch.samples = turn.samples
    turn.began_at = time.time() + RAMP_S
    with first_error():
        async with scene.screen.show(_view(turn, scene)), asyncio.TaskGroup() as group:
            for load in (FLOOD, BUSY):
                stock = asks(load.tenant, load.sizes, SEED)
                for wait_s in starts(load, RAMP_S / 2):
                    group.create_task(_keep_asking(scene, turn, load, stock, wait_s))
            polite = [
                group.create_task(_ask_later(scene, turn, at, ask)) for at, ask in _polite_plan(seconds)
            ]
            await asyncio.sleep(RAMP_S)
            turn.before = _output(scene)
            await asyncio.sleep(max(0.0, turn.began_at + seconds - time.time()))
            turn.tokens = turn.output(_rows(scene))
            # The others keep up their load until the last polite request was answered: no wait is cut short.
            await asyncio.wait(polite, timeout=LAST_POLITE_S)
            turn.stopped = True
            await scene.command(
                "abort", Abort(id=new_id(), targets=Targets(all=True), reason="end of the act")
            )
    await scene.idle()
    gap, ttfts = turn.gap(), turn.ttfts()
    if gap is None or not ttfts:
        raise DemoError(f"under {policy} flood and busy never were backlogged together: nothing to measure")
    return turn, Fairness(
        polite_ttft_p50_s=round(metrics.percentile(ttfts, 50), 4),
        polite_ttft_p95_s=round(metrics.percentile(ttfts, 95), 4),
        output_tokens=turn.tokens,
        service_gap_tokens=gap.largest,
    )


def _polite_plan(seconds: float) -> list[tuple[float, Ask]]:
    """The polite tenant's requests and when each is sent."""
    return list(zip(moments(POLITE, seconds, SEED), asks(POLITE.tenant, POLITE.sizes, SEED), strict=False))


async def _keep_asking(scene: Scene, turn: Round, load: Closed, stock: Iterator[Ask], wait_s: float) -> None:
    """One of a tenant's outstanding requests: the next follows when it ends."""
    await asyncio.sleep(wait_s)
    while not turn.stopped:
        await scene.endpoint.run(Stream(load.tenant, next(stock)))


async def _ask_later(scene: Scene, turn: Round, at: float, ask: Ask) -> None:
    await asyncio.sleep(max(0.0, turn.began_at + at - time.time()))
    stream = Stream(POLITE.tenant, ask, sent_at=time.monotonic())
    turn.polite.append(stream)
    await scene.endpoint.run(stream)


async def _level(scene: Scene) -> None:
    """Set every tenant's virtual time to zero, so that no turn inherits another's debts.

    While no controller runs: one that leads would put its own count back at once.
    """
    rows = {
        name: TenantRank(base=-(row.charged + row.lift), weight=row.weight)
        for name, row in _rows(scene).items()
    }
    view = scene.watch.view
    if rows and view is not None:
        await scene.command("rank", Rank(id=new_id(), incarnation=view.incarnation, tenants=rows))


def _rows(scene: Scene) -> dict[str, TenantStatus]:
    return dict(scene.watch.view.rows) if scene.watch.view is not None else {}


def _output(scene: Scene) -> dict[str, int]:
    """Output tokens of each tenant since the worker started."""
    return {name: row.output_tokens_total for name, row in _rows(scene).items()}


def _view(turn: Round, scene: Scene) -> View:
    def table() -> Table:
        shown = Table(title=f"{turn.policy}: {_left(turn)}", title_justify="left", box=None, padding=(0, 2))
        for heading in ("tenant", "waiting", "running", "output tokens", "share of service", ""):
            shown.add_column(
                heading, justify="right" if heading in ("waiting", "running", "output tokens") else "left"
            )
        rows = _rows(scene)
        output = turn.tokens or turn.output(rows)
        for tenant in TENANTS:
            row = rows.get(tenant)
            share = turn.share(tenant)
            shown.add_row(
                tenant,
                str(row.queued if row else 0),
                str(row.running if row else 0),
                str(output[tenant]),
                Text("█" * round(BAR_CHARS * share), style=_COLOURS[tenant]),
                f"{share:.0%}",
            )
        shown.caption = _waits(turn)
        shown.caption_justify = "left"
        return shown

    def line() -> str:
        shares = ", ".join(f"{tenant} {turn.share(tenant):.0%}" for tenant in TENANTS)
        return f"{turn.policy}, {_left(turn)}: service {shares}; {_waits(turn)}"

    return View(table, line)


_COLOURS: Final = {FLOOD.tenant: "red", BUSY.tenant: "yellow", POLITE.tenant: "green"}


def _left(turn: Round) -> str:
    left = turn.began_at + turn.seconds - time.time()
    return (
        f"{left:.0f} s left"
        if left > 0
        else "waiting for the last polite answers"
        if not turn.stopped
        else "done"
    )


def _waits(turn: Round) -> str:
    ttfts, gap = turn.ttfts(), turn.gap()
    wait = f"{metrics.percentile(ttfts, 50):.2f} s at p50" if ttfts else "-"
    return f"polite waits {wait} for its first token; gap between flood and busy {gap.largest if gap else 0}"
