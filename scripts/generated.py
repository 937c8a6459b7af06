"""Files that are written from code are what the code says: `make drift` compares them, `make generate` renews them.

Each module of `WRITERS` knows its files and what they should say; this one shows the difference or ends it. The
JSON Schema is not among them: `cox schema` writes that for everybody.
"""

import argparse
import difflib
import sys
from pathlib import Path
from typing import Final

from scripts import dashboards, event_pages, permissions, protocol_examples, states

ROOT: Final = Path(__file__).resolve().parent.parent
WRITERS: Final = (dashboards, event_pages, permissions, protocol_examples, states)


def texts() -> dict[Path, str]:
    """What each generated file should say; nothing: there should be no such file."""
    return {path: text for writer in WRITERS for path, text in writer.texts().items()}


def drift() -> str:
    """How the files differ from what they should say, as a diff; empty if they do not."""
    found = ""
    for path, wanted in texts().items():
        there = path.read_text() if path.exists() else ""
        lines = there.splitlines(keepends=True), wanted.splitlines(keepends=True)
        found += "".join(difflib.unified_diff(*lines, str(path.relative_to(ROOT)), "its source"))
    return found


def renew() -> None:
    """Write the files as they should be, and remove those that should not be."""
    for path, wanted in texts().items():
        if wanted:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted)
        else:
            path.unlink()


def main() -> int:
    """Compare, or renew."""
    parser = argparse.ArgumentParser(description="keep generated files equal to their source")
    parser.add_argument(
        "--write", action="store_true", help="renew them; else what differs is shown, exit code 1"
    )
    if parser.parse_args().write:
        renew()
        return 0
    found = drift()
    if found:
        print(found)
        print("run `make generate` and commit what it writes", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
