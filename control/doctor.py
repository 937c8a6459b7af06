"""What is wrong with a fleet and how to mend it, judged from facts. Pure; `examine.py` collects them.

Called by `cox doctor`. Each check is one function from facts to findings; a finding that is not fine says how
to mend it. What a user's role may not look at is skipped, and said to be.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import msgspec

from coxswain.control.tables import HISTORY, LEASE_TTL_S, NEW_LOG
from coxswain.schemas.permissions import streams
from coxswain.schemas.policy import LEADER_LEASE_S
from coxswain.schemas.status import Config, Frame
from coxswain.schemas.subjects import Subjects

Level = Literal["ok", "warn", "fail", "skip"]
MAX_SKEW_S: Final = 1.0
"""Clocks that differ by more make deadlines and leases mean something else than intended."""
MAX_EVENT_AGE_S: Final = 30.0
"""How long an event may wait for the log; the alert has the same bound."""
FULL: Final = 0.9
"""Of the event log's disk: beyond it the oldest events go soon."""
SHOWN_ROWS: Final = 5
"""Of each table, rows that cannot be read."""

ABILITIES: Final = ("look", "ask", "read tables", "read events", "lead", "command", "write tables", "set up")
ROLES: Final[dict[str, frozenset[str]]] = {
    "viewer": frozenset({"look", "ask", "read tables", "read events"}),
    "operator": frozenset({"look", "ask", "read tables", "read events", "command", "write tables"}),
    "controller": frozenset({"look", "read tables", "lead"}),
    "edge": frozenset({"look"}),
    "admin": frozenset({"set up"}),
    "worker": frozenset(),
}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one check."""

    check: str
    level: Level
    found: str
    mend: str = ""
    """What to do; empty where nothing is wrong."""


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """A stream as it is."""

    subjects: tuple[str, ...] = ()
    max_age_s: float = 0.0
    max_bytes: int = -1
    bytes: int = 0
    messages: int = 0
    history: int = -1
    keeps_old: bool = False
    """What is new is refused once it is full, instead of the oldest removed."""


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as it answered."""

    frame: Frame
    config: Config | None = None
    skew_s: float = 0.0
    """How far its clock is ahead of ours."""
    unsure_s: float = 0.0
    """Half the time that the answer took: the skew is known no better."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All that was found out."""

    fleet: str
    version: str
    """Ours."""
    server: str = ""
    """Version of nats-server."""
    encrypted: bool = False
    local: bool = False
    """NATS is on this machine."""
    seed_mode: int | None = None
    may: frozenset[str] = frozenset()
    """What NATS lets this user do, of `ABILITIES`."""
    streams: Mapping[str, Stored | None] = {}
    """By name: the event log first; None is missing; absent: we may not look."""
    refused: Mapping[str, Mapping[str, str]] = {}
    """By bucket, rows that mean nothing to anybody, and why."""
    jetstream: bool | None = None
    """None: nobody may say."""
    workers: tuple[Look, ...] = ()
    unreadable: tuple[str, ...] = ()
    """Why answers of workers were passed over."""
    holder: dict[str, Any] | None = None
    """The lease, if anybody holds it."""


def judge(facts: Facts) -> list[Finding]:
    """Every finding, in the order in which things are to be mended."""
    return [*_connection(facts), *_role(facts), *_storage(facts), *_workers(facts), *_leader(facts)]


def _connection(facts: Facts) -> Iterable[Finding]:
    how = "TLS" if facts.encrypted else "not encrypted"
    yield Finding(
        check="connection",
        level="ok" if facts.encrypted or facts.local else "warn",
        found=f"nats-server {facts.server}, {how}",
        mend=""
        if facts.encrypted or facts.local
        else "give NATS a certificate, and set COX_NATS_CA (docs/security.md)",
    )
    if facts.seed_mode is not None and facts.seed_mode & 0o077:
        yield Finding(
            check="key",
            level="warn",
            found=f"the file of COX_NATS_NKEY has mode {facts.seed_mode:04o}: others may read it",
            mend="chmod 600 it",
        )


def _role(facts: Facts) -> Iterable[Finding]:
    may = ", ".join(each for each in ABILITIES if each in facts.may) or "nothing that the doctor tries"
    if facts.may >= {"command", "lead", "set up"}:
        yield Finding(
            check="role",
            level="ok" if facts.local else "warn",
            found="NATS asks nobody who they are: whoever reaches it steers the fleet",
            mend="" if facts.local else "make users: `cox init --auth` (docs/security.md)",
        )
        return
    role = next((role for role, abilities in ROLES.items() if abilities == facts.may), None)
    yield Finding(
        check="role",
        level="ok" if role else "warn",
        found=f"{role or 'no role of ours'}: may {may}",
        mend=""
        if role
        else "its permissions are not those of a role: write auth.conf anew with `cox init --auth`",
    )


def _storage(facts: Facts) -> Iterable[Finding]:
    if facts.jetstream is False:
        yield Finding(
            check="jetstream",
            level="fail",
            found="JetStream is off",
            mend="start nats-server with `-js`, or with deploy/nats-server.conf, then run `cox init`",
        )
        return
    names = streams(Subjects(facts.fleet))
    if not facts.streams:
        yield Finding(
            check="jetstream", level="skip", found="this role may not look at the stream and buckets"
        )
        return
    for name in names:
        if name not in facts.streams:
            yield Finding(check=name, level="skip", found="this role may not look at it")
        elif (stored := facts.streams[name]) is None:
            yield Finding(check=name, level="fail", found="it is missing", mend="run `cox init`")
        elif name == names[0]:
            yield from _event_log(facts, name, stored)
        else:
            yield _bucket(name, stored)
            yield from _rows(name, facts.refused.get(name, {}))


def _event_log(facts: Facts, name: str, stored: Stored) -> Iterable[Finding]:
    wanted = f"cox.v1.{facts.fleet}.event.>"
    size = f"{stored.messages} events, {stored.bytes / 2**20:.1f} MiB"
    if wanted not in stored.subjects:
        held = ", ".join(stored.subjects) or "nothing"
        yield Finding(
            check=name,
            level="fail",
            found=f"it stores {held}, not {wanted}",
            mend="remove it and run `cox init`",
        )
    elif stored.max_age_s <= 0 and stored.max_bytes <= 0:
        yield Finding(
            check=name, level="fail", found=f"no limit: it grows until the disk is full ({size})",
            mend=f"`cox init --max-age {(NEW_LOG.max_age_s or 0) / 86_400:g}d --max-bytes {NEW_LOG.max_bytes}`",
        )  # fmt: skip
    elif stored.keeps_old:
        yield Finding(
            check=name, level="warn", found=f"it refuses new events once it is full, and keeps the oldest ({size})",
            mend=f"`cox init --max-bytes {max(stored.max_bytes, 0) or NEW_LOG.max_bytes}`: then the oldest give way",
        )  # fmt: skip
    elif stored.max_bytes > 0 and stored.bytes > FULL * stored.max_bytes:
        yield Finding(
            check=name, level="warn",
            found=f"{size} of {stored.max_bytes / 2**20:.0f} MiB: the oldest events go before their age",
            mend=f"`cox init --max-bytes {2 * stored.max_bytes}`, or a shorter --max-age",
        )  # fmt: skip
    else:
        yield Finding(check=name, level="ok", found=size)


def _rows(bucket: str, refused: Mapping[str, str]) -> Iterable[Finding]:
    """Rows that are in the bucket and not in force: whoever put them there did it without `cox`."""
    verb = bucket.rpartition("_")[2]
    for row, why in sorted(refused.items())[:SHOWN_ROWS]:
        yield Finding(
            check=bucket, level="warn", found=f"the row of {row[:64]} is not in force: {why[:200]}",
            mend=f"write it anew (`cox {verb} set`), or remove it (`cox {verb} rm`; `nats kv del` what is no name)",
        )  # fmt: skip
    if (more := len(refused) - SHOWN_ROWS) > 0:
        yield Finding(
            check=bucket, level="warn", found=f"and {more} more", mend=f"`cox {verb} list` names them all"
        )


def _bucket(name: str, stored: Stored) -> Finding:
    lease = name.endswith("_lease")
    wrong = []
    if stored.max_age_s != (LEASE_TTL_S if lease else 0):
        wrong.append(
            f"its rows end after {stored.max_age_s:g} s, not {f'{LEASE_TTL_S:g}' if lease else 'never'}"
        )
    if not lease and stored.history != HISTORY:
        wrong.append(f"it keeps {stored.history} revisions, not {HISTORY}")
    if wrong:
        again = (
            ""
            if lease
            else " and put its rows again (`cox tenants --json` and `cox classes --json` show them)"
        )
        return Finding(
            check=name, level="fail", found="; ".join(wrong), mend=f"remove the bucket, run `cox init`{again}"
        )
    revisions = f"{stored.messages} revision{'' if stored.messages == 1 else 's'}"
    return Finding(check=name, level="ok", found="as it must be" if lease else revisions)


def _workers(facts: Facts) -> Iterable[Finding]:
    if "ask" not in facts.may:
        yield Finding(check="workers", level="skip", found="this role may not ask workers")
        return
    if not facts.workers:
        yield Finding(
            check="workers", level="fail", found="no worker answers",
            mend="start one (`cox worker MODEL`); if it runs: its COX_NATS_URL, COX_FLEET, and `nats.` in its log",
        )  # fmt: skip
        return
    for why in sorted(set(facts.unreadable)):
        yield Finding(
            check="workers", level="fail", found=f"an answer cannot be read: {why[:200]}",
            mend="a worker that `cox ps` does not list: stop it, and revoke its key if it is none of yours",
        )  # fmt: skip
    for seen in facts.workers:
        troubles = list(_worker(facts, seen))
        yield from troubles
        if not troubles:
            frame = seen.frame
            yield Finding(
                check=f"worker {frame.worker}", level="ok",
                found=f"{frame.model}, vLLM {frame.vllm_version}, {frame.state}, clock {seen.skew_s * 1000:+.0f} ms",
            )  # fmt: skip
    versions = {seen.frame.vllm_version for seen in facts.workers}
    if len(versions) > 1:
        yield Finding(
            check="workers", level="warn", found=f"vLLM versions differ: {', '.join(sorted(versions))}",
            mend="run one version everywhere",
        )  # fmt: skip
    if len({seen.frame.config for seen in facts.workers}) > 1:
        yield Finding(
            check="workers", level="warn", found="workers have different tables in force",
            mend="see whether a controller leads, and whether all have one version; `cox ps`, `cox classes`",
        )  # fmt: skip


def _worker(facts: Facts, seen: Look) -> Iterable[Finding]:
    frame = seen.frame
    check = f"worker {frame.worker}"
    if abs(seen.skew_s) - seen.unsure_s > MAX_SKEW_S:
        yield Finding(
            check=check, level="fail", found=f"its clock is {seen.skew_s:+.1f} s off ours",
            mend="set both clocks by NTP: deadlines are judged by the worker's, which is its machine's at its start",
        )  # fmt: skip
    if frame.events_dropped_total:
        yield Finding(
            check=check, level="warn", found=f"{frame.events_dropped_total} events lost since it started",
            mend="its log says why (`events.`): no stream, a full one, or NATS away for long",
        )  # fmt: skip
    if frame.events_waiting_s > MAX_EVENT_AGE_S:
        yield Finding(
            check=check, level="warn",
            found=f"{frame.events_waiting} events wait for the log, the oldest for {frame.events_waiting_s:.0f} s",
            mend="its log says why (`events.full`): make room on NATS's disk, or `cox init --max-bytes` for the stream",
        )  # fmt: skip
    if seen.config is None:
        yield Finding(
            check=check, level="warn", found="it does not report its configuration", mend="update the worker"
        )
        return
    given = seen.config.scheduler
    slots, active = given.get("max_num_seqs"), given.get("max_num_active_seqs")
    if isinstance(slots, int) and not (isinstance(active, int) and active < slots):
        yield Finding(
            check=check, level="warn", found=f"no spare slots: a held request keeps one of {slots} from others",
            mend="--max-num-active-seqs below --max-num-seqs, as `cox worker` does by itself (an eighth, at least 8)",
        )  # fmt: skip
    if given.get("signed_ids") is False:
        yield Finding(
            check=check, level="warn", found="all requests are tenant default's: no signing key (COX_IDENTITY_KEY)",
            mend="load the plugin (VLLM_PLUGINS), and --middleware coxswain.service.identity.Identity",
        )  # fmt: skip
    if given.get("enable_prefix_caching") is False:
        yield Finding(
            check=check, level="warn", found="no prefix cache: a dropped request is computed again from its start",
            mend="--enable-prefix-caching",
        )  # fmt: skip
    if given.get("shutdown_timeout_s") == 0 and given.get("api_servers") == 1:
        yield Finding(
            check=check, level="warn", found="on SIGTERM it aborts every request that it has",
            mend="--shutdown-timeout 60, as `cox worker` does by itself; or `cox drain` it first",
        )  # fmt: skip
    version = given.get("coxswain")
    if version is not None and version != facts.version:
        yield Finding(
            check=check, level="warn", found=f"it runs Coxswain {version}, this is {facts.version}",
            mend="bring workers, controllers and cox to one version",
        )  # fmt: skip


def _leader(facts: Facts) -> Iterable[Finding]:
    if facts.holder is not None:
        holder = facts.holder
        version = holder.get("version") or "unknown"
        differs = version != facts.version
        yield Finding(
            check="leader",
            level="warn" if differs else "ok",
            found=f"{holder.get('controller')} with {holder.get('policy')}, Coxswain {version}",
            mend=f"this is {facts.version}: bring workers, controllers and cox to one version"
            if differs
            else "",
        )
    elif "read tables" in facts.may and facts.jetstream:
        yield Finding(
            check="leader", level="warn",
            found="no controller leads: shares are fair on each worker, not between them, and tables are not applied",
            mend="start `cox controller`; if it runs, its log says what it waits for",
        )  # fmt: skip
    epochs = {seen.frame.leader.epoch for seen in facts.workers if seen.frame.leader.epoch is not None}
    if len(epochs) > 1:
        last = max(epochs)
        theirs = sorted(seen.frame.worker for seen in facts.workers if seen.frame.leader.epoch == last)
        yield Finding(
            check="leader", level="fail",
            found=f"workers obey different leaders; the latest, {list(last)}: {', '.join(theirs[:SHOWN_ROWS])}",
            mend="wait 5 s and look again; if it stays, see docs/runbook.md#coxswaincommandsrefused",
        )  # fmt: skip
    if facts.holder is None:
        return
    for seen in facts.workers:
        age_s = seen.frame.leader.age_s
        if age_s is None or age_s > LEADER_LEASE_S:
            heard = "never" if age_s is None else f"{age_s:.0f} s ago"
            yield Finding(
                check=f"worker {seen.frame.worker}", level="fail", found=f"it heard the leader {heard}",
                mend="is the worker's key its own, and is its clock right? See `lead.` and `nats.denied` in its log",
            )  # fmt: skip
