"""Check that the documents point at things that exist.

Every relative link and anchor in a `*.md` file resolves, and so does every backticked path that begins with
one of the repository's folders. Addresses on the web are not visited: a check must not depend on
other people's servers. Called by `make links`.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final
from urllib.parse import unquote

ROOT: Final = Path(__file__).resolve().parent.parent

_FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(
    r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)|^\[[^\]]+\]:\s+(\S+)|\b(?:src|href)=\"([^\"]+)\"", re.MULTILINE
)
_HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
_PATH = re.compile(
    r"(?:common|schemas|service|control|lab|bench|src|tests|deploy|docs|examples|scripts|requirements|\.ci)/[\w./-]+"
)
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def problems(document: Path) -> Iterator[str]:
    """What is wrong in one document, one line each."""
    text = _FENCE.sub("", document.read_text())
    for match in _LINK.finditer(_CODE.sub("", text)):
        target = next(group for group in match.groups() if group)
        if not _ELSEWHERE.match(target) and (wrong := _broken(document, target)):
            yield f"{document.relative_to(ROOT)}: link {target}: {wrong}"
    if document.name == "CHANGELOG.md":
        return  # it may name what has gone since
    for match in _CODE.finditer(text):
        path = match[1]
        if _PATH.fullmatch(path) and not (ROOT / path).exists():
            yield f"{document.relative_to(ROOT)}: `{path}` does not exist"


def _broken(document: Path, target: str) -> str | None:
    path, _, anchor = target.partition("#")
    there = (document.parent / unquote(path)).resolve() if path else document
    if not there.is_relative_to(ROOT) or not there.exists():
        return "no such file"
    if anchor and there.suffix == ".md" and unquote(anchor) not in anchors(there):
        return f"no heading #{anchor} there"
    return None


@cache
def anchors(document: Path) -> frozenset[str]:
    """The anchors that GitHub and its like give a document's headings; repeated ones get -1, -2 and so on."""
    found: dict[str, int] = {}
    names = set()
    for heading in _HEADING.findall(_FENCE.sub("", document.read_text())):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        names.add(f"{slug}-{count}" if count else slug)
    return frozenset(names)


def documents() -> list[Path]:
    """Every markdown file that is, or is about to be, part of the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],  # noqa: S607 - git of the checkout
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [path for line in listed.stdout.splitlines() if (path := ROOT / line).exists()]


def main() -> int:
    """Print what is broken; 1 if anything is."""
    found = [line for document in documents() for line in problems(document)]
    print("\n".join(found) or f"links: {len(documents())} documents, all links resolve")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
