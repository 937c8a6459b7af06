"""A control core to drive by hand, and a policy that says what a test tells it to. No NATS, no clock."""

from typing import Any

from coxswain.control.core import Beat, ControlCore, Inputs, Send
from coxswain.control.policy import Directives

EPOCH = (100.0, 7)


class Fixed:
    """A policy that says what a test tells it to."""

    name = "fixed"
    sees = "requests"

    def __init__(self, **directives: Any) -> None:
        self.directives = Directives(**directives)

    def observe(self, *_: object) -> None:
        """Nothing to see."""

    def decide(self, _: float) -> Directives:
        """What the test set."""
        return self.directives


class Driver:
    """A core, and inputs that stay as they are until changed."""

    def __init__(self, policy: Any, **settings: Any) -> None:
        self._ids = iter(range(10**6))
        self.core = ControlCore(policy, "c1", lambda: f"id{next(self._ids)}", **settings)
        self.classes: Any = {}
        self.tenants: Any = {}
        self.epoch: Any = EPOCH

    def step(self, now: float, *frames, answers=()) -> list[Send | Beat]:
        """Everything that goes out."""
        for frame in frames:
            self.core.hear(now, frame)
        inputs = Inputs(classes=self.classes, tenants=self.tenants, epoch=self.epoch, answers=answers)
        outgoing = self.core.step(now, inputs)
        self.core.validate()
        return outgoing

    def sends(self, now: float, *frames, answers=()) -> list[Send]:
        """The commands among it."""
        return [each for each in self.step(now, *frames, answers=answers) if isinstance(each, Send)]
