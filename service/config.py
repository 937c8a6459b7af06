"""Settings of the engine side, read once from the environment.

Pure: reads a mapping, opens nothing. Called by the scheduler's shell and the launcher; a bad value is refused
here, in words, before anything starts. How to reach NATS is `common/connection.py`.
"""

import socket
from collections.abc import Mapping
from typing import Final, Literal, cast, get_args

import msgspec

from coxswain.common.connection import AddressRefusedError, Connection
from coxswain.common.logs import FORMATS, LEVELS
from coxswain.schemas.names import MAX_TOKEN_CHARS, NameRefusedError, check_token, sanitise_token
from coxswain.schemas.policy import LEADER_LEASE_S

Bus = Literal["process", "thread"]
MAX_STATUS_INTERVAL_S: Final = 1.0
"""A frame a second, full or not, is what edges (5 s) and controllers (3 s) judge a worker's silence by."""


class SettingRefusedError(ValueError):
    """An environment variable has a value that is not allowed; the text names both, and what is allowed."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine side needs to know before it starts."""

    connection: Connection
    enabled: bool
    """Whether a NATS address was given; without one the worker serves unsteered."""
    worker: str
    """This worker's name in subjects."""
    status_interval_s: float = 0.05
    """Least time between status frames while anything changes."""
    full_interval_s: float = 1.0
    """Least time between full frames, of which dear ones come less often, and between heartbeats of an idle engine."""
    head: int = 64
    """How many waiting requests a frame lists."""
    leader_lease_s: float = LEADER_LEASE_S
    """A leader silent for longer has lost its holds."""
    bus: Bus = "process"
    """Where the bus runs: beside the engine, or inside its process, for debugging and comparison."""
    metrics_tenants: int = 20
    """How many tenants have series of their own on `/metrics`; the rest is `other`."""

    @classmethod
    def from_env(
        cls,
        env: Mapping[str, str],
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        hostname: str | None = None,
    ) -> "Settings":
        """Read the connection and what is a worker's own; check what loggers will read.

        Args:
            env: the environment.
            dp_rank: this engine's data-parallel rank, from 0; part of the name when `dp_size` is over 1.
            dp_size: how many engines share the deployment.
            hostname: names the worker when `COX_WORKER` is not set; this machine's by default.

        Raises:
            SettingRefusedError: for the first value that is not allowed.
        """
        _choice(env, "COX_LOG", *FORMATS)  # read by loggers, which must not fail where they are made
        _choice(env, "COX_LOG_LEVEL", *LEVELS)
        return cls(
            connection=_connection(env),
            enabled=bool(env.get("COX_NATS_URL", "").strip(" ,")),
            worker=_worker(env, dp_rank, dp_size, hostname),
            status_interval_s=_number(env, "COX_STATUS_INTERVAL_S", 0.05, 0.01, MAX_STATUS_INTERVAL_S),
            head=int(_number(env, "COX_STATUS_HEAD", 64, 0, 10_000, whole=True)),
            leader_lease_s=_number(env, "COX_LEADER_LEASE_S", LEADER_LEASE_S, 0.5, 3_600.0),
            bus=cast("Bus", _choice(env, "COX_BUS", *get_args(Bus))),
            metrics_tenants=int(_number(env, "COX_METRICS_TENANTS", 20, 0, 1_000, whole=True)),
        )


def _connection(env: Mapping[str, str]) -> Connection:
    try:
        connection = Connection.from_env(env)
    except NameRefusedError as error:
        raise SettingRefusedError(f"COX_FLEET: {error}") from error
    try:
        return connection.check()
    except AddressRefusedError as error:
        raise SettingRefusedError(f"COX_NATS_URL: {error}") from error


def _choice(env: Mapping[str, str], name: str, *allowed: str) -> str:
    """The variable's value; the first that is allowed where it is not set."""
    value = env.get(name, "").strip() or allowed[0]
    if value not in allowed:
        *others, last = allowed
        raise SettingRefusedError(f"{name} is {value!r}: {', '.join(others)} or {last} is allowed")
    return value


def _worker(env: Mapping[str, str], dp_rank: int, dp_size: int, hostname: str | None) -> str:
    suffix = f"-dp{dp_rank}" if dp_size > 1 else ""
    given, source = env.get("COX_WORKER"), "COX_WORKER"
    if not given:
        # A host may be called anything: make a token of it, with room for the suffix.
        hostname = socket.gethostname() if hostname is None else hostname
        given = sanitise_token(hostname)[: MAX_TOKEN_CHARS - len(suffix)] or "worker"
        source = f"this host is called {hostname!r}, and COX_WORKER, which would name the worker otherwise, is not set"
    try:
        return check_token("worker", check_token("worker", given) + suffix)
    except NameRefusedError as error:
        raise SettingRefusedError(f"{source}: {error}") from error


def _number(
    env: Mapping[str, str],
    name: str,
    default: float,
    least: float,
    most: float,
    *,
    whole: bool = False,
) -> float:
    text = env.get(name, "").strip()
    if not text:
        return default
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = float("nan")  # in no range
    if not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise SettingRefusedError(f"{name} is {text!r}: {kind} from {least:g} to {most:g} is allowed")
    return value
