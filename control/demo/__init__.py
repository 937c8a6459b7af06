"""`cox demo`: a real vLLM engine on this machine's CPU, a real NATS server, three acts, a verdict.

    cox demo [--report PATH] [--seconds N] [--keep]

Lives here: the order of things, and how they end. What is claimed is in `report`, the acts in `fairness`,
`hold` and `priority`, what runs in `stack`, what goes on with `--keep` in `stay`. Exit code 0 only if every
claim was seen; whatever happens, nothing stays behind: no process, and no file but the report and, after a
failure, the logs.
"""

import argparse
import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from coxswain.control.demo import fairness, hold, priority, stay
from coxswain.control.demo.processes import Crew, DemoError, tail
from coxswain.control.demo.report import Claim, Context, Report, claims
from coxswain.control.demo.screen import Screen
from coxswain.control.demo.stack import Scene, run_stack
from coxswain.control.errors import ControlError
from coxswain.schemas.errors import RefusedError

SECONDS: Final = 30.0
LEAST_SECONDS: Final = 8.0
SEEN, FAILED, INTERRUPTED = 0, 1, 130
"""Exit codes: all claims hold; some do not, or could not be shown; Ctrl-C."""

NEXT_STEPS: Final = """\
Where to go from here
  steer your own vLLM    docs/adopting.md: two flags, or `cox worker MODEL`
  what it all means      docs/concepts.md, docs/protocol.md
  write a policy         docs/policies.md
  the command line       cox --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    options = _parser().parse_args(argv)
    screen = Screen()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="cox-demo-"))
    crew = Crew(folder / "logs")
    code = FAILED
    try:
        code = asyncio.run(_show(screen, crew, folder, options))
        screen.say(f"\n{time.monotonic() - began:.0f} s in all.", style="dim")
    except (KeyboardInterrupt, asyncio.CancelledError):
        screen.say("\ninterrupted: stopping everything", style="yellow")
        code = INTERRUPTED
    except Exception as error:
        _tell(screen, crew, error)
        if os.environ.get("COX_DEBUG") == "1":
            raise
    finally:
        crew.close()
        _tidy(screen, folder, keep_logs=code == FAILED)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cox demo",
        description="See a running vLLM engine being steered: a small real model, a real NATS server, three acts.",
        epilog="Example: cox demo --keep",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="PATH",
        default=os.environ.get("DEMO_REPORT") or None,
        help="write what was measured as JSON (also: DEMO_REPORT)",
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=SECONDS,
        metavar="N",
        help="how long act 1 measures each policy (default %(default)g)",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="afterwards leave all of it running until Ctrl-C, to steer it yourself",
    )
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not LEAST_SECONDS <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text}: from {LEAST_SECONDS:g} to 3600")
    return value


async def _show(screen: Screen, crew: Crew, folder: Path, options: argparse.Namespace) -> int:
    """Everything between the first process and the last word."""
    task = asyncio.current_task()
    assert task is not None
    # SIGINT is asyncio's own; these end the demo in the same order.
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    screen.say("Coxswain steers running vLLM engines over NATS. First everything is started, all of it real.")
    async with run_stack(screen, crew, folder) as scene:
        report, context = await _acts(scene, options.seconds)
        seen = claims(report, context)
        if options.report:
            _write(Path(options.report), report)
        _conclude(screen, seen, options.report)
        if options.keep:
            await stay.play(scene)
    return SEEN if all(claim.holds for claim in seen) else FAILED


async def _acts(scene: Scene, seconds: float) -> tuple[Report, Context]:
    screen = scene.screen
    screen.act(
        1,
        "fairness",
        "Three tenants share one engine that runs 4 requests at a time: flood keeps 24 requests",
        "outstanding, busy 12, polite sends one short request now and then. The same load runs twice: first",
        "come, first served (what vLLM does), then VTC, a policy that shares service fairly. Only the",
        "controller changes.",
    )
    first, fcfs = await fairness.play(scene, "fcfs", "priority", seconds)
    screen.result(_fairness_said("fcfs", fcfs.polite_ttft_p95_s, fcfs.service_gap_tokens, fcfs.output_tokens))
    second, vtc = await fairness.play(scene, "vtc", "fair", seconds)
    screen.result(_fairness_said("vtc", vtc.polite_ttft_p95_s, vtc.service_gap_tokens, vtc.output_tokens))

    screen.act(
        2,
        "hold and continue",
        f"One NATS message holds a request in mid-sentence, another continues it {hold.HOLD_S:g} s later,",
        "while others run. vLLM itself can only preempt by throwing the KV cache away and computing anew;",
        "here it stays in place. The same prompt runs undisturbed first, to compare the text.",
    )
    held, others = await hold.play(scene)
    screen.result(
        f"{held.tokens_while_held} tokens while held ({others} for the others), {held.recomputed_tokens} "
        f"recomputed, text {'identical' if held.identical else 'different'}; publish to applied "
        f"{held.publish_to_applied_s * 1000:.1f} ms, continue to next token "
        f"{held.continue_to_next_token_s * 1000:.1f} ms."
    )

    screen.act(
        3,
        "priority",
        f"Class {priority.CLASS} gets `priority` order with `cox classes set`. With all places taken,",
        f"{priority.WAITING} of its requests wait; then `prioritize` moves the last one to the front.",
    )
    moved = await priority.play(scene)
    screen.result(
        f"from place {moved.waiting_position_before + 1} in the queue to place "
        f"{moved.waiting_position_after + 1}; it "
        f"{'finished first' if moved.finished_before_others else 'did not finish first'}."
    )
    rounds = [first, second]
    context = Context(
        polite_share=max(turn.share("polite") for turn in rounds),
        backlogged_s=min(gap.lasted_s if (gap := turn.gap()) else 0.0 for turn in rounds),
        wanted_s=seconds,
        others_while_held=others,
    )
    return Report(fcfs=fcfs, vtc=vtc, hold=held, priority=moved), context


def _fairness_said(policy: str, p95_s: float, gap: int, tokens: dict[str, int]) -> str:
    received = ", ".join(f"{tenant} {count}" for tenant, count in tokens.items())
    return (
        f"{policy}: polite waits {p95_s:.2f} s for its first token (p95); flood and busy come {gap} weighted "
        f"tokens apart; output tokens: {received}."
    )


def _conclude(screen: Screen, seen: list[Claim], report: Path | None) -> None:
    screen.summary(seen)
    if report:
        screen.say(f"\nThe report is in {report}.")
    screen.say(f"\n{NEXT_STEPS}")


def _write(path: Path, report: Report) -> None:
    try:
        path.write_bytes(report.json())
    except OSError as error:
        raise DemoError(f"the report cannot be written to {path}: {error.strerror}") from error


def _tell(screen: Screen, crew: Crew, error: Exception) -> None:
    """Say what went wrong, and show the end of the log that explains it."""
    known = isinstance(error, DemoError | ControlError | RefusedError)
    message = str(error) if known else f"unexpected {type(error).__name__}: {error} (COX_DEBUG=1 shows where)"
    log = (error.log if isinstance(error, DemoError) else None) or crew.logs / "worker.log"
    try:
        crew.check()
    except DemoError as death:
        # A process that died is the reason for whatever we noticed of it.
        message, log = f"{death} ({message})", death.log or log
    screen.failure(f"\nThe demo failed: {message}", tail(log))


def _tidy(screen: Screen, folder: Path, *, keep_logs: bool) -> None:
    """Remove what we made; after a failure the logs stay, and it says where."""
    if not keep_logs:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for entry in folder.iterdir():
        if entry.name != "logs":
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
    screen.say(f"Logs: {folder / 'logs'}", style="dim")
