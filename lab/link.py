"""The network between workers and a controller, in virtual time: it delays, and it loses.

Each message takes `latency_s` and is lost with probability `loss`, independently; which ones is decided by the seed.
NATS itself loses nothing between two that are connected: loss here stands for slow consumers, reconnections and
everything else by which a frame or a command does not arrive.
"""

import random
from collections.abc import Callable

from coxswain.lab.agenda import Agenda


class Link:
    """One way or both: whoever sends says what happens on arrival.

    Args:
        agenda: whose time it lives in.
        latency_s: how long a message is under way.
        loss: the part of messages that never arrive, 0 to 1.
        seed: decides which.
    """

    def __init__(self, agenda: Agenda, *, latency_s: float, loss: float, seed: int) -> None:
        self._agenda = agenda
        self._latency_s = latency_s
        self._loss = loss
        self._random = random.Random(seed)  # noqa: S311 — not for secrets
        self.sent = 0
        self.lost = 0

    def send(self, arrive: Callable[[], None]) -> None:
        """Send a message; `arrive` is called when, and if, it is there."""
        self.sent += 1
        if self._loss and self._random.random() < self._loss:
            self.lost += 1
            return
        self._agenda.after(self._latency_s, arrive)
