"""One NATS connection per API server process, which hears the status of the engines behind it. Shell only.

Started on the server's own loop with the first thing that it serves, which is its lifespan as a rule. Nothing waits for
it: while it hears nothing, what it heard last stands; until it has heard something, everybody is served.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from nats.aio.msg import Msg

from coxswain.common.connection import Connection
from coxswain.common.logs import get_logger
from coxswain.common.nats_client import NatsClient
from coxswain.common.throttle import Throttle
from coxswain.schemas.errors import UNREADABLE
from coxswain.schemas.subjects import Subjects
from coxswain.service.bus.connect import Backoff, close, connect
from coxswain.service.config import SettingRefusedError, Settings
from coxswain.service.edge.caps import EdgeCaps
from coxswain.service.edge.metrics import EdgeMetrics
from coxswain.service.edge.views import EdgeFrame

PENDING_FRAMES: Final = 256
"""Frames that may wait while the server is busy; beyond it they are dropped, which the next full frame repairs."""
PENDING_EVENTS: Final = 16_384
"""Events that may wait, since many come at once; the spans of those dropped lack a piece."""
PENDING_BYTES: Final = 32 * 1024 * 1024
"""Bytes of either."""
LOG_PERIOD_S: Final = 60.0

_decode = msgspec.json.Decoder(EdgeFrame).decode


class EdgeStatus:
    """Keeps an `EdgeCaps` and an `EdgeMetrics` told.

    Args:
        connection: where NATS is.
        caps: what is told; its workers are those listened to.
        metrics: is given full frames as they come.
        traces: is given events as they come (an `edge_trace.Traces`); None: they are not even heard.
        log: a structlog logger; our own by default.
    """

    def __init__(
        self,
        connection: Connection,
        caps: EdgeCaps,
        metrics: EdgeMetrics | None = None,
        traces: Any = None,
        log: Any = None,
    ) -> None:
        self._connection = connection
        self.caps = caps
        self.traces = traces
        self.metrics = metrics or EdgeMetrics(connection.fleet, "", 0)
        self._log = log or get_logger(fleet=connection.fleet)
        self._throttle = Throttle(LOG_PERIOD_S)
        self._task: asyncio.Task[None] | None = None
        self._reachable: bool | None = None

    def start(self) -> None:
        """Begin to listen on the running loop; more than once is as good as once."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._live(), name="coxswain-edge")

    async def stop(self) -> None:
        """Close the connection."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _live(self) -> None:
        backoff = Backoff()
        while True:
            try:
                await self._listen()
            except Exception as error:  # noqa: BLE001 - whatever it was, the server serves on and we try again
                self._say(reachable=False, error=str(error) or type(error).__name__)
            await backoff.pause()

    async def _listen(self) -> None:
        lost = asyncio.Event()
        client = await connect(
            self._connection, name="coxswain-edge", on_error=self._on_error, on_closed=lost.set
        )
        try:
            subjects = Subjects(self._connection.fleet)
            for worker in sorted(self.caps.workers):
                await self._subscribe(client, subjects.status(worker), self._hear_status, PENDING_FRAMES)
                if self.traces is not None:
                    await self._subscribe(
                        client, subjects.event(worker, "*"), self.traces.heard, PENDING_EVENTS
                    )
            self._say(reachable=True)
            await lost.wait()
            self._say(reachable=False, error="connection lost")
        finally:
            await close(client)

    async def _subscribe(
        self, client: NatsClient, subject: str, hear: Callable[[bytes], None], most: int
    ) -> None:
        async def guarded(msg: Msg) -> None:
            try:
                hear(msg.data)
            except UNREADABLE as error:
                self._on_error(error)
            except Exception:  # noqa: BLE001 - one bad message must not end the subscription
                self._log.exception("edge.message_failed", subject=msg.subject)

        await client.subscribe(
            subject, cb=guarded, pending_msgs_limit=most, pending_bytes_limit=PENDING_BYTES
        )

    def _hear_status(self, payload: bytes) -> None:
        seen = _decode(payload)
        self.caps.heard(seen, time.monotonic())
        if seen.worker in self.caps.workers:
            self.metrics.latest.keep(seen, payload, time.time())

    def _say(self, *, reachable: bool, **why: str) -> None:
        """Log once per change of state."""
        if self._reachable is reachable:
            return
        self._reachable = self.metrics.connected = reachable
        if reachable:
            self._log.info("edge.listening", workers=sorted(self.caps.workers))
        else:
            self._log.warning(
                "edge.unreachable",
                hint="the server serves on and retries for ever; caps end after 5 s",
                **why,
            )

    def _on_error(self, error: Exception) -> None:
        """Hear of an error on the connection. Must not raise: nats-py's read loop would end in silence."""
        kind = type(error).__name__
        if self._reachable and (held := self._throttle.allow("error", kind)) is not None:
            self._log.warning("edge.error", kind=kind, error=str(error) or kind, times=held + 1)


def listener(settings: Settings, env: Mapping[str, str]) -> Callable[[Any], EdgeStatus] | None:
    """What makes an `EdgeStatus` for a server's app; None where `COX_NATS_URL` is not set or `COX_EDGE_CAPS` is `off`.

    Raises:
        SettingRefusedError: if `COX_EDGE_CAPS` is neither `on` nor `off`.
    """
    wanted = env.get("COX_EDGE_CAPS", "").strip().lower() or "on"
    if wanted not in ("on", "off"):
        raise SettingRefusedError(f"COX_EDGE_CAPS is {wanted!r}: on or off is allowed")
    if wanted == "off" or not settings.enabled:
        return None

    def listen(app: Any) -> EdgeStatus:
        config = getattr(getattr(app, "state", None), "vllm_config", None)
        workers = workers_behind(settings.worker, getattr(config, "parallel_config", None))
        shared = env.get("PROMETHEUS_MULTIPROC_DIR")  # set by vLLM where it runs several API server processes
        metrics = EdgeMetrics(
            settings.connection.fleet,
            settings.worker,
            settings.metrics_tenants,
            Path(shared) if shared else None,
        )
        return EdgeStatus(settings.connection, EdgeCaps(workers), metrics, _traces(config))

    return listen


def _traces(config: Any) -> Any:
    """What makes spans, where vLLM does (`--otlp-traces-endpoint`); else nothing of it is even imported."""
    observability = getattr(config, "observability_config", None)
    if getattr(observability, "otlp_traces_endpoint", None) is None:
        return None
    from coxswain.service.edge.trace import Traces

    return Traces()


def workers_behind(name: str, parallel: Any = None) -> Iterable[str]:
    """The names of the engines that an API server feeds.

    Args:
        name: the worker's name without a rank.
        parallel: vLLM's `ParallelConfig`, or None if it cannot be known: then there is one engine.
    """
    size = int(getattr(parallel, "data_parallel_size", 1))
    if size <= 1:
        return (name,)
    first, count = 0, size
    if parallel.local_engines_only:  # the balancer in front of several servers chose ours
        first = int(parallel.data_parallel_rank)
        count = max(1, int(parallel.data_parallel_size_local))
    # Under Ray the first rank of a dense model cannot know that there are others, and has the plain name.
    ranks = tuple(f"{name}-dp{rank}" for rank in range(first, first + count))
    return ranks if first else (name, *ranks)
