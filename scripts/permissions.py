"""The table of rights in `docs/security.md`, from `schemas/permissions.py`; `generated.py` compares or renews it."""

import re
from pathlib import Path
from typing import Final

from coxswain.schemas.permissions import ROLES, rights, streams
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


def texts() -> dict[Path, str]:
    """The page with the table as it must be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return {PAGE: before + BEGIN + table() + END + rest.partition(END)[2]}
