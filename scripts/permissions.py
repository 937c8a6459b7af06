"""Write the table of rights into `docs/security.md`, from `schemas/permissions.py`.

`--check` exits with 1 if the page says something else; without it the page is written (`make schema`).
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Final

from coxswain.schemas.permissions import INBOX, ROLES, rights, streams
from coxswain.schemas.subjects import Subjects

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "security.md"
BEGIN: Final = "<!-- rights, by scripts/permissions.py -->\n"
END: Final = "<!-- end -->"


def table() -> str:
    """One row per role of fleet `main`; reading a stream is one word for seven subjects."""
    subjects = Subjects("main")
    lines = ["| role | publishes | hears |", "|---|---|---|"]
    for role in ROLES:
        given = rights(subjects, role, ("w1",))
        published = _read_as_one(given.publish, streams(subjects))
        lines.append(
            f"| {role}{' `w1`' if role == 'worker' else ''} | {_cell(published)} | {_cell(given.subscribe)} |"
        )
    return "\n".join(lines) + "\n"


def _read_as_one(published: tuple[str, ...], stored: tuple[str, ...]) -> list[str]:
    found = list(published)
    for stream in stored:
        own = [each for each in found if re.search(rf"\.{stream}(\.|$)", each)]
        if f"$JS.FC.{stream}.>" in own:
            found = [each for each in found if each not in own] + [f"reads {stream}"]
    return found


def _cell(subjects: list[str] | tuple[str, ...]) -> str:
    shown = [f"reads `{each[6:]}`" if each.startswith("reads ") else f"`{each}`" for each in subjects]
    return ", ".join(shown) or "nothing"


def page(text: str) -> str:
    """The page with the table as it must be."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


def main() -> int:
    """Write the page, or compare it with the code."""
    parser = argparse.ArgumentParser(
        description=f"write the rights of roles into docs/security.md ({INBOX} aside)"
    )
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    found = PAGE.read_text()
    wanted = page(found)
    if not parser.parse_args().check:
        PAGE.write_text(wanted)
        return 0
    if found != wanted:
        print(
            "docs/security.md does not give the rights that the code does: run `make schema`", file=sys.stderr
        )
    return int(found != wanted)


if __name__ == "__main__":
    sys.exit(main())
