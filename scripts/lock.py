"""Pin every package that a checkout, a worker or a controller needs: writes `requirements/*.lock`.

One resolution by pip of all that `pyproject.toml` names, then a walk over the packages' own metadata
decides which file each belongs to. Called by `make lock`; reads package metadata, installs nothing.

The locks are installed with `--no-deps`, so they must be complete on every Python and machine that we
support, not only on the one that made them: the walk evaluates markers for all of them. torch has a file of
its own, as its CPU build has a source of its own. Its companions are left out: the registry's builds of them
are for CUDA, and vLLM on a CPU does without.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).resolve().parent.parent
LEFT_OUT: Final = frozenset({"torchvision", "torchaudio", "torchcodec", "triton"})
BUILT: Final = ("nkeys",)
"""Published as source only, in plain Python; all else must have wheels."""
PYTHONS: Final = ("3.11", "3.12", "3.13")
MACHINES: Final = ("x86_64", "aarch64")
MAX_ROUNDS: Final = 4
"""Resolutions at most: each adds what another Python or machine needs on top."""


class Roots(NamedTuple):
    """What `pyproject.toml` asks for, by the file that it ends in."""

    control: tuple[str, ...]
    cpu: tuple[str, ...]
    dev: tuple[str, ...]


class Package(NamedTuple):
    """One resolved package."""

    name: str
    version: str
    requires: tuple[Requirement, ...]


Packages = dict[str, Package]


class LockError(Exception):
    """The lock cannot be made; the text says why."""


def roots(pyproject: dict[str, Any]) -> Roots:
    """The requirements of each lock, from the parsed `pyproject.toml`."""
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    control = (*project["dependencies"], *extras["web"])
    return Roots(
        control=control,
        cpu=(*control, *extras["cpu"], *extras["demo"], *extras["lab"]),
        dev=(*pyproject["dependency-groups"]["dev"], *extras["top"], *pyproject["build-system"]["requires"]),
    )


def packages(report: dict[str, Any]) -> Packages:
    """The packages in a report of `pip install --report`, by canonical name."""
    found: Packages = {}
    for item in report["install"]:
        meta = item["metadata"]
        requires = tuple(Requirement(text) for text in meta.get("requires_dist", ()))
        found[canonicalize_name(meta["name"])] = Package(meta["name"], meta["version"], requires)
    return found


def environments() -> list[dict[str, str]]:
    """The marker environments of every Python and machine that the locks must serve."""
    here = {key: str(value) for key, value in default_environment().items()}
    linux = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    return [
        here
        | linux
        | {"platform_machine": machine, "python_version": python, "python_full_version": f"{python}.0"}
        for python, machine in itertools.product(PYTHONS, MACHINES)
    ]


def reach(wanted: Iterable[str], known: Packages, environment: dict[str, str]) -> dict[str, Requirement]:
    """Everything that `wanted` needs in one environment, with the requirement that first asked for it.

    Raises:
        LockError: if a resolved version is not one that this environment allows.
    """
    found: dict[str, Requirement] = {}
    seen: set[tuple[str, str]] = set()
    queue = [(Requirement(text), "") for text in wanted]
    while queue:
        requirement, extra = queue.pop()
        name = canonicalize_name(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate(environment | {"extra": extra})
        if not applies or name in LEFT_OUT:
            continue
        found.setdefault(name, requirement)
        package = known.get(name)
        if package is None:
            continue
        if not requirement.specifier.contains(package.version, prereleases=True):
            where = f"Python {environment['python_version']} on {environment['platform_machine']}"
            raise LockError(f"{name} {package.version} was resolved, {where} needs {requirement}")
        for asked in ("", *sorted(requirement.extras)):
            if (name, asked) not in seen:
                seen.add((name, asked))
                queue += [(needed, asked) for needed in package.requires]
    return found


def missing(wanted: Iterable[str], known: Packages) -> list[str]:
    """Requirements that some environment has and the resolution does not."""
    wanted = tuple(wanted)
    absent = {}
    for environment in environments():
        for name, requirement in reach(wanted, known, environment).items():
            if name not in known:
                absent[name] = f"{requirement.name}{requirement.specifier}"
    return [absent[name] for name in sorted(absent)]


def pins(wanted: Iterable[str], known: Packages) -> dict[str, str]:
    """One line per package that `wanted` needs anywhere, marked if only one kind of machine needs it."""
    wanted = tuple(wanted)
    machines: dict[str, set[str]] = {}
    for environment in environments():
        for name in reach(wanted, known, environment):
            machines.setdefault(name, set()).add(environment["platform_machine"])
    return {
        name: f"{known[name].name}=={known[name].version}{_marker(machines[name])}"
        for name in sorted(machines)
    }


def _marker(machines: set[str]) -> str:
    if len(machines) == len(MACHINES):
        return ""
    return "; " + " or ".join(f'platform_machine == "{machine}"' for machine in sorted(machines))


def files(wanted: Roots, known: Packages) -> dict[str, str]:
    """The text of each lock, by file name."""
    cpu, control, dev = (pins(part, known) for part in (wanted.cpu, wanted.control, wanted.dev))
    torch = {"torch": cpu.pop("torch")}
    dev = {name: line for name, line in dev.items() if name not in cpu}
    return {
        "cpu.lock": _text("A worker on a CPU, the demo and the lab, without torch: see torch.lock.", cpu),
        "torch.lock": _text("torch's CPU build, for cpu.lock.", torch),
        "control.lock": _text(
            "The control side, its page, the contract and the command line: no vLLM.", control
        ),
        "dev.lock": _text("Tests, `cox top`, static checks and the build backend, on top of cpu.lock.", dev),
    }


def _text(what: str, lines: dict[str, str]) -> str:
    head = f"# {what}\n# Made by `make lock`; install with `pip install --no-deps -r`.\n"
    return head + "".join(f"{line}\n" for line in lines.values())


def resolve(wanted: Iterable[str], index: str | None) -> dict[str, Any]:
    """The resolution by pip of `wanted` from its configured sources, and `index` if given.

    Raises:
        LockError: if pip finds none.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    command += ["--only-binary", ":all:", "--no-binary", ",".join(BUILT), "--report", "-"]
    if index:
        command += ["--extra-index-url", index]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LockError(done.stderr.strip())
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def resolve_all(wanted: Roots, torch_index: str) -> Packages:
    """Resolve until nothing that any environment needs is missing.

    Raises:
        LockError: if pip finds no resolution, with and without torch's own index, or it does not settle.
    """
    everything = [*wanted.cpu, *wanted.dev]
    index: str | None = None
    for _ in range(MAX_ROUNDS):
        print(f"resolving {len(everything)} requirements ...", flush=True)
        try:
            known = packages(resolve(everything, index))
        except LockError as error:
            if index:
                raise
            print(f"{error}\ntrying again with {torch_index}", file=sys.stderr)
            index = torch_index
            continue
        more = missing(everything, known)
        if not more:
            return known
        everything += more
    raise LockError(f"no complete resolution after {MAX_ROUNDS} rounds")


def main() -> int:
    """Write the locks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--torch-index", required=True, help="where torch's CPU build is, if pip's sources lack it"
    )
    arguments = parser.parse_args()
    wanted = roots(tomllib.loads((ROOT / "pyproject.toml").read_text()))
    try:
        known = resolve_all(wanted, arguments.torch_index)
        texts = files(wanted, known)
    except LockError as error:
        print(f"lock: {error}", file=sys.stderr)
        return 1
    for name, text in texts.items():
        (ROOT / "requirements" / name).write_text(text)
        print(f"requirements/{name}: {text.count('==')} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
