"""API keys: who may call this worker, as whom, and how far. A local JSON file of hashes; never on the bus.

    python -m coxswain.service.keys add --tenant acme [--class interactive] [--classes a,b] keys.json
    python -m coxswain.service.keys list keys.json
    python -m coxswain.service.keys revoke keys.json ID

A key is 256 random bits, so its plain SHA-256 is enough to keep: there is nothing to guess (a password
would need a slow hash). `add` shows the key once. Neither keys nor hashes are ever logged. Used by
`edge/core.py`, which calls `Keyring.refresh` now and then; the file may be edited, replaced or mounted while the
worker runs.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from coxswain.common.files import save
from coxswain.common.logs import get_logger
from coxswain.schemas.errors import UNREADABLE
from coxswain.schemas.names import DEFAULT, NameRefusedError, check_client, check_token
from coxswain.schemas.policy import INT32_MAX, INT32_MIN, Int32

PREFIX: Final = "cox-sk-"
MAX_BYTES: Final = 64 * 1024 * 1024
"""Largest keys file that is read: some 200,000 keys."""
CHECK_EVERY_S: Final = 1.0
"""How often, at most, the file's time of change is looked at."""


class KeysRefusedError(ValueError):
    """A keys file or a row of it is not allowed; the text says what and what to do. It never shows a hash."""


class Grant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What somebody may do."""

    tenant: str = DEFAULT
    class_: str = msgspec.field(default="", name="class")
    """The class of requests that ask for none; empty: the one that the tenant table says."""
    classes: tuple[str, ...] | None = None
    """Classes that may be asked for beside it; null: the tenant table alone decides."""
    priority_min: Int32 = INT32_MIN
    priority_max: Int32 = INT32_MAX
    """A request's priority is clamped to this range."""
    admin: bool = False
    """Whether vLLM's administrative endpoints (`/pause`, `/sleep`, …) are open, and what `metrics` opens."""
    metrics: bool = False
    """Whether `/metrics` names tenants to it."""


class Key(Grant, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A row of the keys file: a grant, and the hash of the key that has it."""

    id: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]{1,32}$")]
    """Names the key in listings; the key itself starts with it."""
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
    created_at: float = 0.0
    """Unix seconds."""


class KeysFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file."""

    keys: tuple[Key, ...] = ()


_decode = msgspec.json.Decoder(KeysFile).decode


def digest(key: str) -> str:
    """SHA-256 of a key, in hexadecimal: how keys are kept and looked up."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def load(path: Path) -> dict[str, Key]:
    """Read a keys file: hash to row.

    Raises:
        KeysRefusedError: if it cannot be read, others may write to it, or a row is not allowed.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise KeysRefusedError(f"keys file {path} may be written by others: chmod 600 {path}")
            if found.st_size > MAX_BYTES:
                raise KeysRefusedError(
                    f"keys file {path} has {found.st_size} bytes, at most {MAX_BYTES} are read"
                )
            rows = _decode(file.read()).keys
    except OSError as error:
        raise KeysRefusedError(f"keys file {path} cannot be read: {error.strerror}") from error
    except UNREADABLE as error:
        raise KeysRefusedError(f"keys file {path}: {error}") from error
    for row in rows:
        _check(path, row)
    table = {row.sha256: row for row in rows}
    if len(table) != len(rows) or len({row.id for row in rows}) != len(rows):
        raise KeysRefusedError(f"keys file {path}: a key or an id appears twice")
    return table


def _check(path: Path, row: Key) -> None:
    try:
        check_client(row.tenant)
        for name in (*((row.class_,) if row.class_ else ()), *(row.classes or ())):
            check_token("class", name)
    except NameRefusedError as error:
        raise KeysRefusedError(f"keys file {path}, key {row.id}: {error}") from error
    if row.priority_min > row.priority_max:
        raise KeysRefusedError(f"keys file {path}, key {row.id}: priority_min is above priority_max")


class Keyring:
    """The keys in force. A file that breaks while the worker runs leaves the last good one in force.

    Args:
        path: the keys file.
        log: where changes and faults are reported.

    Raises:
        KeysRefusedError: if the file is not good at the start.
    """

    def __init__(self, path: Path, log: Any = None) -> None:
        self._path = path
        self._log = get_logger() if log is None else log
        self._checked_at = float("-inf")
        # Before reading: a change in between is seen at the next look.
        self._seen = _fingerprint(path)
        self._table = load(path)

    def __len__(self) -> int:
        return len(self._table)

    def find(self, key: str) -> Key | None:
        """The row of a key, or None."""
        # A dictionary on SHA-256 gives away nothing useful by its timing: nobody can aim at a hash.
        return self._table.get(digest(key))

    def refresh(self, now: float) -> None:
        """Read the file again if it changed; looks at most once a second.

        Args:
            now: monotonic seconds.
        """
        if now - self._checked_at < CHECK_EVERY_S:
            return
        self._checked_at = now
        seen = _fingerprint(self._path)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._table = load(self._path)
        except KeysRefusedError as error:
            self._log.error("keys.refused", error=str(error), in_force=len(self._table))
        else:
            self._log.info("keys.loaded", path=str(self._path), in_force=len(self._table))


def _fingerprint(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep two `add`s apart: hold a lock on the file's folder."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _save(path: Path, rows: tuple[Key, ...]) -> None:
    """Replace the file; workers that could read it still can.

    Raises:
        KeysRefusedError: if it would not keep its owner.
    """
    content = msgspec.json.format(msgspec.json.encode(KeysFile(keys=rows)), indent=1) + b"\n"
    like = path.stat() if path.exists() else None
    try:
        save(path, content, like=like)
    except PermissionError as error:
        if like is None:
            raise
        raise KeysRefusedError(
            f"keys file {path} would not keep its owner and group: run this as its owner (uid {like.st_uid}) or root"
        ) from error


def add(path: Path, grant: Grant, *, now: float) -> str:
    """Make a key, keep its hash in the file (made if missing), and return the key, this once.

    Args:
        path: the keys file.
        grant: what the key may do.
        now: Unix seconds, for `created_at`.

    Raises:
        KeysRefusedError: if the file or the grant is not allowed.
    """
    with _locked(path):
        rows = tuple(load(path).values()) if path.exists() else ()
        name = secrets.token_hex(4)
        while any(row.id == name for row in rows):
            name = secrets.token_hex(4)
        key = f"{PREFIX}{name}-{secrets.token_urlsafe(32)}"
        row = Key(**msgspec.structs.asdict(grant), id=name, sha256=digest(key), created_at=now)
        _check(path, row)
        _save(path, (*rows, row))
    return key


def revoke(path: Path, name: str) -> None:
    """Remove a key by its id; workers that use the file refuse it within a second or two.

    Raises:
        KeysRefusedError: if the file is not allowed or has no such key.
    """
    with _locked(path):
        rows = tuple(load(path).values())
        kept = tuple(row for row in rows if row.id != name)
        if len(kept) == len(rows):
            raise KeysRefusedError(f"keys file {path} has no key {name!r}: `list` shows the ids")
        _save(path, kept)


def _listing(path: Path) -> str:
    lines = [f"{'ID':<10}{'TENANT':<24}{'CLASS':<16}{'MAY ASK FOR':<24}{'PRIORITY':<26}{'ADMIN':<7}METRICS"]
    for row in load(path).values():
        asked = "tenant table" if row.classes is None else ", ".join(row.classes) or "-"
        bounds = f"{row.priority_min}..{row.priority_max}"
        admin, metrics = ("yes" if may else "-" for may in (row.admin, row.admin or row.metrics))
        lines.append(
            f"{row.id:<10}{_shown(row.tenant):<24}{row.class_ or '-':<16}{asked:<24}{bounds:<26}{admin:<7}{metrics}",
        )
    return "\n".join(lines) + "\n"


def _shown(tenant: str) -> str:
    """A tenant as a terminal may see it: one line, no control characters."""
    return tenant if tenant.isprintable() else ascii(tenant)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m coxswain.service.keys", description="Manage a worker's API keys."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    adding = verbs.add_parser("add", help="create a key and print it, once")
    adding.add_argument("--tenant", required=True, help="the tenant that the key stands for")
    adding.add_argument("--class", dest="class_", default="", help="class of requests that ask for none")
    adding.add_argument(
        "--classes",
        help="classes that it may ask for, as in a,b (empty: none; absent: those of the tenant's row)",
    )
    adding.add_argument(
        "--priority-min", type=int, default=INT32_MIN, help="priorities are clamped to at least this"
    )
    adding.add_argument("--priority-max", type=int, default=INT32_MAX, help="and to at most this")
    adding.add_argument("--admin", action="store_true", help="open vLLM's administrative endpoints too")
    adding.add_argument(
        "--metrics", action="store_true", help="let it see tenants on /metrics, for Prometheus"
    )
    listing = verbs.add_parser("list", help="show the keys, without hashes")
    revoking = verbs.add_parser("revoke", help="remove a key")
    for verb in (adding, listing, revoking):
        verb.add_argument("file", type=Path, help="the keys file (COX_KEYS)")
    revoking.add_argument("id", help="the key's id, as `list` shows it")
    return parser


def _grant(chosen: argparse.Namespace) -> Grant:
    classes = chosen.classes
    fields = {
        "tenant": chosen.tenant,
        "class": chosen.class_,
        "classes": None if classes is None else [name for name in classes.split(",") if name],
        "priority_min": chosen.priority_min,
        "priority_max": chosen.priority_max,
        "admin": chosen.admin,
        "metrics": chosen.metrics,
    }
    try:
        return msgspec.convert(fields, Grant)
    except msgspec.ValidationError as error:
        raise KeysRefusedError(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 done, 2 refused."""
    chosen = _parser().parse_args(argv)
    try:
        if chosen.verb == "add":
            sys.stdout.write(add(chosen.file, _grant(chosen), now=time.time()) + "\n")
        elif chosen.verb == "list":
            sys.stdout.write(_listing(chosen.file))
        else:
            revoke(chosen.file, chosen.id)
    except (KeysRefusedError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
