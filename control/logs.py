"""The log of a controller: lines as a worker's (`common/logs.py`). Set up by the program, which it belongs to."""

import os
import sys

import structlog

from coxswain.common.logs import rules

log = structlog.get_logger()


def set_up(*, json: bool = False) -> None:
    """Log to stderr as `COX_LOG` and `COX_LOG_LEVEL` say, or as JSON in any case."""
    env = {**os.environ, "COX_LOG": "json"} if json else os.environ
    structlog.configure(logger_factory=structlog.WriteLoggerFactory(sys.stderr), **rules(sys.stderr, env))
