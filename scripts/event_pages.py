"""A page per kind of event, `docs/events/KIND.md`, written from `schemas/events.py` alone.

What a field means is the text under it in the source; its type and default are msgspec's. `generated.py` compares
the pages, or renews them.
"""

import ast
import inspect
import json
from pathlib import Path
from typing import Any, Final

import msgspec

from coxswain.schemas import events

ROOT: Final = Path(__file__).resolve().parent.parent
FOLDER: Final = ROOT / "docs" / "events"


def meanings() -> dict[str, dict[str, str]]:
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
    about = meanings()
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


def texts() -> dict[Path, str]:
    """Every page by its path; a page of no kind has nothing to say."""
    no_kind = dict.fromkeys(FOLDER.glob("*.md"), "")
    return no_kind | {FOLDER / f"{kind}.md": page(kind, struct) for kind, struct in events.KINDS.items()}
