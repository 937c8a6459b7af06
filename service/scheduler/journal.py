"""Events on their way out: numbered, named and queued for the bus. Nothing is stored here.

The shell (`steered.py`) writes what the core tells; the bus sends it to the event log (`bus/eventlog.py`).
"""

from typing import Any

from coxswain.schemas.events import Event
from coxswain.service.port import EventOut, Port
from coxswain.service.scheduler.record import Record


class Journal:
    """Gives each event its envelope. `seq` counts before the bounded queue, so that a gap is a drop.

    Args:
        port: where events go; its `step` is what each is stamped with.
        worker: this worker's name.
        incarnation: this worker's incarnation.
    """

    def __init__(self, port: Port, worker: str, incarnation: str) -> None:
        self._port = port
        self._worker = worker
        self._incarnation = incarnation
        self._seq = 0
        self.dropped = 0
        """Events for which the queue had no room."""

    def write(self, now: float, record: Record | None, kind: type[Event], fields: dict[str, Any]) -> None:
        """Queue an event; `record` is the request that it concerns, if any."""
        self._seq += 1
        if record is not None:
            fields = {
                "request": record.request, "child": record.child, "tenant": record.account.name,
                "class_": record.class_, "priority": record.priority, **fields,
            }  # fmt: skip
        event = kind(
            id=f"{self._worker}:{self._incarnation}:{self._seq}", worker=self._worker,
            incarnation=self._incarnation, seq=self._seq, at=now, step=self._port.step, **fields,
        )  # fmt: skip
        if not self._port.put(EventOut(event)):
            self.dropped += 1
