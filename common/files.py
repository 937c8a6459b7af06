"""Files with secrets in them. Called by `service/keys.py` and `control/auth.py`."""

import os
import secrets
import stat
from pathlib import Path


def save(path: Path, content: bytes, mode: int = 0o600, like: os.stat_result | None = None) -> None:
    """Replace a file atomically, with this mode from the first byte on; in the end with owner and mode of `like`."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    file = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(file, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
            if like is not None:
                os.fchown(out.fileno(), like.st_uid, like.st_gid)
                os.fchmod(out.fileno(), stat.S_IMODE(like.st_mode))
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
