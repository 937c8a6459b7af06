"""A real steering core whose events are kept as the event log would: for tests of what reads it."""

from typing import Any

from coxswain.schemas import events as ev
from coxswain.service.port import EventOut
from coxswain.service.scheduler.record import Record
from tests.support.fake_engine import FakeEngine


class LoggedEngine(FakeEngine):
    """A fake engine around the real core; `log` is what JetStream would have."""

    def __init__(self, worker: str = "w1", incarnation: str = "01A", **options: Any) -> None:
        self.worker = worker
        self.incarnation = incarnation
        self.log: list[ev.Event] = []
        super().__init__(**options)

    def _emit(self, now: float, record: Record | None, kind: type[ev.Event], fields: dict[str, Any]) -> None:
        super()._emit(now, record, kind, fields)
        subject = record and (
            record.request,
            record.child,
            record.account.name,
            record.class_,
            record.priority,
        )
        out = EventOut(
            str(kind.__struct_config__.tag), len(self.log) + 1, now, self.core.step, subject, fields
        )
        self.log.append(out.event(self.worker, self.incarnation))
