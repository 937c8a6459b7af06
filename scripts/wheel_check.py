"""Check what a stranger gets from `pip install`: the wheel's content, and a control side without vLLM.

Builds the wheel and, by way of the sdist, a second one; both must hold exactly the files of the four
folders, under `coxswain/`. Then installs it with `requirements/control.lock` into a fresh environment and
uses it there. Called by `make wheel`.
"""

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
FOLDERS: Final = ("common", "schemas", "service", "control", "lab")

USE_IT: Final = """
import importlib, importlib.util, pkgutil, sys
import coxswain.control, coxswain.schemas

for package in (coxswain.schemas, coxswain.control):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.startswith(("coxswain.control.demo", "coxswain.control.top")):  # they have extras
            importlib.import_module(module.name)
mixed = sorted(name for name in sys.modules if name.startswith("coxswain.service"))
assert not mixed, f"control imports the engine side: {mixed}"
assert not any(name.startswith("coxswain.lab") for name in sys.modules), "control imports the lab"
for name in ("common", "control", "service", "schemas", "lab", "vllm", "torch"):
    assert importlib.util.find_spec(name) is None, f"{name} is importable next to an installed coxswain"
"""


class CheckError(Exception):
    """The package is not what it should be; the text says how."""


def expected() -> set[str]:
    """The files of the checkout that belong in the wheel, as named there."""
    found = {"coxswain/__init__.py", "coxswain/py.typed"}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found.add(f"coxswain/{path.relative_to(ROOT)}")
    return found


def check_content(wheel: Path) -> None:
    """Compare a wheel's files with the checkout's.

    Raises:
        CheckError: for a file too many, too few, or twice.
    """
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    if len(names) != len(set(names)):
        raise CheckError("a file is in the wheel twice")
    wanted = expected()
    if extra := sorted(set(names) - wanted):
        raise CheckError(f"files that do not belong in the wheel: {extra}")
    if lacking := sorted(wanted - set(names)):
        raise CheckError(f"files that the wheel lacks: {lacking}")


def build(source: Path, target: str, out: Path) -> Path:
    """Build `target` (wheel or sdist) of a source tree with the build backend that is installed here."""
    _run([sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)], source)
    (built,) = out.iterdir()
    return built


def build_both(work: Path) -> Path:
    """Build the wheel from the checkout and from its sdist, and return the latter's after checking both."""
    check_content(build(ROOT, "wheel", work / "direct"))
    sdist = build(ROOT, "sdist", work / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (source,) = (work / "unpacked").iterdir()
    wheel = build(source, "wheel", work / "from-sdist")
    check_content(wheel)
    return wheel


def use(wheel: Path, work: Path) -> None:
    """Install a wheel without vLLM and use the contract, the control side and the command line.

    Raises:
        CheckError: if `cox schema` prints something other than the committed schema.
    """
    home = work / "venv"
    venv.create(home)
    python, cox = home / "bin" / "python", home / "bin" / "cox"
    lock = ROOT / "requirements" / "control.lock"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    _run([*pip, "--no-deps", "--no-compile", "-r", str(lock), str(wheel)], work)
    _run([str(python), "-I", "-c", USE_IT], work)
    _run([str(cox), "--help"], work)
    if _run([str(cox), "schema"], work) != (ROOT / "docs" / "schema.json").read_text():
        raise CheckError("`cox schema` does not print docs/schema.json")


def _run(command: list[str], where: Path) -> str:
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> int:
    """Print the verdict; 1 if anything is wrong."""
    with tempfile.TemporaryDirectory(prefix="coxswain-wheel-") as folder:
        work = Path(folder)
        try:
            wheel = build_both(work)
            use(wheel, work)
        except CheckError as error:
            print(f"wheel: {error}", file=sys.stderr)
            return 1
        print(
            f"wheel: {wheel.name} holds {len(expected())} files, all under coxswain/, and works without vLLM"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
