"""The command line without NATS: parsing, help, global options, exit codes, what is handed on."""

import json
import os
import re
import subprocess
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner, Result

from coxswain.control.cli import app
from coxswain.control.cli.app import Cox, Options, boundary, command, explain, root
from coxswain.control.cli.exits import MEANING, CliError, Exit
from coxswain.control.errors import (
    ControlError,
    JetStreamRefusedError,
    NoAnswerError,
    NotSetUpError,
    PolicyError,
    RowError,
    UnreachableError,
)
from coxswain.schemas import jsonschema
from coxswain.schemas.errors import Code, RefusedError
from coxswain.schemas.names import NameRefusedError

NOWHERE = "nats://127.0.0.1:9"


def _cox(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, arguments, env=env, prog_name="cox")


def _words(text: str) -> str:
    """Text without the boxes and line breaks of the help."""
    return " ".join(text.replace("│", " ").split())


def test_help_documents_every_exit_code() -> None:
    """Scripts rely on the numbers, so the help lists them all."""
    text = _words(_cox("--help").stdout)
    assert all(f"{code.value} {meaning}" in text for code, meaning in MEANING.items())
    assert set(MEANING) == set(Exit)


def _commands(group: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, each in group.commands.items():
        found += [(*path, name), *(_commands(each, (*path, name)) if hasattr(each, "commands") else [])]
    return found


@pytest.mark.parametrize("path", _commands(typer.main.get_command(app)), ids=" ".join)
def test_every_command_has_help_and_an_example(path: tuple[str, ...]) -> None:
    """Each command says what it does, explains each option and shows one example."""
    result = _cox(*path, "--help")
    assert result.exit_code == 0
    assert "Example: cox" in _words(result.stdout)
    target = typer.main.get_command(app)
    for name in path:
        target = target.commands[name]
    assert target.help
    programs = ("worker",), ("demo",)  # which say themselves what they take
    assert path in programs or all(parameter.help for parameter in target.params)


@pytest.mark.parametrize("path", _commands(typer.main.get_command(app)), ids=" ".join)
def test_help_can_be_read_in_80_columns(path: tuple[str, ...]) -> None:
    """No line is longer, and no name is cut."""
    text = CliRunner(env={"COLUMNS": "80"}).invoke(app, [*path, "--help"]).stdout
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert re.findall(r"[\w-]+…", text) == []


@pytest.mark.parametrize(("program", "option"), [("worker", "--sim-preset NAME"), ("demo", "--keep")])
def test_help_of_a_program_is_its_own(program: str, option: str) -> None:
    """Who asks for it before anything else is shown all that it takes."""
    assert option in _cox(program, "--help").stdout


def test_a_long_line_hangs_where_it_is_asked_to(capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal it is broken between words, but for an id, which is to be copied; in a file it is one line."""
    text = Text.assemble("fail", ("  the leader was not heard for a while", "red"), "\n\n", "r" * 50)
    cox = Cox(Options())
    cox.say(text, hang=6)
    assert capsys.readouterr().out == text.plain + "\n"
    cox.out = Console(width=30, force_terminal=True, color_system=None)
    cox.say(text, hang=6)
    assert capsys.readouterr().out == f"fail  the leader was not\n      heard for a while\n\n{'r' * 50}\n"


def test_help_fits_the_terminal() -> None:
    """A paragraph is broken where the terminal's width says so, not where its source was."""
    text = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["ps", "--help"]).stdout
    lines = [line.strip() for line in text.splitlines()]
    first = next(number for number, line in enumerate(lines) if line.startswith("SLOTS is"))
    paragraph = lines[first : lines.index("", first)]
    assert len(paragraph) > 2
    for line, after in pairwise(paragraph):
        assert len(line) + 1 + len(after.split()[0]) > 76


@pytest.mark.parametrize(
    ("path", "without"),
    [
        *(
            (path, ("--nats", "--fleet", "--timeout"))
            for path in (("policies",), ("lab", "run"), ("lab", "compare"))
        ),
        (("controller",), ("--timeout",)),
    ],
    ids=str,
)
def test_no_command_offers_a_global_option_that_it_has_no_use_for(
    path: tuple[str, ...], without: tuple[str, ...]
) -> None:
    """Before the command it is still taken: there it is for whatever follows."""
    text = _words(_cox(*path, "--help").stdout)
    assert "--json" in text
    assert not [name for name in without if f"{name} " in text]
    assert _cox("--timeout", "5s", "--nats", NOWHERE, *path, "--help").exit_code == Exit.DONE


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("hold",),
        ("hold", "r1", "--kv", "maybe"),
        ("hold", "r1", "--lease", "25h"),
        ("hold", "--class", "Not A Class"),
        ("prioritize", "r1"),
        ("prioritize", "r1", "--priority", "99999999999"),
        ("limit", "--tenant", "acme"),
        ("limit", "--max-running", "3"),
        ("limit", "--tenant", "acme", "--max-queued", "-1"),
        ("drain",),
        ("rank", "acme=2"),
        ("rank", "--worker", "w1"),
        ("rank", "--worker", "all", "acme=2"),
        ("tenants", "set", "acme"),
        ("tenants", "set", "acme", "--weight", "0"),
        ("classes", "set", "chat", "--order", "random"),
        ("events", "--kind", "nonsense"),
        ("requests", "--limit", "0"),
        ("requests", "--state", "sleeping"),
        ("ps", "--timeout", "0s"),
        ("ps", "--fleet", "Not.A.Token"),
        ("ps", "--nats", "nats://host:99999"),
        ("controller", "--nats", "::::"),
        ("controller", "--cadence", "2s"),
        ("controller", "--cadence", "1ms"),
        ("controller", "--name", "x" * 129),
        ("controller", "--set", "=2"),
        ("events", "--since", "99999999d"),
        ("init", "--max-age", "99999999d"),
        ("controller", "--policy", "nonsense"),
        ("controller", "--policy", "vtc", "--set", "nonsense=1"),
        ("worker",),
        ("schema", "--check", "no/such/file"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2_and_says_why_on_stderr(arguments: tuple[str, ...]) -> None:
    """Usage errors touch neither NATS nor stdout and show no traceback."""
    result = _cox("--nats", NOWHERE, *arguments)
    assert result.exit_code == Exit.USAGE
    assert result.stdout == ""
    assert result.stderr.strip()
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("stdin", [b"x" * 513, b"\xff\xfe"])
def test_ids_from_stdin_that_are_none_are_wrong_usage(stdin: bytes) -> None:
    """A line that cannot be a request id is refused like one on the command line."""
    result = CliRunner().invoke(app, ["hold", "-", "--nats", NOWHERE], input=stdin, prog_name="cox")
    assert result.exit_code == Exit.USAGE
    assert "stdin: " in result.stderr


@pytest.mark.parametrize(
    "arguments", [("ps",), ("hold", "r1"), ("tenants",), ("events",), ("init",)], ids=" ".join
)
def test_nats_out_of_reach_exits_3(arguments: tuple[str, ...]) -> None:
    """The address that was tried is named, and what to do."""
    result = _cox(*arguments, "--json", "--nats", NOWHERE)
    assert result.exit_code == Exit.UNREACHABLE
    assert result.stdout == ""
    assert NOWHERE in result.stderr
    assert "COX_NATS_URL" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CliError(Exit.PARTIAL, "x"), Exit.PARTIAL),
        (UnreachableError("x"), Exit.UNREACHABLE),
        (NoAnswerError("x"), Exit.NOT_FOUND),
        (NotSetUpError("x"), Exit.NOT_FOUND),
        (JetStreamRefusedError("x"), Exit.REFUSED),
        (RefusedError(Code.NOT_FOUND, "x"), Exit.NOT_FOUND),
        (RefusedError(Code.STALE, "x"), Exit.REFUSED),
        (RowError("x"), Exit.USAGE),
        (PolicyError("x"), Exit.USAGE),
        (NameRefusedError("x"), Exit.USAGE),
        (ControlError("x"), Exit.UNEXPECTED),
        (ZeroDivisionError("x"), Exit.UNEXPECTED),
        (ExceptionGroup("tasks", [ExceptionGroup("more", [RowError("x")]), ValueError("y")]), Exit.USAGE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_has_its_exit_code(error: Exception, code: Exit) -> None:
    """Errors of the control side map to exactly one code, and their words stay."""
    found, message = explain(error)
    assert found is code
    assert "x" in message


def _nothing(cox: Cox) -> None:
    """Do nothing."""


def _partial(cox: Cox) -> Exit:
    return Exit.PARTIAL


def _small(function: Any) -> typer.Typer:
    small = typer.Typer()
    root(small)
    command(small, "try", panel="Test", example="cox try")(function)
    command(small, "other", panel="Test", example="cox other")(_nothing)
    return small


@pytest.mark.parametrize(
    "arguments",
    [
        ("--json", "--fleet", "f1", "--timeout", "5s", "try"),
        ("try", "--json", "--fleet", "f1", "--timeout", "5s"),
        ("--fleet", "f0", "--timeout", "1s", "try", "--fleet", "f1", "--json", "--timeout", "5s"),
    ],
)
def test_global_options_may_stand_anywhere(arguments: tuple[str, ...]) -> None:
    """Before or after the command they mean the same; the later one wins."""
    seen = []

    def function(cox: Cox) -> None:
        seen.append((cox.json, cox.connection.fleet, cox.timeout_s))

    CliRunner().invoke(_small(function), arguments)
    assert seen == [(True, "f1", 5.0)]


def test_global_options_come_from_the_environment_too() -> None:
    """Several servers may be named; options on the command line win."""
    seen = []

    def function(cox: Cox) -> None:
        seen.append((cox.connection.urls, cox.connection.fleet, cox.json, cox.timeout_s))

    env = {
        "COX_NATS_URL": "nats://a:1, nats://b:2",
        "COX_FLEET": "NOT A TOKEN",
        "COX_JSON": "1",
        "COX_TIMEOUT": "300ms",
    }
    CliRunner().invoke(_small(function), ["try", "--fleet", "f2"], env=env)
    assert seen == [(("nats://a:1", "nats://b:2"), "f2", True, 0.3)]


def test_unexpected_errors_show_one_line() -> None:
    """No traceback, unless COX_DEBUG=1 asks for it."""

    def function(cox: Cox) -> None:
        raise ZeroDivisionError("half\x1b[2J")

    result = CliRunner().invoke(_small(function), ["try"])
    assert result.exit_code == Exit.UNEXPECTED
    assert result.stderr.count("\n") == 1
    assert r"ZeroDivisionError: half\x1b[2J" in result.stderr
    debug = CliRunner().invoke(_small(function), ["try"], env={"COX_DEBUG": "1"})
    assert "Traceback" in debug.stderr


def test_interrupts_are_quiet() -> None:
    """Ctrl-C exits with 130 and says nothing."""

    async def function(cox: Cox) -> None:
        raise KeyboardInterrupt

    result = CliRunner().invoke(_small(function), ["try"])
    assert (result.exit_code, result.output) == (Exit.INTERRUPTED, "")


@pytest.mark.parametrize("json", [[], ["--json"]])
def test_a_command_that_nobody_reads_does_not_say_that_all_is_well(json: list[str]) -> None:
    """`cox doctor | head` must not pass in a script when it could not say what it found."""
    reads, writes = os.pipe()
    os.close(reads)
    line = [
        sys.executable,
        "-c",
        "from coxswain.control.cli import main; main()",
        "doctor",
        "--nats",
        NOWHERE,
        *json,
    ]
    try:
        done = subprocess.run(line, check=False, stdout=writes, stderr=subprocess.PIPE, timeout=60)
    finally:
        os.close(writes)
    assert (done.returncode, done.stderr) == (Exit.UNREAD, b"")


def test_exit_codes_of_commands_are_passed_on() -> None:
    """A command's own code becomes the process's."""
    result = CliRunner().invoke(_small(_partial), ["try"])
    assert result.exit_code == Exit.PARTIAL


def test_a_group_without_a_word_hands_its_options_to_the_sub_command() -> None:
    """`cox tenants --json list` is `cox tenants list --json`."""
    seen: list[Any] = []

    def default(cox: Cox) -> None:
        seen.append("default")

    group = typer.Typer()
    group.callback(invoke_without_command=True)(boundary(default))
    command(group, "list", panel="Test", example="cox x")(lambda cox: seen.append(cox.json))
    outer = typer.Typer()
    root(outer)
    outer.add_typer(group, name="rows")
    CliRunner().invoke(outer, ["rows", "--json", "list"])
    CliRunner().invoke(outer, ["rows"])
    assert seen == [True, "default"]


def test_options_inherit_only_what_is_not_given() -> None:
    """The inner options win one by one."""
    outer = Options(nats="a", fleet="f", timeout=1.0, json=True)
    assert Options(fleet="g").over(outer) == Options(nats="a", fleet="g", timeout=1.0, json=True)


@pytest.mark.parametrize("name", ["worker", "demo"])
def test_foreign_arguments_are_passed_on_untouched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments of vLLM arrive in order, even those that `cox` has too; the connection as environment."""
    seen: list[Any] = []
    module = types.ModuleType("stand-in")
    module.main = lambda argv: seen.append(argv) or 7  # type: ignore[attr-defined]
    home = {"worker": "coxswain.service.worker", "demo": "coxswain.control.demo"}[name]
    monkeypatch.setitem(sys.modules, home, module)
    monkeypatch.setenv("COX_FLEET", "before")
    monkeypatch.setenv("COX_NATS_URL", NOWHERE)
    arguments = ["org/model", "--port", "8001", "-tp", "2", "--json", "--timeout", "x", "--", "--help"]
    result = _cox("--fleet", "f1", name, *arguments)
    assert result.exit_code == 7
    assert seen == [arguments]
    assert os.environ["COX_FLEET"] == "f1"


def test_options_before_the_model_are_passed_on_too() -> None:
    """vLLM takes options before the model; `cox` must not read their values as its own."""
    seen: list[Any] = []

    def function(cox: Cox, arguments: list[str] | None = typer.Argument(None)) -> None:  # noqa: B008
        seen.append(arguments)

    small = typer.Typer()
    root(small)
    command(small, "worker", panel="Test", example="x", passes_on=True)(function)
    command(small, "other", panel="Test", example="x")(_nothing)
    CliRunner().invoke(small, ["worker", "--port", "8001", "org/model", "--fleet", "x"])
    assert seen == [["--port", "8001", "org/model", "--fleet", "x"]]


@pytest.mark.parametrize("variable", ["COX_LOG", "COX_LOG_LEVEL"])
def test_a_controller_does_not_start_with_a_log_that_there_is_not(variable: str) -> None:
    """As a worker does not: the variable, its value and what is allowed are said."""
    result = _cox("--nats", NOWHERE, "controller", env={variable: "WARN"})
    assert result.exit_code == Exit.USAGE
    assert f"{variable} is 'WARN'" in result.stderr


def test_missing_programs_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without vLLM `cox worker` names the extras; without the demo `cox demo` says so."""
    monkeypatch.setitem(sys.modules, "coxswain.service.worker", None)
    result = _cox("worker", "org/model")
    assert result.exit_code == Exit.USAGE
    assert "'.[cpu]'" in result.stderr
    monkeypatch.setitem(sys.modules, "coxswain.control.demo", None)
    assert "make demo" in _cox("demo").stderr


def test_schema_is_printed_written_and_checked(tmp_path: Path) -> None:
    """The committed copy is equal or the exit code is 1."""
    assert _cox("schema").stdout == jsonschema.text()
    path = tmp_path / "schema.json"
    assert _cox("schema", "--output", str(path)).exit_code == Exit.DONE
    assert path.read_text(encoding="utf-8") == jsonschema.text()
    assert _cox("schema", "--check", str(path)).exit_code == Exit.DONE
    path.write_text("{}", encoding="utf-8")
    result = _cox("schema", "--check", str(path))
    assert result.exit_code == Exit.UNEXPECTED
    assert f"--output {path}" in result.stderr


def test_version_is_machine_readable() -> None:
    """`--json` puts one document on stdout and nothing else."""
    document = json.loads(_cox("version", "--json").stdout)
    assert document["protocol"] == 1
    assert set(document) == {"coxswain", "protocol", "vllm"}


def test_help_loads_neither_nats_nor_vllm() -> None:
    """The command line starts quickly and without an engine: heavy modules come when they are needed."""
    heavy = "{'nats', 'structlog', 'vllm', 'torch'} & set(sys.modules)"
    line = [sys.executable, "-c", f"import sys, coxswain.control.cli; sys.exit(bool({heavy}))"]
    assert subprocess.run(line, check=False, timeout=60).returncode == 0


def test_policies_lists_what_is_installed_and_what_it_takes() -> None:
    """Names, a sentence each, and every parameter the way `--set` takes it; the same as JSON."""
    text = _cox("policies").stdout
    assert "vtc  Fair shares" in text
    assert "--set wq=2.0  number, at least 0" in text
    found = {each["name"]: each for each in json.loads(_cox("--json", "policies").stdout)["policies"]}
    assert {"andes", "colocate", "edf", "fcfs", "strict", "vtc"} <= found.keys()
    assert {"name": "predict", "kind": "average | none", "default": "none"} in found["vtc"]["parameters"]
