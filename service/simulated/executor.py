"""The executor that vLLM is told to use: its own single-process one, around a simulated device.

Named by `--distributed-executor-backend coxswain.service.simulated.SimulatedExecutor`; constructed by EngineCore.
"""

import os

from vllm.v1.executor.uniproc_executor import UniProcExecutor

from coxswain.service.config import SettingRefusedError
from coxswain.service.simulated import cpu_hooks, offload
from coxswain.service.simulated.device import SimulatedDevice
from coxswain.service.simulated.settings import SimSettings


class SimulatedExecutor(UniProcExecutor):
    """vLLM's executor of one worker in the engine's process, where the worker is a simulated device.

    Its futures sleep until the device's time (`UniProcExecutor` waits in `result()`), so no thread is needed.

    Raises:
        SettingRefusedError: for a setting with a bad value, or a feature that the device does not simulate.
    """

    def _init_executor(self) -> None:
        config = self.vllm_config
        not_simulated = {
            "drafts of this method (ngram and ngram_gpu are there)": config.speculative_config is not None
            and not config.speculative_config.use_ngram(),
            "pooling models": config.model_config.runner_type == "pooling",
            "tensor and pipeline parallelism": config.parallel_config.world_size > 1,
        }
        asked = [name for name, used in not_simulated.items() if used]
        asked += filter(None, [offload.obstacle(config)])
        if asked:
            raise SettingRefusedError(f"the simulated device has no {', '.join(asked)}: leave it out")
        self.driver_worker = SimulatedDevice(config, SimSettings.from_env(os.environ))


cpu_hooks.install(SimulatedExecutor)
