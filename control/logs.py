"""Structured logs of the control side: readable on a terminal, JSON lines elsewhere, always on stderr."""

import logging
import sys
import time
from collections.abc import Callable, Hashable

import structlog

log: structlog.stdlib.BoundLogger = structlog.get_logger("coxswain.control")


def set_up(*, json: bool | None = None, verbose: bool = False) -> None:
    """Configure structlog for a program of the control side; None means JSON unless stderr is a terminal."""
    as_json = not sys.stderr.isatty() if json is None else json
    render = structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


class Seldom:
    """Says whether something may be logged again: each thing once per `every_s`, and `most` things of a kind.

    What strangers cause at will (a worker's name, a subject) goes into `what`: they can invent those without end.
    """

    def __init__(
        self, every_s: float = 60.0, most: int = 20, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every_s = every_s
        self._most = most
        self._clock = clock
        self._said: dict[str, dict[Hashable, float]] = {}

    def may(self, kind: str, *what: Hashable) -> bool:
        """True if this was not said for `every_s`, nor too much else of its `kind`; it counts as said now."""
        now = self._clock()
        said = {it: at for it, at in self._said.get(kind, {}).items() if now - at < self._every_s}
        may = what not in said and len(said) < self._most
        if may:
            said[what] = now
        self._said[kind] = said
        return may
