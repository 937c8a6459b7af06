"""Answers to queries: which question gets which report. Pure; it changes nothing.

Called by `inbox.py` between steps, in the order in which queries came.
"""

from collections.abc import Callable
from typing import Any

from coxswain.schemas import status as st
from coxswain.schemas.errors import Code, RefusedError
from coxswain.service.port import Draft, QueryIn
from coxswain.service.scheduler.report import Reporter

Answer = st.QueuePage | st.RequestReport | st.Config | Draft | RefusedError


class Answers:
    """Answers `queue`, `request`, `status` and `config` (docs/protocol.md).

    Args:
        reporter: what is known.
        look: tells what is new as of the time it is given, so that the bus has everything.
        settings: the engine's own settings that matter to steering.
    """

    def __init__(self, reporter: Reporter, look: Callable[[float], Draft], settings: dict[str, Any]) -> None:
        self._reporter = reporter
        self._look = look
        self._settings = settings

    def answer(self, now: float, item: QueryIn) -> Answer:
        """The answer; a refusal is one. Never raises for what a query contains."""
        query = item.query
        try:
            if isinstance(query, st.RequestQuery):
                return self._reporter.request(query.request)
            if item.what == "queue":
                return self._reporter.page(query or st.QueueQuery())
            if item.what == "status":
                return self._look(now)
            if item.what == "config":
                return self._config(now)
        except RefusedError as refusal:
            return refusal
        return RefusedError(Code.MALFORMED, f"unknown query {item.what!r}")

    def _config(self, now: float) -> st.Config:
        identity, core = self._reporter.identity, self._reporter.core
        return st.Config(
            worker=identity.worker, incarnation=identity.incarnation, digest=core.digest,
            classes=core.classes, tenants=core.tenants.table, prices=core.tenants.prices,
            leader=self._reporter.leader(now), vllm_version=identity.vllm_version, scheduler=self._settings,
        )  # fmt: skip
