"""The whole contract as one JSON Schema document, generated from the structs.

`cox schema` writes it; the committed copy is `docs/schema.json` and CI fails when the two differ.
"""

from typing import Any, Final

import msgspec

from coxswain.schemas import commands, events, policy, status

ROOTS: Final[tuple[type[msgspec.Struct], ...]] = (
    *commands.COMMANDS.values(),
    commands.Reply,
    status.Frame,
    status.QueueQuery,
    status.QueuePage,
    status.RequestQuery,
    status.RequestReport,
    status.Config,
    *events.KINDS.values(),
    policy.Lead,
    policy.LeaseHolder,
    policy.ClassPolicy,
    policy.TenantPolicy,
)


def document() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of every message; `x-subjects` says what travels where."""
    _, definitions = msgspec.json.schema_components(ROOTS, ref_template="#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Coxswain wire protocol, version 1",
        "x-subjects": {
            **{
                f"cox.v1.<fleet>.cmd.<role>.<worker>.{verb}": struct.__name__
                for verb, struct in commands.COMMANDS.items()
            },
            **{
                f"cox.v1.<fleet>.event.<worker>.{kind}": struct.__name__
                for kind, struct in events.KINDS.items()
            },
            "cox.v1.<fleet>.query.<worker>.queue": "QueueQuery → QueuePage",
            "cox.v1.<fleet>.query.<worker>.request": "RequestQuery → RequestReport",
            "cox.v1.<fleet>.query.<worker>.config": "(empty) → Config",
            "cox.v1.<fleet>.query.<worker>.status": "(empty) → Frame",
            "cox.v1.<fleet>.status.<worker>": "Frame",
            "cox.v1.<fleet>.lead": "Lead",
        },
        "$defs": dict(sorted(definitions.items())),
    }


def text() -> str:
    """The document as indented JSON with a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(document()), indent=1).decode() + "\n"
