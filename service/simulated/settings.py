"""Settings of the simulated device, read once from the environment.

Pure: reads a mapping. `cox worker --device simulated` writes these variables, the engine process reads them.
"""

from collections.abc import Mapping
from typing import Final

import msgspec

from coxswain.service.config import SettingRefusedError
from coxswain.service.simulated.roofline import PRESETS, Preset

PRESET_VARIABLE: Final = "COX_SIM_PRESET"
CHECK_VARIABLE: Final = "COX_SIM_CHECK"
DEFAULT_PRESET: Final = "h200-8b"
EXECUTOR: Final = "coxswain.service.simulated.SimulatedExecutor"


class SimSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the simulated device needs to know."""

    preset: Preset
    check: bool
    """Whether every SchedulerOutput is checked: some 20 µs per request and step at 500 tokens of context."""

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "SimSettings":
        """Read `COX_SIM_PRESET` (a name of `PRESETS`) and `COX_SIM_CHECK` (0 or 1).

        Raises:
            SettingRefusedError: for a value that is not allowed.
        """
        name = env.get(PRESET_VARIABLE) or DEFAULT_PRESET
        if name not in PRESETS:
            raise SettingRefusedError(
                f"{PRESET_VARIABLE} is {name!r}: one of {', '.join(PRESETS)} is allowed"
            )
        check = env.get(CHECK_VARIABLE) or "0"
        if check not in {"0", "1"}:
            raise SettingRefusedError(f"{CHECK_VARIABLE} is {check!r}: 0 or 1 is allowed")
        return cls(preset=PRESETS[name], check=check == "1")
