"""The steered scheduler: pure cores behind `core`, and the vLLM shell around them: `steered`, `mechanism` and `compat`.

`SteeredScheduler` is what `--scheduler-cls` names. It is imported on first use, so that the pure cores can be
used and tested without vLLM.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coxswain.service.scheduler.steered import SteeredScheduler

__all__ = ["SteeredScheduler"]


def __getattr__(name: str) -> Any:
    if name == "SteeredScheduler":
        from coxswain.service.scheduler.steered import SteeredScheduler

        return SteeredScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
