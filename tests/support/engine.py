"""Stands in for the scheduler at the port, so that the bus can be tested without an engine.

The port is the boundary between the two threads; on this side of it there is nothing but a thread that takes
what comes, answers it, and sleeps.
"""

import threading
import time
from typing import Any

from msgspec.structs import replace

from coxswain.schemas.commands import Reply
from coxswain.schemas.policy import Prices
from coxswain.schemas.status import (
    CommandStats,
    Config,
    Frame,
    KvBlocks,
    Leader,
    QueuePage,
    RequestReport,
    RequestStatus,
    Slots,
    TenantStatus,
)
from coxswain.service.port import AnswerOut, CommandIn, Draft, EventOut, FrameOut, Port, QueryIn, ReplyOut

WORKER = "w1"
INCARNATION = "01HZXW5N6C3V9Q8R7T2K4M1ABC"


class Engine:
    """Takes everything from the port on its own thread; says `applied` to every command.

    Args:
        port: the boundary.
        busy: if true it takes nothing, so that the port's queue fills.
    """

    def __init__(self, port: Port, *, busy: bool = False) -> None:
        self.port = port
        self.taken: list[Any] = []
        self.wakes = 0
        self.busy = busy
        self.status = frame(full=True)
        """What it says when asked."""
        self._events = self._drafts = 0
        self._said: tuple[Frame, bool] | None = None
        self._begun = port.beginnings
        self._woken = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> "Engine":
        """Begin to drain the port."""
        self.port.attach_engine(self._woken.set)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread."""
        self._stopping = True
        self._woken.set()
        self._thread.join(2)

    def commands(self) -> list[str]:
        """The ids of the commands that reached the engine, in order."""
        return [item.command.id for item in self.taken if isinstance(item, CommandIn)]

    def send_frame(self, made: Frame, *, idle: bool = False) -> None:
        """Give the bus a status frame: a full one begins anew. A sleeping engine says its last again if it must."""
        self._said = (made, idle)
        self.port.put(FrameOut(self._draft(made), idle))
        self.port.flush(events=True)

    def _draft(self, made: Frame) -> Draft:
        self._drafts += 1
        return draft(made, self._drafts)

    def send_events(self, count: int) -> None:
        """Give the bus `count` events, numbered on from the last."""
        for _ in range(count):
            self._events += 1
            self.port.put(event(self._events))
        self.port.flush(events=True)

    def _run(self) -> None:
        while not self._stopping:
            self._woken.wait()
            self._woken.clear()
            self.wakes += 1
            while not self.busy and (item := self.port.take() or self.port.take_query()) is not None:
                self.taken.append(item)
                self._answer(item)
            if self._begun != self.port.beginnings:
                self._begun = self.port.beginnings
                if self._said is not None and self._said[1]:
                    self.send_frame(self._said[0], idle=True)
            self.port.flush(events=True)

    def _answer(self, item: Any) -> None:
        if isinstance(item, CommandIn):
            self.port.put(ReplyOut(item.token, _applied(item)))
        elif isinstance(item, QueryIn):
            answers = {
                "queue": QueuePage(requests=(), next=None, total=0),
                "request": RequestReport(request=getattr(item.query, "request", ""), children=()),
                "config": _config(),
                "status": self._draft(self.status),
            }
            self.port.put(AnswerOut(item.token, answers[item.what]))


def draft(made: Frame, number: int) -> Draft:
    """A frame as an engine tells it; a full one begins anew."""
    numbers = range(1, len(made.requests) + 1)
    waiting = [(n, row.output_tokens) for n, row in zip(numbers, made.requests, strict=True)]
    return Draft(
        number=number,
        fresh=made.full,
        complete=True,
        frame=replace(made, full=False, tenants=(), requests=()),
        requests=[(n, row, False) for n, row in zip(numbers, made.requests, strict=True)],
        head=[n for n, _ in waiting],
        tokens=[tokens for _, tokens in waiting],
        tenants=[(row, None, row.output_tokens_total, 2.0) for row in made.tenants],
    )


def event(seq: int) -> EventOut:
    """An event with number `seq`."""
    subject = (f"r{seq}", 0, "default", "default", 0)
    return EventOut("queued", seq, time.time(), seq, subject, {"prompt_tokens": 1})


def frame(*, full: bool = True, requests: int = 0, tenants: int = 0, age_s: float | None = None) -> Frame:
    """A frame with that many rows."""
    return Frame(
        worker=WORKER,
        incarnation=INCARNATION,
        seq=0,
        full=full,
        part=0,
        parts=1,
        sent_at=0.0,
        step=7,
        model="model",
        vllm_version="0",
        state="serving",
        slots=Slots(active=8, total=16, running=0, held=0),
        kv_blocks=KvBlocks(total=100, used=0, held=0),
        step_s=0.01,
        queued=requests,
        running=0,
        held=0,
        preempted_total=0,
        recomputed_tokens_total=0,
        commands=CommandStats(),
        leader=Leader(age_s=age_s),
        config="digest",
        events_dropped_total=0,
        tenants=tuple(_tenant(number) for number in range(tenants)),
        requests=tuple(_request(number) for number in range(requests)),
    )


def _applied(item: CommandIn) -> Reply:
    return Reply(
        id=item.command.id,
        worker=WORKER,
        incarnation=INCARNATION,
        worker_now=time.time(),
        step=1,
        outcome="applied",
        ignored=item.ignored,
    )


def _config() -> Config:
    return Config(
        worker=WORKER,
        incarnation=INCARNATION,
        digest="digest",
        classes={},
        tenants={},
        prices=Prices(),
        leader=Leader(),
        vllm_version="0",
        scheduler={},
    )


def _tenant(number: int) -> TenantStatus:
    return TenantStatus(tenant=f"tenant-{number}")


def _request(number: int) -> RequestStatus:
    return RequestStatus(
        request=f"request-{number}",
        child=0,
        tenant="default",
        class_="default",
        priority=0,
        state="queued",
        kv="none",
        arrived_at=0.0,
        prompt_tokens=10,
        cached_tokens=0,
        output_tokens=0,
        deadline_s=None,
        position=number,
    )
