"""A page per kind of event, `docs/events/KIND.md`, written from `schemas/events.py` alone.

What a field means is the text under it in the source; its type and default are those of the struct. `--write` renews
the pages; with `--check`, or nothing, a difference is shown and the exit code is 1. The tests call it too.
"""

import argparse
import ast
import difflib
import inspect
import json
import sys
from pathlib import Path
from typing import Any, Final

import msgspec

from coxswain.schemas import events

ROOT: Final = Path(__file__).resolve().parent.parent
FOLDER: Final = ROOT / "docs" / "events"


def texts() -> dict[str, dict[str, str]]:
    """Per class of `schemas/events.py`: what stands under each field, on one line."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(inspect.getfile(events)).read_text()).body:
        if not isinstance(node, ast.ClassDef):
            continue
        own = found[node.name] = {}
        for field, below in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = below.value if isinstance(below, ast.Expr) else None
                is_text = isinstance(text, ast.Constant) and isinstance(text.value, str)
                own[field.target.id] = " ".join(text.value.split()) if is_text else ""  # type: ignore[union-attr]
    return found


def page(kind: str, struct: type[events.Event]) -> str:
    """The page of one kind."""
    about = texts()
    schema = msgspec.json.schema(struct)["$defs"][struct.__name__]["properties"]
    envelope = {field.name for field in msgspec.structs.fields(events.Event)}
    own = [field for field in msgspec.structs.fields(struct) if field.name not in envelope]
    shared = [field for field in msgspec.structs.fields(struct) if field.name in envelope]
    lines = [
        "<!-- written by scripts/event_pages.py from schemas/events.py -->",
        f"# `{kind}`",
        "",
        inspect.getdoc(struct) or "",
        "",
        f"Subject: `cox.v1.<fleet>.event.<worker>.{kind}`. How to read events: [the event stream](../events.md).",
        "",
        *_table(own, schema, about.get(struct.__name__, {})),
        "",
        "## The envelope, the same for all",
        "",
        *_table(shared, schema, about["Event"]),
    ]
    return "\n".join(lines) + "\n"


def _table(fields: list[Any], schema: dict[str, Any], about: dict[str, str]) -> list[str]:
    if not fields:
        return ["No fields of its own."]
    rows = ["| field | type | default | |", "|---|---|---|---|"]
    for field in fields:
        name = field.encode_name
        default = "" if field.required else f"`{json.dumps(_default(field))}`"
        rows.append(f"| `{name}` | {_type(schema[name])} | {default} | {about.get(field.name, '')} |")
    return rows


def _default(field: Any) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    if schema.get("type") == "array" and "prefixItems" in schema:
        return f"array of {len(schema['prefixItems'])}"
    return str(schema.get("type", "any"))


def pages() -> dict[Path, str]:
    """Every page by its path."""
    return {FOLDER / f"{kind}.md": page(kind, struct) for kind, struct in events.KINDS.items()}


def stale(*, write: bool = False) -> str:
    """What differs, as a diff, empty if nothing does; `write` renews it. Pages of no kind are in it too."""
    found, wanted = "", pages()
    there = set(FOLDER.glob("*.md")) if FOLDER.is_dir() else set()
    for path in sorted(wanted.keys() | there):
        old = path.read_text() if path in there else ""
        new = wanted.get(path, "")
        found += "".join(
            difflib.unified_diff(
                old.splitlines(keepends=True),
                new.splitlines(keepends=True),
                str(path.relative_to(ROOT)),
                "its source",
            )
        )
        if write and new:
            FOLDER.mkdir(exist_ok=True)
            path.write_text(new)
        elif write:
            path.unlink()
    return found


def main() -> int:
    """Compare the pages with their source, or renew them."""
    parser = argparse.ArgumentParser(description="keep the pages on events equal to their source")
    parser.add_argument("--write", action="store_true", help="renew the pages")
    parser.add_argument("--check", action="store_true", help="exit 1 if one differs (the default)")
    write = parser.parse_args().write
    found = stale(write=write)
    if write or not found:
        return 0
    print(found)
    print("run `python scripts/event_pages.py --write` and commit the pages", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
