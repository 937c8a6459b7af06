"""What the demo found and what follows from it: the report (JSON) and the claims (✓ or ✗). Pure.

The claims, and nothing else, decide the exit code. Called by `__init__`; the acts make the parts.
"""

from typing import Final, NamedTuple

import msgspec

BETTER: Final = 0.5
"""Under vtc, polite's p95 wait and the service gap must be below this share of what they are under fcfs."""
POLITE_SHARE: Final = 1 / 3
"""Of all service: the polite tenant must stay below an equal share, else it is not polite."""
BACKLOGGED: Final = 0.5
"""Of the measured time: flood and busy must be backlogged together for at least this share."""
LEAST_AHEAD: Final = 5
"""Requests that must wait ahead of the one that is moved to the front."""


class Fairness(msgspec.Struct, frozen=True, kw_only=True):
    """Act 1 under one policy."""

    polite_ttft_p50_s: float
    polite_ttft_p95_s: float
    """Request sent to first token received, by the client's clock."""
    output_tokens: dict[str, int]
    """Per tenant, delivered in the measured time."""
    service_gap_tokens: int
    """Between flood and busy: see `metrics.service_gap`."""


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """Act 2."""

    tokens_while_held: int
    """Beyond those in flight when the hold was applied."""
    recomputed_tokens: int
    identical: bool
    publish_to_applied_s: float
    """Command published to reply received, by the client's clock."""
    continue_to_next_token_s: float


class Priority(msgspec.Struct, frozen=True, kw_only=True):
    """Act 3. Positions count from 0, which is next."""

    waiting_position_before: int
    waiting_position_after: int
    finished_before_others: bool


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `--report` writes."""

    fcfs: Fairness
    vtc: Fairness
    hold: Hold
    priority: Priority

    def json(self) -> bytes:
        """The file's content."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"


class Context(NamedTuple):
    """What is not in the report but tells whether its numbers mean anything."""

    polite_share: float
    """The largest share of all service that the polite tenant had under either policy."""
    backlogged_s: float
    """The shortest time that flood and busy were backlogged together under either policy."""
    wanted_s: float
    """How long they should have been."""
    others_while_held: int
    """Tokens that other requests received during the hold."""


class Claim(NamedTuple):
    """Something that the demo says, whether it was seen, and the numbers."""

    holds: bool
    claim: str
    seen: str


def claims(report: Report, context: Context) -> list[Claim]:
    """Everything that must be true for exit code 0."""
    fcfs, vtc, hold, priority = report.fcfs, report.vtc, report.hold, report.priority
    return [
        Claim(
            context.polite_share < POLITE_SHARE and context.backlogged_s >= BACKLOGGED * context.wanted_s,
            "The load was what act 1 needs: flood and busy always waiting, polite below its share",
            f"both backlogged for {context.backlogged_s:.0f} of {context.wanted_s:.0f} s, polite used "
            f"{context.polite_share:.0%} of the service (an equal share is 33%)",
        ),
        Claim(
            vtc.polite_ttft_p95_s < BETTER * fcfs.polite_ttft_p95_s,
            f"Under vtc the polite tenant waits less than {BETTER:.0%} of what it waits under fcfs",
            f"first token at p95: {fcfs.polite_ttft_p95_s:.2f} s under fcfs, "
            f"{vtc.polite_ttft_p95_s:.2f} s under vtc",
        ),
        Claim(
            vtc.service_gap_tokens < BETTER * fcfs.service_gap_tokens,
            f"Under vtc the gap between flood and busy is less than {BETTER:.0%} of that under fcfs",
            f"largest gap: {fcfs.service_gap_tokens} weighted tokens under fcfs, "
            f"{vtc.service_gap_tokens} under vtc",
        ),
        Claim(
            hold.tokens_while_held == 0 and context.others_while_held > 0,
            "A held request stands still while the others go on",
            f"{hold.tokens_while_held} tokens while held, {context.others_while_held} for the others",
        ),
        Claim(
            hold.recomputed_tokens == 0 and hold.identical,
            "It continues where it stopped: nothing is computed twice, the text is the same",
            f"{hold.recomputed_tokens} tokens recomputed, text "
            + ("identical to an undisturbed run" if hold.identical else "DIFFERENT from an undisturbed run"),
        ),
        Claim(
            priority.waiting_position_before >= LEAST_AHEAD
            and priority.waiting_position_after == 0
            and priority.finished_before_others,
            "A waiting request can be moved to the front",
            f"from place {priority.waiting_position_before + 1} to place "
            f"{priority.waiting_position_after + 1} of the queue, finished "
            f"{'before' if priority.finished_before_others else 'NOT before'} those that waited ahead of it",
        ),
    ]
