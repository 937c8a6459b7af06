"""The simulated device: a vLLM executor without a model, for laptops, policy work and CI.

Lives here: what stands in for the model runner. Pure parts: `roofline` (how long a step takes), `tokens` (what
a request says), `runner` (what one step does), `checker` and `kv` (whether a scheduler obeys the model runner's
protocol). Shells: `device` (what vLLM calls), `executor`, `cpu_hooks`. Everything else is vLLM's own: EngineCore,
scheduler, KV manager, HTTP server. Used as `cox worker MODEL --device simulated`; see docs/simulated.md.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coxswain.service.simulated.executor import SimulatedExecutor

__all__ = ["SimulatedExecutor"]


def __getattr__(name: str) -> Any:
    # On first use: the pure parts work without vLLM.
    if name == "SimulatedExecutor":
        from coxswain.service.simulated.executor import SimulatedExecutor

        return SimulatedExecutor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
