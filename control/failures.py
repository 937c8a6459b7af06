"""A policy that raises: how often, in a row, and what rules instead. Pure; called by `core`, read by `daemon`.

A policy is code that others wrote, asked twenty times a second. One that raises must not end the controller, which does
more than ask it: workers hear that they are led, and get their tables. Why so: docs/decisions/0016.
"""

from typing import Final, Literal

from coxswain.control.policy import Directives

PATIENCE: Final = 20
"""Failures in a row after which another controller may try: a second at the usual cadence. By then every worker has
spoken many times, so that what upset the policy is not one odd message."""
LET_GO_EVERY_S: Final = 60.0
"""How often the lease is given up while the policy fails. In between, a leader without a policy is better than none."""

Stage = Literal["observe", "decide"]


class Failures:
    """What became of asking the policy."""

    def __init__(self) -> None:
        self.total = 0
        self.in_row = 0
        self.error: Exception | None = None
        """The last one, until the policy works again or is asked no more."""
        self.works = True
        """Whether it could do what it was asked last."""
        self.stage: Stage = "observe"
        """What it was asked for when it raised."""
        self._good = Directives()
        self._let_go_at = float("-inf")

    def failed(self, stage: Stage, error: Exception) -> None:
        """It raised."""
        self.total += 1
        self.in_row += 1
        self.stage, self.error, self.works = stage, error, False

    def worked(self, directives: Directives) -> None:
        """It was asked, and all that it said could be carried out."""
        self.in_row, self.error, self.works = 0, None, True
        self._good = directives

    def rested(self) -> None:
        """It looked, and was not asked what to do: we do not lead."""
        self.in_row, self.error = 0, None

    @property
    def instead(self) -> Directives | None:
        """What rules while it fails: nothing new at first; then whoever it held goes on, and its caps are lifted.

        Class tables and ranks stay as it wanted them last.
        """
        return None if self.in_row < PATIENCE else Directives(classes=self._good.classes)

    def should_let_go(self, now: float) -> bool:
        """Whether a leader is to give its lease up at `now`, for others to try; then it counts as done."""
        if self.in_row < PATIENCE or now - self._let_go_at < LET_GO_EVERY_S:
            return False
        self._let_go_at = now
        return True
