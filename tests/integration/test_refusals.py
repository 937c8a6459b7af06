"""What the scheduler refuses to start with, and says why: on vLLM's real configuration."""

from unittest.mock import patch

import pytest

from coxswain.lab.modelless import make_scheduler, vllm_config
from coxswain.service.config import SettingRefusedError

pytestmark = pytest.mark.vllm


def test_a_pipeline_without_asynchronous_scheduling_is_refused() -> None:
    """Tokens were others there once requests had lost their KV; with asynchronous scheduling it is steered."""
    from coxswain.service.scheduler import SteeredScheduler, compat

    config = vllm_config()
    config.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(SettingRefusedError, match="asynchronous scheduling only"):
        make_scheduler(SteeredScheduler, config)
    config.scheduler_config.async_scheduling = True
    compat.check_mode(config)
    config.scheduler_config.async_scheduling, config.model_config.runner_type = False, "pooling"
    compat.check_mode(config)


def test_an_unknown_vllm_is_refused_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text says which versions were tested and how to try another; one that is named starts."""
    from coxswain.service.scheduler import SteeredScheduler
    from coxswain.service.scheduler.compat import UnknownVllmError

    monkeypatch.delenv("COX_NATS_URL", raising=False)
    with patch("vllm.__version__", "0.99.1+cpu"):
        monkeypatch.setenv("COX_ALLOW_VLLM", "0.99.0")
        with pytest.raises(UnknownVllmError, match=r"0\.99\.1 .*0\.32\.0.*COX_ALLOW_VLLM"):
            make_scheduler(SteeredScheduler, vllm_config())
        monkeypatch.setenv("COX_ALLOW_VLLM", "0.99.1")
        make_scheduler(SteeredScheduler, vllm_config()).shutdown()
