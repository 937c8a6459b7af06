"""`cox worker MODEL [any vllm serve argument]`: vLLM's own server with Coxswain and good defaults.

A convenience, nothing more: `plan` (pure) turns our arguments into vLLM's arguments and environment, `main`
runs vLLM's command line with them in this process. `--dry-run` prints the same as a command for any other
launcher. Called by the command line (`cox worker`, `python -m coxswain.service.worker`).
"""

import argparse
import importlib.metadata
import importlib.util
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from coxswain.common.connection import DEFAULT_URL, without_users
from coxswain.service import keys, plugin
from coxswain.service.config import SettingRefusedError, Settings
from coxswain.service.edge.core import EdgeSettings
from coxswain.service.simulated import flags as simulated

SCHEDULER: Final = "coxswain.service.scheduler.SteeredScheduler"
MIDDLEWARE: Final = "coxswain.service.identity.Identity"
PLUGIN: Final = "coxswain"

CPU_BLOCK: Final = 32
"""Tokens per KV block on CPU: vLLM's CPU attention takes multiples of 32."""
CPU_KV_GIB: Final = 1
"""KV cache on CPU; vLLM's own default is most of the machine's memory."""
SMALL_CORES: Final = 8
"""Below this many cores vLLM is not bound to some of them.

Its `auto` puts the engine on one core and leaves one to everything else; on two cores that was measured at a
quarter of the throughput, with tokens that arrive in lumps.
"""
MIN_SPARE: Final = 8
SHUTDOWN_S: Final = 60
"""What a worker that is told to end (SIGTERM) has for the requests that it took; it ends as soon as they have.

vLLM's own default is 0, which aborts them. Whoever runs us must wait for longer than this before it kills us: for
`TimeoutStopSec`, `terminationGracePeriodSeconds` and `stop_grace_period` see deploy/ and compose.yaml. With several
API servers vLLM's default stays: those leave their engine at once (0.32,
v1/engine/core_client.py, `MPClient.shutdown`), and their clients would wait so long for what never comes.
"""

HELP: Final = f"""\
usage: cox worker MODEL [options] [any `vllm serve` argument]

Serve MODEL with vLLM, steered from outside over NATS.

options:
  --name NAME    this worker's name in the fleet (COX_WORKER; default: the
                 host's name)
  --nats URL     where NATS is, several separated by commas (COX_NATS_URL;
                 default: nats://127.0.0.1:4222)
  --fleet NAME   the fleet to join (COX_FLEET; default: main)
  --keys FILE    API keys, which identify tenants (COX_KEYS; made with
                 `python -m coxswain.service.keys add`)
  --dry-run      print the command and environment instead of running it
  -h, --help     show this; --help=all shows vLLM's own arguments

{simulated.HELP}
Defaults, each only where you set nothing:
  --max-num-seqs N stays the number of requests that run at once: vLLM gets N
    as --max-num-active-seqs, and N plus spare slots (an eighth, at least 8) as
    --max-num-seqs, so that held requests take no slot from running ones.
    Give --max-num-active-seqs yourself to set both.
  On CPU: --block-size 32, 1 GiB of KV cache (VLLM_CPU_KVCACHE_SPACE), no core
    binding below 8 cores.
  --shutdown-timeout {SHUTDOWN_S}: on SIGTERM or Ctrl-C it refuses new requests, serves
    what it has to the last token, held or not, and exits; what takes longer
    than this many seconds is aborted. 0, vLLM's own default, aborts all. Not
    with several API servers (--data-parallel-size, --api-server-count), where
    vLLM cannot do it: use `cox drain` first.
  Usage statistics are off (VLLM_NO_USAGE_STATS).

Example: cox worker Qwen/Qwen3-0.6B --port 8000
"""


class WorkerRefusedError(ValueError):
    """The worker cannot start as asked; the text says why and what to do."""


class Launch(NamedTuple):
    """What to run."""

    argv: list[str]
    """vLLM's arguments, from `serve` on."""
    env: dict[str, str]
    """Variables to set beside those that are there."""
    dry_run: bool
    """Whether to print it only."""

    def text(self) -> str:
        """The launch as a shell command, passwords in addresses blanked."""
        shown = {
            name: without_users(value) if name == "COX_NATS_URL" else value
            for name, value in self.env.items()
        }
        lines = [f"{name}={shlex.quote(value)}" for name, value in shown.items()]
        return " \\\n".join([*lines, shlex.join(["vllm", *self.argv])]) + "\n"


def plan(
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    cpu: bool,
    cores: int,
    default_slots: Callable[[], int],
    config: Mapping[str, Any] | None = None,
) -> Launch:
    """Turn the user's arguments into a launch.

    Args:
        argv: what stood behind `cox worker`.
        env: the environment.
        cpu: whether this vLLM is the CPU build.
        cores: cores that this process may use.
        default_slots: asked only if the user set no number: vLLM's own default of `--max-num-seqs`.
        config: what vLLM's `--config` file says, names with dashes.

    Raises:
        WorkerRefusedError: for arguments that cannot work together.
        FlagRefusedError: for arguments of the simulated device that cannot.
        SettingRefusedError: for a name or address that is not allowed.
    """
    own, rest = _own_parser().parse_known_args(list(argv))
    if own.device not in {None, simulated.DEVICE}:
        rest += ["--device", own.device]  # vLLM says what it thinks of it
    config = config or {}
    given = _Given(rest, config)
    if not rest or (rest[0].startswith("-") and "model" not in given):
        raise WorkerRefusedError(
            "no model: write `cox worker MODEL …`, with its Hugging Face name or folder first"
        )
    if given.get("scheduler-cls") not in (None, SCHEDULER):
        raise WorkerRefusedError(
            "--scheduler-cls is Coxswain's own: use `vllm serve` to run another scheduler"
        )
    preset = simulated.preset(own, env)
    cpu = cpu and preset is None  # the defaults for CPUs are about computing on them
    added = _environment(own, env, cpu=cpu, cores=cores, given=given)
    if preset is not None:
        added |= simulated.environment(own, env)
    # Refused here, in words, not in a child half a minute later.
    Settings.from_env({**env, **added})
    serve = ["serve", *rest]
    if "scheduler-cls" not in given:
        serve += ["--scheduler-cls", SCHEDULER]
    if MIDDLEWARE not in rest:
        # Last: vLLM puts the last one outermost, so that nothing runs before we know who asks.
        serve += ["--middleware", MIDDLEWARE]
    if "shutdown-timeout" not in given and _has_one_server(given):
        serve += ["--shutdown-timeout", str(SHUTDOWN_S)]
    serve += _slots(given, default_slots if preset is None else lambda: preset.max_num_seqs)
    if preset is not None:
        serve += simulated.arguments(preset, given.__contains__)
    if cpu and "block-size" not in given:
        serve += ["--block-size", str(CPU_BLOCK)]
    return Launch(serve, added, own.dry_run)


def _own_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cox worker", usage="see --help", add_help=False, allow_abbrev=False
    )
    for name in ("--name", "--nats", "--fleet", "--keys"):
        parser.add_argument(name)
    parser.add_argument("--dry-run", action="store_true")
    simulated.declare(parser)
    return parser


SHORT: Final = {"-dp": "data-parallel-size", "-dpn": "data-parallel-rank", "-asc": "api-server-count"}
"""vLLM's short forms of options that we ask for."""


class _Given:
    """Which of vLLM's options the user gave, on the command line or in a `--config` file."""

    def __init__(self, rest: Sequence[str], config: Mapping[str, Any]) -> None:
        self._values: dict[str, str | None] = {
            name.replace("_", "-"): str(value) for name, value in config.items()
        }
        for position, argument in enumerate(rest):
            flag, equals, value = argument.partition("=")
            if flag in SHORT or flag.startswith("--"):
                name = SHORT.get(flag, flag[2:].replace("_", "-"))
                following = rest[position + 1] if position + 1 < len(rest) else None
                self._values[name] = value if equals else following

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str) -> str | None:
        return self._values.get(name)


def _environment(
    own: argparse.Namespace, env: Mapping[str, str], *, cpu: bool, cores: int, given: _Given
) -> dict[str, str]:
    wanted = {"COX_WORKER": own.name, "COX_NATS_URL": own.nats, "COX_FLEET": own.fleet}
    added = {name: value for name, value in wanted.items() if value is not None}
    if own.keys is not None:
        added["COX_KEYS"] = str(Path(own.keys).expanduser().absolute())
    defaults = {"COX_NATS_URL": DEFAULT_URL, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if cpu:
        if "kv-cache-memory-bytes" not in given and "gpu-memory-utilization" not in given:
            defaults["VLLM_CPU_KVCACHE_SPACE"] = str(CPU_KV_GIB)
        if cores < SMALL_CORES:
            defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    for name, value in defaults.items():
        if not env.get(name):
            added.setdefault(name, value)
    plugins = env.get("VLLM_PLUGINS")
    if plugins is not None and PLUGIN not in plugins.split(","):
        added["VLLM_PLUGINS"] = ",".join(filter(None, (plugins, PLUGIN)))
    return added


def _slots(given: _Given, default_slots: Callable[[], int]) -> list[str]:
    """Spare slots for holds, unless the user said how many may be active."""
    if "max-num-active-seqs" in given:
        return []
    text = given.get("max-num-seqs")
    if "max-num-seqs" in given and not (text and text.isascii() and text.isdigit()):
        return []  # vLLM says what is wrong with it
    active = int(text) if text else default_slots()
    return ["--max-num-active-seqs", str(active), "--max-num-seqs", str(active + max(MIN_SPARE, active // 8))]


def _has_one_server(given: _Given) -> bool:
    """Whether vLLM will run one API server, which waits for its requests; its default is one per balanced rank.

    As vLLM decides it (0.32, entrypoints/cli/serve.py, `ServeSubcommand.cmd`).
    """
    if "api-server-count" in given:
        return given.get("api-server-count") == "1"
    balanced_elsewhere = (
        "data-parallel-rank", "data-parallel-external-lb", "data-parallel-multi-port-external-lb", "headless"
    )  # fmt: skip
    return given.get("data-parallel-size") in {None, "1"} or any(name in given for name in balanced_elsewhere)


# The shell: what is installed, what the machine is, and running it.


def _is_cpu_build(env: Mapping[str, str]) -> bool:
    """As vLLM decides it (platforms/__init__.py, cpu_platform_plugin), without importing vLLM."""
    if env.get("VLLM_TARGET_DEVICE") == "cpu":
        return True
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True  # vllm-cpu


def _default_slots() -> int:
    """vLLM's own default of `--max-num-seqs` on this machine."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    slots = EngineArgs.get_batch_defaults(world_size=1)[1]
    return int(slots[UsageContext.OPENAI_API_SERVER])


def _read_config(argv: Sequence[str]) -> dict[str, Any]:
    """vLLM's `--config` file, or nothing if there is none or vLLM will refuse it."""
    path = _Given(argv, {}).get("config")
    if path is None:
        return {}
    import yaml  # type: ignore[import-untyped]

    try:
        found = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _answer_version() -> None:
    """Let vLLM's command line find its version where it is installed as `vllm-cpu`.

    `vllm.entrypoints.cli.main` (0.32.0) asks for the distribution `vllm` only, and dies without it.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version

        def answer(distribution_name: str) -> str:
            # The suffix is what vLLM itself looks for to know the CPU build.
            if distribution_name == "vllm":
                return f"{version('vllm-cpu')}+cpu"
            return version(distribution_name)

        importlib.metadata.version = answer


def run_vllm(launch: Launch) -> int:
    """Run vLLM's command line in this process; its exit code."""
    from vllm.entrypoints.cli.main import main as vllm_main

    _answer_version()
    sys.argv = ["vllm", *launch.argv]
    try:
        vllm_main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _check_files(env: Mapping[str, str]) -> None:
    if path := env.get("COX_KEYS"):
        keys.load(Path(path))
    EdgeSettings.from_env(env)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker until it is stopped.

    Returns:
        The exit code: vLLM's own, or 2 if arguments or settings are refused, or vLLM is not installed.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(HELP)
        return 0
    if importlib.util.find_spec("vllm") is None:
        sys.stderr.write(
            "error: vLLM is not installed here: pip install '.[gpu]' in a checkout of Coxswain, "
            "or '.[cpu]' for a machine without a GPU\n",
        )
        return 2
    if asked := [argument for argument in argv if argument.startswith("--help=")]:
        return run_vllm(Launch(["serve", asked[0]], {}, dry_run=False))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        launch = plan(
            argv,
            os.environ,
            cpu=_is_cpu_build(os.environ),
            cores=cores,
            default_slots=_default_slots,
            config=_read_config(argv),
        )
        if not launch.dry_run:
            os.environ.update(launch.env)
            plugin.load()
            _check_files(os.environ)
    except (
        WorkerRefusedError,
        SettingRefusedError,
        simulated.FlagRefusedError,
        keys.KeysRefusedError,
    ) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if launch.dry_run:
        sys.stdout.write(launch.text())
        return 0
    return run_vllm(launch)


if __name__ == "__main__":
    sys.exit(main())
