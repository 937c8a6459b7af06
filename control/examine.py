"""Finds out what `doctor.py` judges: asks NATS, JetStream and the workers, and changes nothing.

What a user may do is tried for real, with what can have no effect: a command to a worker that cannot exist, a
row that JetStream must refuse. Called by `cox doctor`.
"""

import asyncio
import ipaddress
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import DiscardPolicy, StreamInfo

from coxswain import __version__
from coxswain.control.client import Client
from coxswain.control.doctor import Facts, Look, Stored
from coxswain.control.errors import ControlError, DeniedError
from coxswain.control.lease import holder
from coxswain.schemas.errors import UNREADABLE, RefusedError
from coxswain.schemas.permissions import streams
from coxswain.schemas.subjects import CONTROLLER, OPERATOR

NOBODY: Final = "no-such-worker-doctor"
"""A worker that nobody runs."""
LOOKS: Final = 3
"""Answers of each worker by which its clock is judged."""
NEVER: Final = {"Nats-Expected-Last-Sequence": str(2**62)}
"""A row that is only stored if it is the 2^62th: JetStream refuses it, if it gets to see it."""


async def examine(client: Client, *, timeout_s: float, nkey: str | None = None) -> Facts:
    """Everything that this user can find out; `nkey` is the file of its seed.

    Raises:
        UnreachableError: the connection is lost.
    """
    stored, jetstream = await _streams(client, timeout_s)
    may = await _abilities(client, timeout_s)
    if "set up" not in may or "look" in may:  # an admin sees that a stream is there, and nothing in it
        readable = {
            "read events": client.subjects.stream,
            "read tables": f"KV_{client.subjects.tenants_bucket}",
        }
        may |= {ability for ability, stream in readable.items() if stream in stored or jetstream is False}
    refused = await _refused_rows(client, stored)
    workers = await _workers(client, timeout_s) if "ask" in may else ()
    server, version = client.nc.connected_url, client.nc.connected_server_version
    return Facts(
        fleet=client.subjects.fleet,
        version=__version__,
        server=f"{version.major}.{version.minor}.{version.patch}",
        encrypted=bool(client.nc._server_info.get("tls_required")),  # noqa: SLF001 - no public way to ask
        local=_is_local(server.hostname if server else None),
        seed_mode=_seed_mode(nkey),
        may=may,
        streams=stored,
        refused=refused,
        jetstream=jetstream,
        workers=workers,
        unreadable=tuple(client.unreadable),
        holder=await _holder(client) if stored.get(f"KV_{client.subjects.lease_bucket}") else None,
    )


async def _streams(client: Client, timeout_s: float) -> tuple[dict[str, Stored | None], bool | None]:
    found: dict[str, Stored | None] = {}
    js = client.nc.jetstream(timeout=timeout_s)
    for name in streams(client.subjects):
        try:
            found[name] = _stored(await js.stream_info(name))
        except DeniedError:
            continue
        except nats.js.errors.NotFoundError:
            found[name] = None
        except (nats.js.errors.ServiceUnavailableError, nats.errors.TimeoutError):
            return {}, False
    return found, True if found else None


def _stored(info: StreamInfo) -> Stored:
    config, state = info.config, info.state
    return Stored(
        subjects=tuple(config.subjects or ()),
        max_age_s=config.max_age or 0.0,
        max_bytes=config.max_bytes if config.max_bytes is not None else -1,
        bytes=state.bytes,
        messages=state.messages,
        history=config.max_msgs_per_subject or -1,
        keeps_old=config.discard == DiscardPolicy.NEW,
    )


async def _refused_rows(client: Client, stored: dict[str, Stored | None]) -> dict[str, dict[str, str]]:
    found = {}
    for table in (client.tenants, client.classes):
        name = f"KV_{table.bucket}"
        if stored.get(name):
            with suppress(ControlError):  # gone since, or not ours to read
                found[name] = (await table.get_all()).refused
    return found


async def _abilities(client: Client, timeout_s: float) -> frozenset[str]:
    subjects, nc = client.subjects, client.nc

    async def nothing_there(subject: str, headers: dict[str, Any] | None = None) -> None:
        with suppress(nats.errors.NoRespondersError, nats.errors.TimeoutError):
            await nc.request(subject, b"", timeout=min(timeout_s, 0.5), headers=headers)

    async def hear() -> None:
        await (await nc.subscribe(subjects.status_all)).unsubscribe()

    probes: dict[str, Callable[[], Awaitable[None]]] = {
        "look": hear,
        "ask": lambda: nothing_there(subjects.query(NOBODY, "request")),
        "lead": lambda: nothing_there(subjects.command(CONTROLLER, NOBODY, "drain")),
        "command": lambda: nothing_there(subjects.command(OPERATOR, NOBODY, "drain")),
        "write tables": lambda: nothing_there(f"$KV.{subjects.classes_bucket}.doctor", NEVER),
        # Not empty, so that JetStream refuses it.
        "set up": lambda: _refused(client, f"$JS.API.STREAM.UPDATE.{subjects.stream}"),
    }
    may = set()
    for ability, probe in probes.items():
        try:
            await probe()
        except DeniedError:
            continue
        may.add(ability)
    return frozenset(may)


async def _refused(client: Client, subject: str) -> None:
    with suppress(nats.errors.NoRespondersError, nats.errors.TimeoutError):
        await client.nc.request(subject, b"no JSON", timeout=0.5)


async def _workers(client: Client, timeout_s: float) -> tuple[Look, ...]:
    # Twice: a question to all ends when it gets quiet, and a busy worker may answer late.
    names = {**await client.statuses(wait_s=timeout_s), **await client.statuses(wait_s=timeout_s)}
    seen = await asyncio.gather(*(_worker(client, name, timeout_s) for name in names))
    return tuple(each for each in seen if each is not None)


async def _worker(client: Client, name: str, timeout_s: float) -> Look | None:
    config = None
    looks: list[Look] = []
    with suppress(ControlError, RefusedError):  # gone since it was listed
        for _ in range(LOOKS):
            asked = time.time()
            (frame,) = await client.query(name, "status", timeout_s=timeout_s)
            answered = time.time()
            skew_s = frame.sent_at - (asked + answered) / 2
            looks.append(Look(frame=frame, skew_s=skew_s, unsure_s=(answered - asked) / 2))
        (config,) = await client.query(name, "config", timeout_s=timeout_s)
    if not looks:
        return None
    # The quickest answer knows the clock best.
    best = min(looks, key=lambda look: look.unsure_s)
    return msgspec.structs.replace(best, config=config)


async def _holder(client: Client) -> dict[str, Any] | None:
    try:
        found = msgspec.json.decode(await holder(client.js, client.subjects) or b"null")
    except (ControlError, *UNREADABLE):
        return None
    return found if isinstance(found, dict) else None


def _seed_mode(path: str | None) -> int | None:
    if not path:
        return None
    try:
        found = Path(path).stat()
    except OSError:
        return None
    # Somebody else's file that its group may read, as Kubernetes mounts a Secret: that is how it is given to us.
    return found.st_mode & (0o777 if found.st_uid == os.getuid() else 0o737)


def _is_local(host: str | None) -> bool:
    if host is None or host == "localhost":
        return host is not None
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
