"""A policy that fails: how often, in a row, and what rules instead. Pure; called by `core`, read by `daemon`.

A policy is code that others wrote, asked twenty times a second. One that raises must not end the controller, which does
more than ask it: workers hear that they are led, and get their tables. Why so: docs/decisions/0016.
"""

from collections.abc import Mapping
from typing import Final, Literal

from coxswain.control.policy import Directives
from coxswain.schemas.policy import ClassPolicy

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
        self.error: BaseException | None = None
        """The last one, until the policy works again or is asked no more."""
        self.works = True
        """Whether it did what it was asked, and has for a while."""
        self.stage: Stage = "observe"
        """What it was asked for when it raised."""
        self._classes: Mapping[str, ClassPolicy] | None = None
        self._well = 0
        """How often in a row nothing was wrong."""
        self._let_go_at = float("-inf")

    def failed(self, stage: Stage, error: BaseException) -> None:
        """It raised."""
        self.in_row += 1
        self._note(stage, error)

    def worked(self, classes: Mapping[str, ClassPolicy] | None, refused: Exception | None = None) -> None:
        """It was asked, and what it said was carried out, but for what was `refused`.

        That is a failure, and none in a row: it was left out, everybody else has what is wanted. And what policies say
        is made of what workers say: one that lies must not cost the fleet its leader.
        """
        self.in_row, self._classes = 0, classes
        if refused is not None:
            self._note("decide", refused)
            return
        self.error = None
        self._well += 1
        # What is wrong is told when it would be sent, which is not in every step.
        self.works = self.works or self._well >= PATIENCE

    def _note(self, stage: Stage, error: BaseException) -> None:
        self.total += 1
        self._well = 0
        self.stage, self.error, self.works = stage, error, False

    def rested(self) -> None:
        """It looked, and was not asked what to do: we do not lead."""
        self.in_row, self.error = 0, None

    @property
    def instead(self) -> Directives | None:
        """What rules while it fails: nothing new at first; then whoever it held goes on, and its caps are lifted.

        Class tables and ranks stay as it wanted them last.
        """
        return None if self.in_row < PATIENCE else Directives(classes=self._classes)

    def should_let_go(self, now: float) -> bool:
        """Whether a leader is to give its lease up at `now`, for others to try; then it counts as done."""
        if self.in_row < PATIENCE or now - self._let_go_at < LET_GO_EVERY_S:
            return False
        self._let_go_at = now
        return True
