"""Keep `docs/schema.json` equal to the contract in `schemas/`.

`--write` renews the committed copy (`make schema`); without it a difference is shown and the exit code is 1.
"""

import argparse
import difflib
import sys
from pathlib import Path
from typing import Final

from coxswain.schemas import jsonschema

COPY: Final = Path(__file__).resolve().parent.parent / "docs" / "schema.json"


def main() -> int:
    """Compare the copy with the contract, or write it."""
    parser = argparse.ArgumentParser(description="keep docs/schema.json equal to the contract")
    parser.add_argument("--write", action="store_true", help="renew the copy")
    wanted = jsonschema.text()
    if parser.parse_args().write:
        COPY.write_text(wanted)
        return 0
    committed = COPY.read_text() if COPY.exists() else ""
    if committed == wanted:
        return 0
    lines = difflib.unified_diff(
        committed.splitlines(), wanted.splitlines(), "docs/schema.json", "schemas/", lineterm=""
    )
    print("\n".join(lines))
    print("docs/schema.json is not what schemas/ says: run `make schema` and commit it", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
