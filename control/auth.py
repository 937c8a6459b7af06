"""Users for NATS: an nkey each, and the server's configuration that says what each may do.

A folder holds `users.json` (who there is, public keys only), `auth.conf` (made of it, for `include` in
nats-server's configuration) and `keys/` (one seed per user, readable by its owner only). Seeds go out to
where they are used and may be taken away from here: they are never read again, nor shown or logged.
Called by `cox init --auth`.
"""

import json
import secrets
from pathlib import Path
from typing import Final

import msgspec
import nkeys  # type: ignore[import-untyped]

from coxswain.common.files import save
from coxswain.control.errors import ControlError
from coxswain.schemas.errors import UNREADABLE
from coxswain.schemas.names import MAX_TOKEN_CHARS, check_token
from coxswain.schemas.permissions import INBOX, ROLES, WORKER, crossing, rights
from coxswain.schemas.subjects import Subjects

USERS: Final = "users.json"
CONFIG: Final = "auth.conf"
SEEDS: Final = "keys"
MAX_RANKS: Final = 1_024


class AuthError(ControlError):
    """The folder of users cannot be used; the text says why. It never shows a seed."""


class User(msgspec.Struct, frozen=True, kw_only=True):
    """One user: a role, a name, and for workers how many data-parallel ranks share it."""

    role: str
    name: str = ""
    ranks: int = 1
    nkey: str = ""
    """The public key."""

    @property
    def label(self) -> str:
        """How people call it, and the name of its seed's file: `worker-w1`, `viewer`."""
        return f"{self.role}-{self.name}" if self.name else self.role

    @property
    def workers(self) -> tuple[str, ...]:
        """The names that a worker with this key may use."""
        if self.role != WORKER:
            return ()
        # Ranks of a dense model are engines of their own, of which the first has the plain name.
        ranks = range(self.ranks) if self.ranks > 1 else ()
        return (self.name, *(f"{self.name}-dp{rank}" for rank in ranks))


class Users(msgspec.Struct, frozen=True, kw_only=True):
    """All users of one fleet."""

    fleet: str
    users: tuple[User, ...] = ()


class Changed(msgspec.Struct, frozen=True, kw_only=True):
    """What `write` did."""

    config: str
    made: dict[str, str]
    """Path of the seed, by the user's label."""
    kept: tuple[str, ...]
    revoked: tuple[str, ...]


def user(text: str) -> User:
    """`ROLE` or `ROLE:NAME` or, for workers, `worker:NAME:RANKS` as a user without a key.

    Raises:
        ValueError: if it names no role, or a worker without its name.
    """
    role, *rest = text.split(":")
    if role not in ROLES:
        raise ValueError(f"no role {role!r}: one of {', '.join(ROLES)}")
    if len(rest) > (2 if role == WORKER else 1):
        raise ValueError(f"{text!r}: write ROLE, ROLE:NAME, or worker:NAME:RANKS")
    name = check_token(role, rest[0]) if rest else ""
    if role == WORKER and not name:
        raise ValueError("each worker has a user of its own: write worker:NAME")
    ranks = rest[1] if len(rest) > 1 else "1"
    if not ranks.isascii() or not ranks.isdigit() or not 1 <= int(ranks) <= MAX_RANKS:
        raise ValueError(f"{text!r}: {ranks!r} is not a number of data-parallel ranks (1 to {MAX_RANKS})")
    found = User(role=role, name=name, ranks=int(ranks))
    if any(len(each) > MAX_TOKEN_CHARS for each in found.workers):
        raise ValueError(f"worker name {name!r} is too long for its ranks' suffix")
    return found


def write(folder: Path, fleet: str, wanted: list[User], revoked: list[str]) -> Changed:
    """Make keys for users that have none, drop the revoked ones, and write the configuration anew.

    Args:
        folder: made if missing; one per fleet.
        fleet: whose.
        wanted: users to have; those that are there keep their keys, but take on a changed number of ranks.
        revoked: labels of users to drop; a user both dropped and wanted gets a new key.

    Raises:
        AuthError: the folder cannot be used, belongs to another fleet, or has no such user to revoke.
    """
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        (folder / SEEDS).mkdir(mode=0o700, exist_ok=True)
        known = {each.label: each for each in _load(folder, fleet).users}
        if missing := [label for label in revoked if label not in known]:
            raise AuthError(
                f"{folder / USERS} has no user {missing[0]!r}: {', '.join(known) or 'it is empty'}"
            )
        for label in revoked:
            del known[label]
            _seed_path(folder, label).unlink(missing_ok=True)
        made: dict[str, str] = {}
        kept = tuple(known)
        for each in wanted:
            if each.label in known:
                known[each.label] = msgspec.structs.replace(known[each.label], ranks=each.ranks)
                continue
            public, seed = _new_key()
            path = _seed_path(folder, each.label)
            save(path, seed + b"\n")
            made[each.label] = str(path)
            known[each.label] = msgspec.structs.replace(each, nkey=public)
        users = Users(fleet=fleet, users=tuple(known.values()))
        save(folder / CONFIG, config(users).encode(), 0o644)
        save(folder / USERS, msgspec.json.format(msgspec.json.encode(users), indent=1) + b"\n", 0o644)
    except OSError as error:
        raise AuthError(f"{error.filename or folder} cannot be written: {error.strerror}") from error
    return Changed(config=str(folder / CONFIG), made=made, kept=kept, revoked=tuple(revoked))


def config(users: Users) -> str:
    """The `accounts` block of nats-server's configuration."""
    subjects = Subjects(users.fleet)
    account, store = f"COX_{users.fleet}", f"COX_{users.fleet}_STORE"
    services = crossing(subjects)
    exports = [f"{{service: {_quoted(subject)}}}" for subject in services]
    imports = [f"{{service: {{account: {store}, subject: {_quoted(subject)}}}}}" for subject in services]
    # Consumers deliver from there: into inboxes, and nowhere else.
    exports.append(f"{{stream: {_quoted(f'{INBOX}.>')}}}")
    imports.append(f"{{stream: {{account: {store}, subject: {_quoted(f'{INBOX}.>')}}}}}")
    lines = [
        f"# Users of fleet {users.fleet!r} and what each may do. Made by `cox init --auth`: change it with that.",
        '# Public keys only. In nats-server\'s configuration: include "auth.conf"',
        "accounts {",
        "  # What is stored. Nobody connects to it.",
        f"  {store} {{",
        "    jetstream: enabled",
        *_block("exports", exports),
        "  }",
        f"  {account} {{",
        *_block("imports", imports),
        *_block("users", [_entry(subjects, each) for each in users.users]),
        "  }",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _entry(subjects: Subjects, each: User) -> str:
    given = rights(subjects, each.role, each.workers)
    heard = (*given.subscribe, f"{INBOX}.{each.nkey}.>")
    # An empty list of what is allowed would allow everything.
    said = f"allow: [{', '.join(map(_quoted, given.publish))}]" if given.publish else 'deny: ">"'
    lines = [
        f"{{ # {each.label}",
        f"        nkey: {each.nkey}",
        "        permissions: {",
        f"          publish: {{{said}}}",
        f"          subscribe: {{allow: [{', '.join(map(_quoted, heard))}]}}",
        "        }",
        "      }",
    ]
    return "\n".join(lines)


def _block(name: str, entries: list[str]) -> list[str]:
    return [f"    {name}: [", *(f"      {entry}" for entry in entries), "    ]"]


def _quoted(text: str) -> str:
    return json.dumps(text)


def _load(folder: Path, fleet: str) -> Users:
    path = folder / USERS
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Users)
    except FileNotFoundError:
        return Users(fleet=fleet)
    except UNREADABLE as error:
        raise AuthError(f"{path} is not a list of users: {error}") from error
    if found.fleet != fleet:
        raise AuthError(
            f"{folder} has the users of fleet {found.fleet!r}, not of {fleet!r}: use another folder"
        )
    return found


def _new_key() -> tuple[str, bytes]:
    """A new user's public key, and its seed."""
    seed = nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_USER)
    return nkeys.from_seed(seed).public_key.decode(), seed


def _seed_path(folder: Path, label: str) -> Path:
    return folder / SEEDS / f"{label}.nk"
