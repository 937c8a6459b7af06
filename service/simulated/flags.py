"""The launcher's flags for the simulated device, turned into vLLM's arguments and environment.

Pure. Called by `service/worker.py`, which removes these flags before vLLM sees them.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Final

from coxswain.service.simulated.roofline import PRESETS, Preset
from coxswain.service.simulated.settings import CHECK_VARIABLE, EXECUTOR, PRESET_VARIABLE, SimSettings

DEVICE: Final = "simulated"
BLOCK: Final = 16
"""Tokens per KV block: vLLM's default on GPUs."""
RUNNER_VARIABLE: Final = "VLLM_USE_V2_MODEL_RUNNER"
RUNNERS: Final = {"v1": "0", "v2": "1"}

HELP: Final = """\
simulated device (no GPU, no weights; MODEL: any folder with config.json and a
tokenizer):
  --device simulated  run the real engine on a device that only takes time: see
                      docs/simulated.md
  --sim-preset NAME   which one: h200-8b (default), a10g-7b, cpu, instant
  --sim-runner v1|v2  the model runner's protocol that the scheduler speaks
                      (default: v2, as on GPUs)
  --sim-check         check every step against that protocol; what breaks it
                      kills the engine, which says why
"""


class FlagRefusedError(ValueError):
    """A flag of the simulated device has a value that is not allowed; the text says what is."""


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the flags to the launcher's own parser."""
    parser.add_argument("--device")
    parser.add_argument("--sim-preset")
    parser.add_argument("--sim-runner")
    parser.add_argument("--sim-check", action="store_true")


def preset(own: argparse.Namespace, env: Mapping[str, str]) -> Preset | None:
    """The preset asked for by flag, else in the environment; None if the device is a real one.

    Raises:
        FlagRefusedError: for an unknown preset or runner, or a `--sim-…` flag without `--device simulated`.
        SettingRefusedError: for a variable of the simulated device with a value that is not allowed.
    """
    if own.device != DEVICE:
        if own.sim_preset or own.sim_runner or own.sim_check:
            raise FlagRefusedError("--sim-preset, --sim-runner and --sim-check need --device simulated")
        return None
    if own.sim_runner not in {None, *RUNNERS}:
        raise FlagRefusedError(f"--sim-runner is {own.sim_runner!r}: v1 or v2 is allowed")
    if own.sim_preset not in {None, *PRESETS}:
        raise FlagRefusedError(f"--sim-preset is {own.sim_preset!r}: one of {', '.join(PRESETS)} is allowed")
    return SimSettings.from_env({**env, **environment(own, env)}).preset


def arguments(chosen: Preset, given: Callable[[str], bool]) -> list[str]:
    """What vLLM is told beside the user's own arguments; `given` says which options the user set.

    Raises:
        FlagRefusedError: if the user named an executor.
    """
    if given("distributed-executor-backend"):
        raise FlagRefusedError(
            "--device simulated is an executor of its own: leave out --distributed-executor-backend"
        )
    added = ["--distributed-executor-backend", EXECUTOR]
    if not given("block-size"):
        added += ["--block-size", str(BLOCK)]
    if not given("max-num-batched-tokens"):
        added += ["--max-num-batched-tokens", str(chosen.max_num_batched_tokens)]
    return added


def environment(own: argparse.Namespace, env: Mapping[str, str]) -> dict[str, str]:
    """Variables for the engine's process: what flags say, and defaults for what neither they nor `env` say."""
    said = {
        PRESET_VARIABLE: own.sim_preset,
        CHECK_VARIABLE: "1" if own.sim_check else None,
        RUNNER_VARIABLE: RUNNERS.get(own.sim_runner),
    }
    # vLLM's command line defaults to spawn: ten seconds more, to import torch a second time.
    defaults = {RUNNER_VARIABLE: RUNNERS["v2"], "VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    return {name: value for name, value in defaults.items() if not env.get(name)} | {
        name: value for name, value in said.items() if value is not None
    }
