"""How a command ends: the exit codes and the one exception that carries one.

Lives here: `Exit`, its documentation, `CliError`. Nothing else may invent an exit code.
Called by every module of the command line; scripts rely on the numbers, so they never change.
"""

from enum import IntEnum
from typing import Final


class Exit(IntEnum):
    """What the exit code of `cox` means."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    REFUSED = 5
    PARTIAL = 6
    INTERRUPTED = 130
    UNREAD = 141


MEANING: Final[dict[Exit, str]] = {
    Exit.DONE: "done",
    Exit.UNEXPECTED: "unexpected failure (COX_DEBUG=1 shows where), or `cox doctor` found one",
    Exit.USAGE: "wrong usage",
    Exit.UNREACHABLE: "NATS cannot be reached",
    Exit.NOT_FOUND: "no such worker, request or class; no answer; or `cox init` was not run",
    Exit.REFUSED: "refused; code and reason are shown",
    Exit.PARTIAL: "partly applied; what was not is shown",
    Exit.INTERRUPTED: "interrupted",
    Exit.UNREAD: "the reader of the output has gone, as with `head`: outcome unknown",
}

EPILOGUE: Final = "\n".join(["Exit codes:", *(f"{code.value:>4}  {text}" for code, text in MEANING.items())])
"""Shown under `cox --help`; a blank line is how typer is told to begin a new one."""


class CliError(Exception):
    """A failure to show to the user: what was wrong, what it was, what to do, in one or two lines."""

    def __init__(self, code: Exit, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
