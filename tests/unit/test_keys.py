"""API keys: made, looked up, reloaded and revoked, and never shown again."""

import errno
import io
import multiprocessing
import os
import stat
from pathlib import Path

import msgspec
import pytest

from coxswain.common.logs import get_logger
from coxswain.service import keys
from coxswain.service.keys import Grant, Keyring, KeysRefusedError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the keys file will be."""
    return tmp_path / "keys.json"


def rewrite(file: Path, text: str) -> None:
    """Replace the file's text, with a time of change that differs for sure."""
    before = file.stat().st_mtime_ns
    file.write_text(text)
    os.utime(file, ns=(before + 10**9, before + 10**9))


def test_added_key_is_found(file: Path) -> None:
    """A key gives back the grant it was made with; a key that is off by a letter gives nothing."""
    grant = Grant(tenant="acme", class_="interactive", classes=("batch",), priority_min=-5, priority_max=5)
    key = keys.add(file, grant, now=1.0)
    found = Keyring(file).find(key)
    assert found is not None
    assert msgspec.structs.asdict(grant).items() <= msgspec.structs.asdict(found).items()
    assert Keyring(file).find(key[:-1]) is None
    assert Keyring(file).find("") is None


def test_file_holds_no_key_and_is_private(file: Path) -> None:
    """The file has mode 0600 and only the hash."""
    key = keys.add(file, Grant(tenant="acme"), now=1.0)
    assert file.stat().st_mode & 0o777 == 0o600
    text = file.read_text()
    assert key not in text
    assert key.removeprefix(keys.PREFIX).partition("-")[2] not in text  # a secret may have dashes
    assert keys.digest(key) in text
    assert [path.name for path in file.parent.iterdir()] == ["keys.json"]


def test_reload_follows_the_file_once_a_second(file: Path) -> None:
    """A new key counts at the first look after a second, not before."""
    keys.add(file, Grant(tenant="acme"), now=1.0)
    ring = Keyring(file)
    ring.refresh(100.0)
    later = keys.add(file, Grant(tenant="later"), now=2.0)
    ring.refresh(100.5)
    assert ring.find(later) is None
    ring.refresh(101.1)
    found = ring.find(later)
    assert found is not None
    assert found.tenant == "later"


@pytest.mark.parametrize("text", ["", "{", '{"keys": [{"id": "a"}]}', '{"kyes": []}', "\ud83d"])
def test_broken_file_keeps_the_last_good_one(file: Path, text: str) -> None:
    """A file that breaks while the worker runs is reported, and the old keys stay in force."""
    key = keys.add(file, Grant(tenant="acme"), now=1.0)
    log = io.StringIO()
    ring = Keyring(file, get_logger(log))
    rewrite(file, text.encode("utf-8", "surrogatepass").decode("latin-1"))
    ring.refresh(100.0)
    assert ring.find(key) is not None
    assert "keys.refused" in log.getvalue()
    rewrite(file, '{"keys": []}')
    ring.refresh(102.0)
    assert ring.find(key) is None


def test_deleted_file_keeps_the_keys(file: Path) -> None:
    """A file that is gone for a moment (an editor, a mount) locks nobody out."""
    key = keys.add(file, Grant(tenant="acme"), now=1.0)
    ring = Keyring(file, get_logger(io.StringIO()))
    file.unlink()
    ring.refresh(100.0)
    assert ring.find(key) is not None


def test_logs_show_neither_keys_nor_hashes(file: Path) -> None:
    """Whatever is wrong with a file, what is logged and raised has no key and no hash of it."""
    key = keys.add(file, Grant(tenant="acme"), now=1.0)
    log = io.StringIO()
    ring = Keyring(file, get_logger(log))
    good = file.read_text()
    broken = [
        good.replace('"priority_max": 2147483647', '"priority_max": -2147483648').replace(
            '"priority_min": -2147483648', '"priority_min": 7'
        ),
        good.replace('"sha256": "', '"sha256": "G'),
        good.replace('"acme"', '""'),
        good.replace('"id"', '"name"'),
        good[: len(good) // 2],
        good.replace("]", "," + good[good.index("[") + 1 : good.index("]")] + "]"),
    ]
    for number, text in enumerate(broken):
        assert text != good
        rewrite(file, text)
        ring.refresh(100.0 + 2 * number)
    rewrite(file, good)
    ring.refresh(200.0)
    written = log.getvalue()
    assert written.count("keys.refused") == len(broken)
    assert written.count("keys.loaded") == 1
    assert key not in written
    assert keys.digest(key) not in written


def test_file_stays_readable_to_those_it_was_readable_to(file: Path) -> None:
    """Workers run as another user than whoever adds and revokes keys: a revoked key must not live on for that."""
    key = keys.add(file, Grant(tenant="acme"), now=1.0)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(file, -1, 12_345)
    before = file.stat()
    keys.add(file, Grant(tenant="other-one"), now=2.0)
    keys.revoke(file, key.removeprefix(keys.PREFIX).partition("-")[0])
    after = file.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_whoever_may_not_keep_the_owner_is_told_who_may(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file stays as it is, nothing is left beside it, and the refusal says as whom to run it."""
    keys.add(file, Grant(tenant="acme"), now=1.0)
    before = file.read_bytes()

    def refuse(*_: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fchown", refuse)
    assert keys.main(["add", "--tenant", "globex", str(file)]) == 2
    said = capsys.readouterr()
    assert f"run this as its owner (uid {file.stat().st_uid}) or root" in said.err
    assert said.out == ""
    assert (file.read_bytes(), list(file.parent.iterdir())) == (before, [file])


def test_file_that_others_may_write_is_refused(file: Path) -> None:
    """Whoever may write to the file may make keys: such a file is refused with the remedy."""
    keys.add(file, Grant(tenant="acme"), now=1.0)
    file.chmod(0o666)
    with pytest.raises(KeysRefusedError, match="chmod 600"):
        Keyring(file)


def test_missing_file_is_refused_at_the_start(file: Path) -> None:
    """A worker does not start with a keys file that is not there."""
    with pytest.raises(KeysRefusedError, match="cannot be read"):
        Keyring(file)


@pytest.mark.parametrize(
    "grant",
    [
        Grant(tenant=""),
        Grant(tenant="x" * 129),
        Grant(tenant="other"),
        Grant(tenant="a", class_="No Class"),
        Grant(tenant="a", classes=("all",)),
        Grant(tenant="a", priority_min=2, priority_max=1),
    ],
)
def test_impossible_grant_is_refused_and_nothing_written(file: Path, grant: Grant) -> None:
    """A grant that the wire contract does not allow makes no key."""
    with pytest.raises(KeysRefusedError):
        keys.add(file, grant, now=1.0)
    assert not file.exists()


def _add(file: Path) -> None:
    keys.add(file, Grant(tenant="acme"), now=1.0)


def test_concurrent_adds_lose_nothing(file: Path) -> None:
    """Two processes that add keys at once both get theirs in."""
    context = multiprocessing.get_context("fork")
    adders = [context.Process(target=_add, args=(file,)) for _ in range(6)]
    for adder in adders:
        adder.start()
    for adder in adders:
        adder.join()
    assert len(keys.load(file)) == 6


def test_command_line_adds_lists_and_revokes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`add` prints the key once, `list` shows its id but no secret, `revoke` ends it."""
    assert keys.main(["add", "--tenant", "acme", "--classes", "", "--priority-max", "9", str(file)]) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("cox-sk-")
    assert Keyring(file).find(key) is not None
    name = key.removeprefix("cox-sk-").split("-", 1)[0]
    assert keys.main(["list", str(file)]) == 0
    shown = capsys.readouterr().out
    assert name in shown
    assert "acme" in shown
    assert key not in shown
    assert keys.digest(key) not in shown
    assert keys.main(["revoke", str(file), name]) == 0
    assert Keyring(file).find(key) is None
    assert keys.main(["revoke", str(file), name]) == 2
    assert "no key" in capsys.readouterr().err


def test_listing_says_who_sees_metrics(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key made with `--metrics` sees tenants on /metrics and administers nothing; an administrator's does both."""
    for more in ([], ["--metrics"], ["--admin"]):
        assert keys.main(["add", "--tenant", "acme", *more, str(file)]) == 0
    capsys.readouterr()
    keys.main(["list", str(file)])
    shown = [line.split()[-2:] for line in capsys.readouterr().out.splitlines()]
    assert shown == [["ADMIN", "METRICS"], ["-", "-"], ["-", "yes"], ["yes", "yes"]]


def test_command_line_refuses_a_priority_beyond_int32(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the file could not hold is refused before a key is made."""
    assert keys.main(["add", "--tenant", "acme", "--priority-max", str(2**31), str(file)]) == 2
    assert "error:" in capsys.readouterr().err
    assert not file.exists()


def test_listing_keeps_a_tenant_on_its_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tenant's name, which may be any text, neither breaks the table nor steers the terminal."""
    keys.main(["add", "--tenant", "ev\nil\x1b[31m", str(file)])
    capsys.readouterr()
    keys.main(["list", str(file)])
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 2
    assert "\x1b" not in shown
