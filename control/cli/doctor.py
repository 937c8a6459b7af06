"""`cox doctor`: what is wrong with this fleet, and how to mend it. Called by `__init__.py`."""

import textwrap
from typing import Final

from rich.text import Text

from coxswain.control.cli.app import Cox, explain
from coxswain.control.cli.exits import Exit
from coxswain.control.cli.words import plural, printable
from coxswain.control.errors import UnreachableError

_STYLES: Final = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
_INDENT: Final = 5


async def doctor(cox: Cox) -> Exit:
    """Check the connection, this user's role, stream and buckets, workers and leader; say how to fix each problem.

    It changes nothing. Exit 0: no failure (there may be warnings); 1: at least one.
    """
    from coxswain.control.doctor import Finding, judge
    from coxswain.control.examine import examine

    code = Exit.DONE
    try:
        async with cox.client() as client:
            findings = judge(await examine(client, timeout_s=cox.timeout_s, nkey=cox.connection.nkey))
    except UnreachableError as error:
        code, why = explain(error)
        findings = [
            Finding(check="connection", level="fail", found=why, mend="fix this first, then run it again")
        ]
    failed = sum(each.level == "fail" for each in findings)
    code = code or (Exit.UNEXPECTED if failed else Exit.DONE)
    cox.emit({"fleet": cox.connection.fleet, "healthy": not failed, "findings": findings})
    for each in findings:
        _say(cox, Text(each.level, _STYLES[each.level]), f"{each.check}: {each.found}")
        if each.mend:
            _say(cox, Text(""), f"mend: {each.mend}")
    warned = sum(each.level == "warn" for each in findings)
    cox.say(
        f"{plural(failed, 'failure')}, {plural(warned, 'warning')}" if failed or warned else "all is well"
    )
    return code


def _say(cox: Cox, level: Text, words: str) -> None:
    """One line behind its level; on a terminal, what goes over its width stands below itself."""
    width = cox.out.width - _INDENT if cox.out.is_terminal else len(words) + 1
    first, *more = textwrap.wrap(printable(words), max(20, width), break_long_words=False) or [""]
    level.pad_right(_INDENT - len(level))
    cox.say(level.append(first, "default"))
    for line in more:
        cox.say(" " * _INDENT + line)
