"""The documents say what the code does: examples, tables, commands and programs are checked against it."""

import re
import shlex
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
import typer

from coxswain.control.cli import app
from coxswain.control.cli.exits import MEANING
from coxswain.control.core import ControlCore, Inputs, Send
from coxswain.control.policy import params_of
from coxswain.schemas import commands, events, policy, status, subjects
from coxswain.schemas.errors import Code
from examples.half_life import HalfLife
from scripts import generated, protocol_examples
from tests.support.frames import frame, row

ROOT = Path(__file__).resolve().parent.parent.parent
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    """Every `cox …` line of the shell blocks of all documents."""
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    blocks = [block for document in documents for block in SHELL.findall(document.read_text())]
    return sorted({line for block in blocks for line in block.splitlines() if line.startswith("cox ")})


# Installation


def test_nobody_is_told_to_install_us_by_name() -> None:
    """On PyPI the name is another project's, with a command `cox` too: who followed such words would run that."""
    told = [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "deploy").rglob("*"),
        ROOT / "compose.yaml",
    ]
    told += [path for folder in ("control", "service", "lab") for path in (ROOT / folder).rglob("*.py")]
    by_name = re.compile(r"pip install[^\n]*[ '\"/]coxswain(\[|['\"\s]|$)|coxswain\[\w")
    assert [path.name for path in told if path.is_file() and by_name.search(path.read_text())] == []


# Quotations


def test_what_is_generated_is_what_its_source_says() -> None:
    """Quoted examples and programs, pages on events, the states, the rights of roles and the dashboards."""
    assert generated.drift() == ""


def test_drift_is_shown_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was changed, one that is missing and one too many are in the difference until they are renewed."""
    changed, missing, extra = (tmp_path / "docs" / name for name in ("changed.md", "missing.md", "extra.md"))
    changed.parent.mkdir()
    changed.write_text("by hand\n")
    extra.write_text("of old\n")
    monkeypatch.setattr(generated, "ROOT", tmp_path)
    monkeypatch.setattr(generated, "texts", lambda: {changed: "as it is\n", missing: "new\n", extra: ""})
    found = generated.drift()
    assert all(line in found for line in ("-by hand", "+as it is", "+new", "-of old"))
    generated.renew()
    assert (changed.read_text(), missing.read_text(), extra.exists()) == ("as it is\n", "new\n", False)


def test_every_kind_of_event_has_a_page() -> None:
    """The guide links each."""
    guide = (ROOT / "docs" / "events.md").read_text()
    assert all(f"(events/{kind}.md)" in guide for kind in events.KINDS)


def test_every_example_is_shown() -> None:
    """No example is made for nobody."""
    shown = protocol_examples.quoted_in(PROTOCOL)
    assert shown >= protocol_examples.EXAMPLES.keys()


@pytest.mark.parametrize("verb", commands.COMMANDS)
def test_a_worker_understands_the_commands_of_the_protocol_page(verb: str) -> None:
    """Each example command decodes to itself, and a worker ignores nothing of it."""
    command, ignored = commands.decode(verb, protocol_examples.payload(verb))
    assert command == protocol_examples.EXAMPLES[verb]
    assert ignored == ()


def test_readers_understand_the_messages_of_the_protocol_page() -> None:
    """What workers send, as the page shows it, decodes to itself."""
    decoders: dict[str, Any] = {
        "reply": commands.decode_reply, "refusal": commands.decode_reply, "frame": status.decode_frame,
        "queue page": status.decode_page, "request report": status.decode_report,
        "config": status.decode_config, "held": events.decode_event, "finished": events.decode_event,
        "command": events.decode_event,
    }  # fmt: skip
    for name, decode in decoders.items():
        assert decode(protocol_examples.payload(name)) == protocol_examples.EXAMPLES[name]


# Completeness


@pytest.mark.parametrize("code", Code)
def test_every_refusal_code_is_documented(code: Code) -> None:
    """The table of refusals has a row for each code that a reply can carry."""
    assert f"| {code.value} |" in PROTOCOL


@pytest.mark.parametrize("name", [*commands.VERBS, *subjects.QUERIES, *events.KINDS])
def test_every_verb_query_and_kind_of_event_is_documented(name: str) -> None:
    """The page on the protocol has a word about each."""
    assert re.search(rf"^#+ .*\b{name}\b|`{name}`", PROTOCOL, re.MULTILINE)


@pytest.mark.parametrize(("table", "row"), [("class", policy.ClassPolicy), ("tenant", policy.TenantPolicy)])
def test_every_field_of_the_tables_is_documented(table: str, row: type[msgspec.Struct]) -> None:
    """The page on the protocol has a row for each field of a class and of a tenant, and for nothing else."""
    rows = PROTOCOL.split(f"\n| {table} | |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    named = [name for line in rows for name in re.findall(r"`(\w+)`", line.split(" | ")[0])]
    assert sorted(named) == sorted(row.__struct_encode_fields__)


def test_the_environment_variables_are_those_that_are_read() -> None:
    """The table of variables names all that the code reads, and no others."""
    code = [
        path
        for part in ("common", "schemas", "service", "control", "lab")
        for path in (ROOT / part).rglob("*.py")
    ]
    read = {name for path in code for name in re.findall(r'"(COX_[A-Z_]*[A-Z])"', path.read_text())}
    documented = set(re.findall(r"`(COX_[A-Z_]*[A-Z])`", OPERATIONS))
    assert documented == read


@pytest.mark.parametrize("code", MEANING)
def test_every_exit_code_is_documented(code: int) -> None:
    """Scripts can rely on the table of exit codes."""
    meaning = MEANING[code].replace("COX_DEBUG=1", "`COX_DEBUG=1`")
    assert f"| {code} | {meaning} |" in OPERATIONS


# Commands


@pytest.mark.parametrize("line", shell_lines())
def test_every_command_in_the_documents_is_one_that_cox_takes(line: str) -> None:
    """Its words are parsed by the command line itself; nothing is run."""
    words = shlex.split(line, comments=True)[1:]
    command: click.Command = typer.main.get_command(app)
    context = click.Context(command, info_name="cox")
    while isinstance(command, click.Group) and words and (found := command.get_command(context, words[0])):
        command, words = found, words[1:]
    assert not isinstance(command, click.Group) or not words, f"no such command: {line}"
    command.make_context(str(command.name), list(words), parent=context)


def test_there_are_commands_to_check() -> None:
    """The search for shell lines finds those of the README."""
    assert any(line.startswith("cox hold REQUEST") for line in shell_lines())


# Programs


def test_the_example_that_steers_is_twenty_lines() -> None:
    """The README promises it."""
    lines = (ROOT / "examples" / "steer.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 20


def test_the_example_policy_is_short() -> None:
    """The page on policies promises that one can be written in under 80 lines."""
    lines = (ROOT / "examples" / "half_life.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) < 80


def ranks_after(half_life_s: float, quiet_s: float) -> dict[str, float]:
    """Virtual times that the example policy gives two tenants, `quiet_s` after one of them was served."""
    core = ControlCore(HalfLife(params_of(HalfLife, [f"half_life_s={half_life_s}"])), "c1", lambda: "id")
    bases: dict[str, float] = {}
    rows = [row("heavy", charged=8_000.0), row("light", charged=100.0)]
    for at in (1_000.0, 1_000.0 + quiet_s):
        status_frame = frame("w1", "01A", int(at), *rows)
        core.hear(at, status_frame)
        for sent in core.step(at, Inputs(classes={}, tenants={}, epoch=(1.0, 1))):
            if isinstance(sent, Send) and sent.verb == "rank":
                bases |= {tenant: rank.base for tenant, rank in sent.command.tenants.items()}
        core.validate()
    return {each.tenant: bases.get(each.tenant, each.base) + each.charged for each in rows}


def test_the_example_policy_halves_the_past_after_its_half_life() -> None:
    """One half-life later, a tenant's virtual time is half of what it was charged, within the tolerance."""
    virtual = ranks_after(half_life_s=600.0, quiet_s=600.0)
    assert virtual["heavy"] == pytest.approx(4_000.0, abs=0.5)
    assert virtual["light"] == pytest.approx(50.0, abs=0.5)


def test_the_example_policy_leaves_fresh_service_as_it_is() -> None:
    """With a half-life far longer than the time that passed, nobody is moved."""
    assert ranks_after(half_life_s=1e12, quiet_s=1.0) == {"heavy": 8_000.0, "light": 100.0}
