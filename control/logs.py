"""Structured logs of the control side: readable on a terminal, JSON lines elsewhere, always on stderr."""

import logging
import sys
import time
from collections.abc import Hashable

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
    """Says whether something may be logged again: the same key once per `every_s`, with a bound on keys."""

    def __init__(self, every_s: float = 10.0, max_keys: int = 1_024) -> None:
        self._every_s = every_s
        self._max_keys = max_keys
        self._said: dict[Hashable, float] = {}

    def may(self, *key: Hashable) -> bool:
        """True if `key` was not said for `every_s`; it counts as said now."""
        now = time.monotonic()
        if now - self._said.get(key, float("-inf")) < self._every_s:
            return False
        if len(self._said) >= self._max_keys:
            self._said.clear()
        self._said[key] = now
        return True
