"""Events on their way out: numbered and queued for the bus. Nothing is stored here.

The shell (`steered.py`) writes what the core tells; the bus sends it to the event log (`bus/eventlog.py`).
"""

from typing import Any

from coxswain.schemas.events import KINDS, Event
from coxswain.service.port import EventOut, Port
from coxswain.service.scheduler.record import Record

_NAMES = {struct: kind for kind, struct in KINDS.items()}


class Journal:
    """Numbers events. `seq` counts before the bounded queue, so that a gap is a drop.

    Args:
        port: where events go; its `step` is what each is stamped with.
    """

    def __init__(self, port: Port) -> None:
        self._port = port
        self.written = 0
        """Events so far; the number of the latest."""
        self.dropped = 0
        """Events for which the queue had no room."""

    def write(self, now: float, record: Record | None, kind: type[Event], fields: dict[str, Any]) -> None:
        """Queue an event; `record` is the request that it concerns, if any."""
        self.written += 1
        subject = (
            None if record is None
            else (record.request, record.child, record.account.name, record.group.name, record.priority)
        )  # fmt: skip
        if not self._port.put_event(
            EventOut(_NAMES[kind], self.written, now, self._port.step, subject, fields)
        ):
            self.dropped += 1
