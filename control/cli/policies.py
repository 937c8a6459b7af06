"""`cox policies`: the policies that are installed, and what each takes with `--set`. Needs no NATS.

Called by `__init__.py`.
"""

from typing import TYPE_CHECKING

from rich.text import Text

from coxswain.control.cli.app import Cox
from coxswain.control.cli.exits import Exit
from coxswain.control.cli.words import printable

if TYPE_CHECKING:
    from coxswain.control.policy import Description


def policies(cox: Cox) -> Exit:
    """Show the installed policies: what each does and its parameters, with their defaults.

    A parameter is given as `cox controller --policy NAME --set PARAMETER=VALUE`; docs/policies.md explains them.
    """
    from coxswain.control import policy

    found = [policy.describe(entry) for entry in policy.available().values()]
    cox.emit({"policies": found})
    cox.say(Text("\n").join(line for each in found for line in _lines(each)), hang=4)
    for each in found:
        if each.error:
            cox.warn(f"cox: {each.error}")
    return Exit.DONE


def _lines(each: "Description") -> list[Text]:
    first = Text.assemble((printable(each.name), "bold"), "  ", printable(each.what or "cannot be used"))
    return [first] + [
        Text.assemble((f"    --set {one.name}={one.default}", "cyan"), (f"  {one.kind}", "dim"))
        for one in each.parameters
    ]
