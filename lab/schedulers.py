"""The schedulers of the laboratory: vLLM's own and ours, with the clock of an agenda instead of the machine's.

Nothing in here decides anything: what is changed is where time comes from and where events go.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Any, Final

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from coxswain.lab.agenda import Agenda
from coxswain.service.request_id import KEY_VARIABLE
from coxswain.service.scheduler.cadence import Cadence
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.steered import SteeredScheduler

KEY: Final = bytes(32)
"""Signs the identities of simulated requests: nothing is secret here."""
Note = Callable[[float, Record], None]
"""Told of every event of a request, with the state it is in now."""

stock: Final = AsyncScheduler
"""vLLM's own."""


def steered(agenda: Agenda, note: Note) -> type[Any]:
    """`SteeredScheduler` in this agenda's time."""

    class Virtual(SteeredScheduler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.port.clock = self.now
            self.port.connected = True
            # Frames are spaced by what they cost in real time: in here that would be a matter of luck.
            self.cadence = Cadence(self.settings.status_interval_s, self.settings.full_interval_s, share=inf)
            self.core.emit = self._heard

        def now(self) -> float:
            return agenda.now

        def has_requests(self) -> bool:
            # The scheduler takes commands for 5 ms of real time at most: that too would be luck.
            while self.port.pending():
                self._drain(agenda.now)
            return super().has_requests()

        def _heard(self, now: float, record: Record | None, kind: Any, fields: dict[str, Any]) -> None:
            del kind, fields
            if record is not None:
                note(now, record)

    return Virtual


@contextmanager
def environment(worker: str, status_interval_s: float) -> Iterator[None]:
    """What a scheduler reads from the environment while it is made: no NATS, our key, this name."""
    saved = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("COX_") and name != "COX_ALLOW_VLLM"]:
        del os.environ[name]
    os.environ |= {
        "COX_WORKER": worker,
        "COX_STATUS_INTERVAL_S": repr(status_interval_s),
        KEY_VARIABLE: KEY.hex(),
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)
