"""Fixtures of the integration tests: a real nats-server."""

from tests.support.nats import nats_server

__all__ = ["nats_server"]
