"""Devices of the laboratory: the simulated device's presets, and one fitted to VTC's published throughputs. Pure."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import msgspec

from coxswain.service.simulated.roofline import PRESETS, Preset, Work


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """How long a step takes."""

    preset: Preset
    pass_s: float = 0.0
    """What a prefill that runs as a pass of its own costs beside the device's work: the host's part of it."""
    pace: float = 1.0
    """How much longer every step takes than that: no two runs of a real device take the same time."""

    def step_s(self, prefill: Work, decode: Work, *, apart: bool) -> float:
        """Time of a step that does both; `apart` runs the prefill as a pass before the decode."""
        if apart and prefill.prefill_tokens:
            alone = self.pass_s + self.preset.step_s(prefill)
            return self.pace * (alone + self.preset.step_s(decode) if decode.decode_tokens else alone)
        both = Work(*(one + other for one, other in zip(prefill, decode, strict=True)))
        return self.pace * self.preset.step_s(both)


_A10G: Final = PRESETS["a10g-7b"]
DEVICES: Final[Mapping[str, Device]] = MappingProxyType(
    {
        # That preset as S-LoRA drove it: its Python router adds to every step, and a prefill is a pass with a batch
        # to build, send and merge. Three numbers are fitted to `published` (docs/lab.md says how well): 4.5 ms of
        # host time per step, 60 ms per prefill pass, 0.8 of the FLOP/s.
        "vtc-a10g": Device(
            preset=msgspec.structs.replace(_A10G, overhead_s=4.5e-3, flops=0.8 * 70e12), pass_s=60e-3
        ),
        # Slots that run out long before KV does: whoever is held keeps all of it.
        "ten-slots": Device(preset=msgspec.structs.replace(_A10G, max_num_seqs=10, kv_tokens=100_000)),
        **{name: Device(preset=preset) for name, preset in PRESETS.items()},
    }
)
"""By name."""
