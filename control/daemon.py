"""The controller as a process: a connection, a lease, two tables, status in, commands out.

Only wiring lives here: what to send is the core's business, who may send it the lease's.
Called by `cox controller`.
"""

import asyncio
import gc
import random
import signal
import socket
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack, ExitStack, aclosing, asynccontextmanager, suppress
from traceback import format_exception_only
from typing import Any, Final, Generic

import nats.errors
from nats.aio.msg import Msg
from ulid import ULID

from coxswain import __version__
from coxswain.common.connection import Connection, without_users
from coxswain.common.throttle import Throttle
from coxswain.control.client import Client
from coxswain.control.core import Answer, Ask, Beat, ControlCore, Inputs, Listing, Outgoing, Send
from coxswain.control.errors import ControlError, DeniedError, NotSetUpError, UnreachableError
from coxswain.control.lease import Lease
from coxswain.control.logs import log
from coxswain.control.metrics import Meter, serve
from coxswain.control.policy import Policy
from coxswain.control.reader import ImpostorError, Reader
from coxswain.control.rows import Row, Rows
from coxswain.control.tables import LEASE_TTL_S, Table
from coxswain.control.told import ANSWER_S
from coxswain.control.web.board import Standing
from coxswain.control.web.page import Page, Web
from coxswain.schemas.commands import Rank, encode
from coxswain.schemas.errors import UNREADABLE, RefusedError
from coxswain.schemas.names import sanitise_token
from coxswain.schemas.policy import ClassPolicy, LeaseHolder, TenantPolicy
from coxswain.schemas.status import QueueQuery, RequestStatus
from coxswain.schemas.subjects import CONTROLLER

MAX_IN_FLIGHT: Final = 1_024
"""Commands that wait for an answer, over all workers."""
QUEUE_PAGE: Final = 1_000
MAX_QUEUE_PAGES: Final = 10
"""Of one queue: what waits behind 10,000 is not looked at."""
QUERY_TIMEOUT_S: Final = 0.5
COMMAND_TIMEOUT_S: Final = 0.75 * ANSWER_S
"""Shorter than the core's patience: it had better hear that there was no answer than guess."""
JETSTREAM_TIMEOUT_S: Final = 1.0
SET_UP_RETRY_S: Final = 2.0
OTHERS_TRY_S: Final = 2 * LEASE_TTL_S
"""How long a leader whose policy fails stands back: enough for a standby, less than the 5 s that workers wait."""


class LastRead(Generic[Row]):
    """A table as last read; None until it was read once."""

    rows: Rows[Row] | None = None


class Controller:
    """One controller process: it leads when it holds the lease, and stands by, watching, when it does not.

    Args:
        connection: where NATS is and which fleet.
        policy: what order should rule.
        cadence_s: time between two steps.
        name: shown in heartbeats and the lease; made from the host's name if empty.
    """

    def __init__(
        self, connection: Connection, policy: Policy, *, cadence_s: float = 0.05, name: str = ""
    ) -> None:
        self.name = (
            name or f"{sanitise_token(socket.gethostname()) or 'controller'}-{str(ULID())[-6:].lower()}"
        )
        self.core = ControlCore(policy, self.name, lambda: str(ULID()), cadence_s=cadence_s, patient=True)
        self.meter = Meter(connection.fleet, self.name, policy.name, self.core.fleet)
        self.lease: Lease | None = None
        self.stopping = asyncio.Event()
        self._connection = connection
        self._cadence_s = cadence_s
        self._reader = Reader(self.core.fleet)
        self._answers: list[Answer] = []
        self._listings: list[Listing] = []
        self._listed: set[str] = set()
        """Workers whose queue is being read."""
        self._classes = LastRead[ClassPolicy]()
        self._tenants = LastRead[TenantPolicy]()
        self._sending: set[asyncio.Task[None]] = set()
        self._closed = self._back = False
        self._reachable: bool | None = None
        """None until it was tried: changes are logged, once."""
        self._refused: dict[str, dict[str, str]] = {}
        """Per bucket, the rows that were reported and why."""
        self._throttle = Throttle()
        self._failing = False
        """Whether the policy raised when last asked."""
        self.page = Page(connection.fleet, self._standing)
        """What browsers see, if it is served (`run`)."""
        self._clock_offset = time.time() - time.monotonic()

    async def run(self) -> None:
        """Control the fleet until `stopping` is set, through every loss of NATS."""
        log.info(
            "controller.started", name=self.name, policy=self.core.policy.name, fleet=self._connection.fleet
        )
        while not self.stopping.is_set():
            self._closed = self._back = False
            try:
                client = await Client.connect(self._connection, name=self.name, notice=self._noticed)
            except UnreachableError as error:
                if self._reachable is not False:
                    self._reachable = False
                    log.warning("nats.unreachable", error=str(error))
                await self._pause(random.uniform(0.2, 1.0))  # noqa: S311
                continue
            async with client:
                try:
                    await self._session(client)
                except DeniedError as error:
                    if self._throttle.allow("denied", str(error)) is not None:
                        log.error("nats.denied", error=str(error))
                    await self._pause(SET_UP_RETRY_S)
        log.info("controller.stopped", name=self.name)

    async def _session(self, client: Client) -> None:
        """Work over one connection until it is closed for good or we are to stop."""
        self._reachable = self.meter.connected = True
        log.info("nats.connected", urls=without_users(", ".join(self._connection.urls)))
        client.js = client.nc.jetstream(timeout=JETSTREAM_TIMEOUT_S)
        holder = LeaseHolder(
            controller=self.name, policy=self.core.policy.name, since=time.time(), version=__version__
        )
        self.lease = lease = Lease(client.js, client.subjects, holder)
        await client.nc.subscribe(client.subjects.status_all, cb=self._heard)
        async with _background(lease.run()):
            try:
                while not self._ended:
                    await self._watch_and_step(client, lease)
            finally:
                lease.stop()
        await lease.give_back()
        for task in list(self._sending):
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)

    async def _watch_and_step(self, client: Client, lease: Lease) -> None:
        """Step at our cadence until the end, or until NATS was lost and is back: watches begin anew then."""
        self._back = False
        follows = self._follow(client.classes, self._classes), self._follow(client.tenants, self._tenants)
        async with _background(*follows):
            while not self._ended and not self._back:
                await self._step(client, lease)
                await self._pause(self._cadence_s)

    def _standing(self) -> Standing:
        leading = self.lease is not None and self.lease.epoch is not None
        return Standing(name=self.name, leading=leading, reaches_nats=self._reachable is True)

    def _now(self) -> float:
        """Unix time that no jump of the wall clock can move: else every worker would look long silent after one."""
        return time.monotonic() + self._clock_offset

    @property
    def _ended(self) -> bool:
        return self._closed or self.stopping.is_set()

    async def _step(self, client: Client, lease: Lease) -> None:
        answers, self._answers = self._answers, []
        listings, self._listings = self._listings, []
        inputs = Inputs(
            classes=self._classes.rows.good if self._classes.rows else None,
            tenants=self._tenants.rows.good if self._tenants.rows else None,
            epoch=lease.epoch,
            answers=answers,
            listings=listings,
        )
        for outgoing in self._measured(inputs):
            if isinstance(outgoing, Send):
                self._start(client, outgoing)
            elif isinstance(outgoing, Ask):
                self._spawn(self._list(client, outgoing.worker))
            else:
                await self._beat(client, outgoing)
        self._look_after_policy(lease)
        for worker, epoch in self.core.disowned_by.items():
            lease.doubt(worker, epoch)
        for worker, incarnation in self.core.fleet.rivals.items():
            if self._throttle.allow("rival", worker) is not None:
                log.warning(
                    "worker.second_incarnation",
                    worker=worker,
                    other=incarnation,
                    hint="two workers share a name: give each its own COX_WORKER",
                )
        self.core.fleet.rivals.clear()

    def _look_after_policy(self, lease: Lease) -> None:
        """Say that it raised, and why, or that it works again; let another controller try if it does not."""
        failures, name = self.core.failures, self.core.policy.name
        self.meter.policy_failures = failures.total
        if (error := failures.error) is not None:
            self._failing = True
            said = format_exception_only(error)[-1]  # never raises, as others' `__str__` may
            if self._throttle.allow("policy", failures.stage, said) is not None:
                log.error("policy.failed", policy=name, asked_to=failures.stage, exc_info=error)
        elif self._failing and failures.works:
            self._failing = False
            log.info("policy.recovered", policy=name, failures=failures.total)
        if lease.epoch is not None and failures.should_let_go(self._now()):
            lease.step_down(f"policy {name} failed {failures.in_row} times in a row", OTHERS_TRY_S)

    def _measured(self, inputs: Inputs) -> list[Outgoing]:
        """The core's step, and how long it took."""
        meter, began = self.meter, time.perf_counter()
        outgoing = self.core.step(self._now(), inputs)
        meter.lead(inputs.epoch)
        meter.steps.add(time.perf_counter() - began)
        return outgoing

    async def _beat(self, client: Client, beat: Beat) -> None:
        # Lost on the way or not sent at all: the next one comes in half a second.
        with suppress(nats.errors.Error):
            await client.nc.publish(client.subjects.lead, encode(beat.lead))

    def _start(self, client: Client, send: Send) -> None:
        self.meter.sent[send.verb] += 1
        if isinstance(send.command, Rank):
            self.meter.ranks += len(send.command.tenants)
        if len(self._sending) >= MAX_IN_FLIGHT:
            self.meter.refuse(send.verb, None)
            self._answers.append(Answer(send, ok=False))
            return
        self._spawn(self._send(client, send))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _list(self, client: Client, worker: str) -> None:
        """Read a worker's queue, page by page, one reading at a time; without an answer the core asks again."""
        if worker in self._listed:
            return
        rows: list[RequestStatus] = []
        query = QueueQuery(limit=QUEUE_PAGE)
        self._listed.add(worker)
        with suppress(ControlError, RefusedError), ExitStack() as stack:
            stack.callback(self._listed.discard, worker)
            for _ in range(MAX_QUEUE_PAGES):
                (page,) = await client.query(worker, "queue", query, timeout_s=QUERY_TIMEOUT_S)
                rows += page.requests
                if page.next is None:
                    break
                query = QueueQuery(after=page.next, limit=QUEUE_PAGE)
            self._listings.append(Listing(worker, rows))

    async def _send(self, client: Client, send: Send) -> None:
        try:
            (reply,) = await client.command(
                send.worker, send.verb, send.command, role=CONTROLLER, timeout_s=COMMAND_TIMEOUT_S
            )
            answer = Answer(send, reply.outcome != "rejected", reply.code, reply.ignored)
            why = reply.error or ", ".join(reply.ignored[:8])
        except (ControlError, RefusedError) as error:
            answer, why = Answer(send, ok=False), str(error)
        ok, code = answer.ok, answer.code
        self._answers.append(answer)
        self.page.told(send.worker, send.verb, ok=ok, code=code, reason=why)
        if not ok:
            self.meter.refuse(send.verb, code)
        event = "command.fields_ignored" if ok else "command.refused"
        tell = answer.ignored or not ok
        if tell and self._throttle.allow(event, send.worker, send.verb, code) is not None:
            log.warning(event, worker=send.worker, verb=send.verb, code=code, reason=why)

    async def _follow(self, table: Table[Row], last: LastRead[Row]) -> None:
        """Keep one table as it is in KV; a new watch after each reconnection (nats-py's own takes 17 s)."""
        while not self._ended:
            try:
                async with aclosing(table.watch(last.rows)) as snapshots:
                    async for rows in snapshots:
                        last.rows = rows
                        self._tell_refused(table.bucket, rows)
            except NotSetUpError as error:
                if self._throttle.allow("set up", table.bucket) is not None:
                    log.error("tables.missing", error=str(error))
            except UnreachableError as error:
                if self._throttle.allow("table", table.bucket) is not None:
                    log.warning("tables.unreadable", error=str(error))
            await self._pause(SET_UP_RETRY_S * random.uniform(0.5, 1.0))  # noqa: S311

    def _tell_refused(self, bucket: str, rows: Rows[Any]) -> None:
        """Log what is newly wrong: not again at every edit of another row, nor after a reconnection."""
        self.meter.rows[bucket.rpartition("_")[2]] = len(rows.good), len(rows.refused)
        known = self._refused.get(bucket, {})
        for name, reason in rows.refused.items():
            if known.get(name) != reason:
                log.warning("tables.row_refused", bucket=bucket, row=name, reason=reason)
        self._refused[bucket] = dict(rows.refused)

    async def _heard(self, message: Msg) -> None:
        self.page.heard(message.subject.rpartition(".")[2], message.data)
        try:
            frame = self._reader.read(message.subject.rpartition(".")[2], message.data)
        except UNREADABLE as error:
            self.meter.lost["impostor" if isinstance(error, ImpostorError) else "unreadable"] += 1
            if self._throttle.allow("frame", message.subject) is not None:
                log.warning("status.malformed", subject=message.subject, error=str(error))
            return
        now = self._now()
        self.core.hear(now, frame)
        self.meter.frames += 1
        self.meter.lags.add(max(0.0, now - frame.sent_at))

    def _noticed(self, what: str) -> None:
        if what == "back":
            self._back = self._reachable = self.meter.connected = True
            log.info("nats.connected")
        elif what == "lost":
            self.meter.connected = False
            if self._reachable and not self._ended:
                self._reachable = False
                log.warning("nats.lost", hint="nothing is sent until it is back; workers go on by themselves")
        elif what == "closed":
            self._closed = True
            self.meter.connected = False
        elif self._throttle.allow("nats", what) is not None:
            log.warning("nats.error", error=what)

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)


@asynccontextmanager
async def _background(*work: Any) -> AsyncGenerator[None, None]:
    """Run coroutines beside a block and end them with it; if one of them fails, so does the block."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def run(
    connection: Connection,
    policy: Policy,
    *,
    cadence_s: float = 0.05,
    name: str = "",
    web: Web | None = None,
    metrics: tuple[str, int] | None = None,
) -> None:
    """Run a controller until SIGINT or SIGTERM; it gives its lease back before it returns.

    Args:
        connection: where NATS is and which fleet.
        policy: what order should rule.
        cadence_s: time between two steps.
        name: shown in heartbeats and the lease; made from the host's name if empty.
        web: where to serve the page; needs the extra `web`.
        metrics: host and port at which its numbers are served, if anywhere.

    Raises:
        PortTakenError: if that address cannot be listened on.
    """
    controller = Controller(connection, policy, cadence_s=cadence_s, name=name)
    gc.freeze()  # what was imported stays: to look through it again would hold up a step, by 11 ms
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, controller.stopping.set)
    try:
        async with AsyncExitStack() as stack:
            if web is not None:
                from coxswain.control.web.site import serving

                await stack.enter_async_context(serving(controller.page, web))
            if metrics is not None:
                stack.callback(serve(controller.meter, *metrics))
            await controller.run()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
