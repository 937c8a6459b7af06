"""`cox doctor`: what is wrong with this fleet, and how to mend it. Called by `__init__.py`."""

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
        level = (each.level.ljust(_INDENT), _STYLES[each.level])
        cox.say(Text.assemble(level, printable(f"{each.check}: {each.found}")), hang=_INDENT)
        if each.mend:
            cox.say(" " * _INDENT + printable(f"mend: {each.mend}"), hang=_INDENT)
    warned = sum(each.level == "warn" for each in findings)
    cox.say(
        f"{plural(failed, 'failure')}, {plural(warned, 'warning')}" if failed or warned else "all is well"
    )
    return code
