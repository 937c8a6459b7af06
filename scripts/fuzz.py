"""Fuzz everything that reads what strangers send, guided by coverage (libFuzzer by way of atheris).

    python -m scripts.fuzz -max_total_time=20

Options are libFuzzer's; a crash is written to a file, which as an argument is run again. The targets, with what
must hold, are in `tests/support/fuzz.py`; hypothesis runs the same ones in `tests/unit/test_fuzz.py`.
"""

import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]
import msgspec

with atheris.instrument_imports(include=["coxswain"]):
    from coxswain.schemas.commands import VERBS
    from scripts.protocol_examples import EXAMPLES
    from tests.support.fuzz import TARGETS

ORDER = list(TARGETS.values())


def one(data: bytes) -> None:
    """Run the target that the first byte names on the rest."""
    if data:
        ORDER[data[0] % len(ORDER)](data[1:])


def seeds() -> list[bytes]:
    """The protocol's own examples, for each target as they are and for commands as each verb."""
    plain = [msgspec.json.encode(example) for example in EXAMPLES.values()]
    first = bytes([list(TARGETS).index("command")])
    verbs = [first + bytes([role + number]) for number in range(len(VERBS)) for role in (0x48, 0x87)]
    return [bytes([number]) + body for number in range(len(ORDER)) for body in plain] + [
        start + body for start in verbs for body in plain
    ]


def main() -> None:
    """Fuzz until libFuzzer's options say stop."""
    with tempfile.TemporaryDirectory() as corpus:
        files = [Path(corpus) / str(number) for number in range(len(seeds()))]
        for file, seed in zip(files, seeds(), strict=True):
            file.write_bytes(seed)
        # Named one by one, they are read in this order on every machine.
        listed = Path(corpus) / "seeds"
        listed.write_text(",".join(map(str, files)))
        atheris.Setup([*sys.argv, f"-seed_inputs=@{listed}"], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
