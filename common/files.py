"""Files with secrets in them. Called by `service/keys.py` and `control/auth.py`."""

import os
import secrets
from pathlib import Path


def save(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace a file at once, with this mode from the first byte on."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    file = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(file, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
