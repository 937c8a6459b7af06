"""`cox tenants` and `cox classes`: read and change the tables that the leading controller applies to workers.

Changing a row is read, change, write; fields that were not named stay. Called by `__init__.py`.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
import typer
from rich.text import Text

from coxswain.control.cli import parse, view_tables
from coxswain.control.cli.app import Cox, option, or_none
from coxswain.control.cli.exits import CliError, Exit
from coxswain.control.cli.words import printable
from coxswain.control.errors import ControlError
from coxswain.schemas.names import DEFAULT
from coxswain.schemas.policy import ClassPolicy, CutIn, Order, TenantPolicy

if TYPE_CHECKING:
    from coxswain.control.client import Client
    from coxswain.control.tables import Table

Row = TypeVar("Row", TenantPolicy, ClassPolicy)
UNSET = msgspec.UNSET
"""The word `none`, as in `--slo none`, on its way through typer."""

TenantArgument = Annotated[
    str,
    typer.Argument(metavar="NAME", parser=option(parse.tenant), help="The tenant.", show_default=False),
]
ClassArgument = Annotated[
    str,
    typer.Argument(metavar="NAME", parser=option(parse.class_name), help="The class.", show_default=False),
]


def _yes_or_no(help: str) -> Any:
    return typer.Option(help=help, parser=option(parse.yes_or_no), metavar="yes|no")


async def tenants_list(cox: Cox) -> Exit:
    """Show the tenant table; `set` and `rm` change it."""
    async with cox.client() as client:
        return await _list(cox, client.tenants, view_tables.tenants)


async def tenants_set(
    cox: Cox,
    name: TenantArgument,
    weight: Annotated[
        float | None,
        typer.Option(
            metavar="W", parser=option(parse.positive), help="Share relative to other tenants; over 0."
        ),
    ] = None,
    class_: Annotated[
        str | None,
        typer.Option(
            "--class",
            metavar="CLASS",
            parser=option(parse.class_name),
            help="Class of requests that ask for none.",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", parser=option(parse.tokens), help="Other classes it may ask for; empty for none."
        ),
    ] = None,
    priority_min: Annotated[
        int | None,
        typer.Option(
            metavar="N", parser=option(parse.priority), help="Requests are clamped to at least this."
        ),
    ] = None,
    priority_max: Annotated[
        int | None,
        typer.Option(
            metavar="N", parser=option(parse.priority), help="Requests are clamped to at most this."
        ),
    ] = None,
    max_running: Annotated[
        str | None,
        or_none("Requests that may run at once; none: no cap.", parse.count_or_none, "N|none"),
    ] = None,
    max_queued: Annotated[
        str | None,
        or_none("Requests that may wait; none: no cap.", parse.count_or_none, "N|none"),
    ] = None,
) -> Exit:
    """Create or change a tenant's row; what you leave out stays as it is."""
    given = _given(
        name,
        weight=weight,
        class_=class_,
        classes=classes,
        priority_min=priority_min,
        priority_max=priority_max,
        max_running=max_running,
        max_queued=max_queued,
    )
    async with cox.client() as client:
        code = await _set(cox, client, client.tenants, name, TenantPolicy(), given, view_tables.tenants)
        named = {given.get("class_"), *given.get("classes", ())} - {None, DEFAULT}
        if named and (new := named - (await client.classes.get_all()).good.keys()):
            which = ", ".join(sorted(new))
            cox.warn(
                f"cox: no row for class {which}: it has the defaults until `cox classes set` gives it one"
            )
        return code


async def tenants_rm(cox: Cox, name: TenantArgument) -> Exit:
    """Remove a tenant's row; the row of tenant `default`, or the defaults, then apply."""
    async with cox.client() as client:
        return await _remove(cox, client, client.tenants, "tenant", name)


async def classes_list(cox: Cox) -> Exit:
    """Show the class table; `set` and `rm` change it."""
    async with cox.client() as client:
        return await _list(cox, client.classes, view_tables.classes)


async def classes_set(
    cox: Cox,
    name: ClassArgument,
    position: Annotated[
        int | None,
        typer.Option(metavar="N", parser=option(parse.priority), help="Lower runs first."),
    ] = None,
    order: Annotated[
        Order | None,
        typer.Option(
            metavar="ORDER", help="fair: by tenant virtual time; priority: by priority, then arrival."
        ),
    ] = None,
    slo: Annotated[
        str | None,
        or_none(
            "Deadline of a request after its arrival: 30s, 2m; none: no deadline.",
            parse.positive_or_none_s,
            "TIME",
        ),
    ] = None,
    cut_in: Annotated[
        CutIn | None,
        typer.Option(
            metavar="MODE", help="What it may take from running work it outranks: off, queue, slots or kv."
        ),
    ] = None,
    quantum: Annotated[
        float | None,
        typer.Option(
            metavar="TIME",
            parser=option(parse.duration_s),
            help="No cut-in on its requests for this long after they begin or continue.",
        ),
    ] = None,
    cooldown: Annotated[
        float | None,
        typer.Option(
            metavar="TIME",
            parser=option(parse.duration_s),
            help="No cut-in on its requests for this long after they continue from one.",
        ),
    ] = None,
    ageing: Annotated[
        str | None,
        or_none(
            "Passed over for this long, it goes first, once; none: never.", parse.duration_or_none_s, "TIME"
        ),
    ] = None,
    max_prefill_tokens_per_step: Annotated[
        str | None,
        or_none(
            "Prefill tokens per step while a better class is there; none: no bound.",
            parse.count_or_none,
            "N|none",
        ),
    ] = None,
    stand_aside: Annotated[
        str | None,
        _yes_or_no("Waits for the first token of a better request that begins."),
    ] = None,
    borrow: Annotated[
        str | None, _yes_or_no("May run beyond caps while nothing within its caps waits.")
    ] = None,
    max_running: Annotated[
        str | None,
        or_none("Requests of the class that may run at once; none: no cap.", parse.count_or_none, "N|none"),
    ] = None,
    max_queued: Annotated[
        str | None,
        or_none("Requests of the class that may wait; none: no cap.", parse.count_or_none, "N|none"),
    ] = None,
    linger: Annotated[
        float | None,
        typer.Option(
            metavar="TIME",
            parser=option(parse.duration_s),
            help="The step budget stays in force this long after a better class left.",
        ),
    ] = None,
) -> Exit:
    """Create or change a class's row; what you leave out stays as it is."""
    given = _given(
        name,
        position=position,
        order=order,
        slo_s=slo,
        cut_in=cut_in,
        quantum_s=quantum,
        cooldown_s=cooldown,
        ageing_s=ageing,
        max_prefill_tokens_per_step=max_prefill_tokens_per_step,
        stand_aside=stand_aside,
        borrow=borrow,
        max_running=max_running,
        max_queued=max_queued,
        linger_s=linger,
    )
    async with cox.client() as client:
        return await _set(cox, client, client.classes, name, ClassPolicy(), given, view_tables.classes)


async def classes_rm(cox: Cox, name: ClassArgument) -> Exit:
    """Remove a class's row; requests of that class then run with the defaults."""
    async with cox.client() as client:
        return await _remove(cox, client, client.classes, "class", name)


async def _list(cox: Cox, table: "Table[Row]", view: Callable[[Mapping[str, Row], int], Text]) -> Exit:
    rows = await table.get_all()
    cox.emit({"rows": {name: _whole(row) for name, row in rows.good.items()}, "refused": rows.refused})
    cox.say(view(rows.good, cox.out.width))
    for name, why in sorted(rows.refused.items()):
        cox.warn(f"cox: the row of {printable(name)} is not valid and not in force: {why}")
    return Exit.DONE


def _whole(row: TenantPolicy | ClassPolicy) -> dict[str, Any]:
    """A row for programs, with the fields too that have their defaults: nobody else need know these."""
    names = zip(row.__struct_encode_fields__, row.__struct_fields__, strict=True)
    return {name: getattr(row, field) for name, field in names}


def _given(name: str, **options: Any) -> dict[str, Any]:
    """The fields of a row that were named."""
    given = {
        field: None if value is UNSET else value for field, value in options.items() if value is not None
    }
    if not given:
        raise CliError(
            Exit.USAGE, f"nothing to change for {name}: name at least one option (`--help` lists them)"
        )
    return given


async def _set(
    cox: Cox,
    client: "Client",
    table: "Table[Row]",
    name: str,
    default: Row,
    given: dict[str, Any],
    view: Callable[[Mapping[str, Row], int], Text],
) -> Exit:
    rows = await table.get_all()
    row = msgspec.structs.replace(rows.good.get(name, default), **given)
    revision = await table.put(name, row)
    applied = await _applied(client)
    cox.emit({"name": name, "row": _whole(row), "revision": revision})
    cox.say(view({name: row}, cox.out.width))
    cox.say(f"stored as revision {revision}; {applied}")
    return Exit.DONE


async def _remove(cox: Cox, client: "Client", table: "Table[Row]", noun: str, name: str) -> Exit:
    if not await table.delete(name):
        raise CliError(
            Exit.NOT_FOUND,
            f"no row for {noun} {name} (`cox {noun}{'e' if noun == 'class' else ''}s` lists them)",
        )
    applied = await _applied(client)
    cox.emit({"name": name, "removed": True})
    cox.say(f"removed; {applied}")
    return Exit.DONE


async def _applied(client: "Client") -> str:
    """When the change will be in force; of a lease that cannot be read nothing is said."""
    from coxswain.control.lease import holder

    with suppress(ControlError):
        if await holder(client.js, client.subjects) is None:
            return "no controller leads: it applies when one does (`cox controller`)"
    return "the leading controller applies it"
