"""What vLLM's CPU platform decides for CPU models, undone for an engine whose executor is the simulated one.

Called once, when `executor` is imported: vLLM resolves the executor's class (config/vllm.py:1545) before it asks
the platform (config/vllm.py:1993). No other engine is touched. Three decisions are undone (0.32.0):

* async scheduling off (platforms/cpu.py:331): the device overlaps steps, as a GPU does;
* `spawn` (platforms/cpu.py:409): nothing here owns OpenMP threads, and a fork saves importing torch again;
* model runner V2 needs Triton (config/vllm.py:3189): its kernels do, its protocol does not.
"""

import functools
import os
from typing import Any

import vllm.config.vllm as config_module
from vllm.platforms import current_platform

from coxswain.service.simulated.settings import EXECUTOR

_START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


def install(executor: type) -> None:
    """Make both hooks ask first whether the engine is simulated; `executor` is our executor's class."""
    if not current_platform.is_cpu():
        return  # CUDA's platform decides nothing of this

    def simulated(config: Any) -> bool:
        return config.parallel_config.distributed_executor_backend in {EXECUTOR, executor}

    platform = type(current_platform)
    update = platform.check_and_update_config

    @functools.wraps(update)
    def check_and_update_config(vllm_config: Any) -> None:
        wanted, method = vllm_config.scheduler_config.async_scheduling, os.environ.get(_START_METHOD)
        update(vllm_config)
        if simulated(vllm_config):
            vllm_config.scheduler_config.async_scheduling = wanted
            if method is None:
                os.environ.pop(_START_METHOD, None)
            else:
                os.environ[_START_METHOD] = method

    platform.check_and_update_config = staticmethod(check_and_update_config)
    validate = config_module.VllmConfig._validate_v2_model_runner  # noqa: SLF001

    @functools.wraps(validate)
    def validate_v2_model_runner(config: Any) -> None:
        if not simulated(config):
            validate(config)

    config_module.VllmConfig._validate_v2_model_runner = validate_v2_model_runner  # noqa: SLF001
