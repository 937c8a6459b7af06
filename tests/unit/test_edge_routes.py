"""Every path of this vLLM's servers, as the edge rules it: none is new to it, whatever a model can do.

A new version's new paths fail here first. Under `/v1/` one that is not listed counts as work for an engine; elsewhere
it needs a key with `admin`.
"""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from coxswain.service import keys
from coxswain.service.edge.asgi import EdgeMiddleware
from coxswain.service.edge.core import Edge, EdgeSettings, is_api
from coxswain.service.keys import Grant, Keyring

pytestmark = pytest.mark.vllm

WORK = """
    /classify /cohere/v2/chat /generative_scoring /inference/v1/generate /invocations /pooling /rerank /score
    /v1/audio/transcriptions /v1/audio/translations /v1/chat/completions /v1/chat/completions/batch /v1/completions
    /v1/embeddings /v1/messages /v1/rerank /v1/responses /v1/score /v1/systemone /v2/embed /v2/rerank
"""
"""What an engine is asked for: capped, and refused while it drains."""
FRONT = """
    /detokenize /tokenize /v1/chat/completions/derender /v1/chat/completions/render /v1/completions/derender
    /v1/completions/render /v1/messages/count_tokens /v1/messages/render /v1/models /v1/realtime /v1/responses/render
    /v1/responses/{response_id} /v1/responses/{response_id}/cancel
"""
"""What any key opens, and vLLM's front end answers (`/v1/realtime`: whose opening is refused)."""
OPEN = "/health /metrics /ping /version"
ADMIN = """
    /abort_requests /collective_rpc /fault_tolerance/apply /fault_tolerance/status /finish_weight_update
    /get_world_size /inference/v1/abort_requests /init_weight_transfer_engine /is_paused /is_scaling_elastic_ep
    /is_sleeping /kv_event_sources /load /pause /release_kv_cache_memory /reset_encoder_cache /reset_mm_cache
    /reset_prefix_cache /resume /scale_elastic_ep /server_info /shutdown_weight_transfer_engine /sleep
    /start_draft_weight_update /start_profile /start_weight_update /stop_profile /update_weight_version
    /update_weights /v1/load_lora_adapter /v1/unload_lora_adapter /wake_up /weight_checker /weight_info
    /tokenizer_info /docs /docs/oauth2-redirect /openapi.json /redoc
"""
"""What a key with `admin` opens: vLLM's administration, all of its development mode, the documentation."""
OPTIONAL = {"/cohere/v2/chat", "/tokenizer_info"}
"""There with a package or a flag that are not here."""


class AnyModel:
    """A model's configuration as far as routes depend on it: one that ranks, too."""

    is_cross_encoder = True
    hf_config = SimpleNamespace(num_labels=1)

    def get_pooling_task(self, _tasks: tuple[str, ...]) -> str:
        """What it pools for."""
        return "classify"

    def __getattr__(self, name: str) -> Any:
        return True


@pytest.fixture(scope="module")
def routes() -> list[tuple[str, str]]:
    """(method, path) of all that vLLM can serve, its development mode and all optional parts included."""
    from fastapi import FastAPI
    from vllm import envs
    from vllm.config import ProfilerConfig
    from vllm.entrypoints.launchers.api_server.routers import register_api_routers
    from vllm.tasks import POOLING_TASKS

    app = FastAPI()
    app.state.args = Namespace(
        tokens_only=True, enable_scale_out=True, enable_fault_tolerance=True,
        profiler_config=ProfilerConfig(profiler="torch", torch_profiler_dir="/nowhere"),
    )  # fmt: skip
    tasks: Any = ("generate", "render", "transcription", "realtime", *POOLING_TASKS)
    model: Any = AnyModel()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            patch.setitem(vars(envs), name, True)  # an engine of another test has vLLM's environment cached
        register_api_routers(app.state.args, app, tasks, model)
    return [
        (method, route.path)  # type: ignore[attr-defined]
        for route in app.routes
        for method in sorted(getattr(route, "methods", None) or {"GET"})
    ]


def ruling(method: str, path: str) -> str:
    """What the edge makes of it."""
    if Edge.is_open(method, path):
        return "open"
    if Edge.asks_engine(method, path):
        return "work"
    return "front" if is_api(path) else "admin"


def test_every_path_is_ruled_as_documented(routes: list[tuple[str, str]]) -> None:
    """Work is capped, what the front end answers is not, administration needs `admin`, probes are open to all."""
    seen: dict[str, set[str]] = {}
    for method, path in routes:
        seen.setdefault(ruling(method, path), set()).add(path)
    wanted = {"work": WORK, "front": FRONT, "open": OPEN, "admin": ADMIN}
    for kind, paths in wanted.items():
        assert seen[kind] - set(paths.split()) == set(), f"new, and ruled as {kind}"
        assert set(paths.split()) - seen[kind] <= OPTIONAL, f"gone, or not ruled as {kind}"


@pytest.mark.parametrize("root", ["", "/api", "/api/", "/", "/v", "/v1"])
async def test_a_root_path_changes_no_ruling(root: str, tmp_path: Path) -> None:
    """With any `--root-path` what FastAPI serves is ruled as the route that it found: work, probes and the rest."""
    from fastapi import FastAPI

    def ok() -> None:
        pass

    key = {"authorization": f"Bearer {keys.add(tmp_path / 'keys', Grant(tenant='acme'), now=0.0)}"}
    ring = Keyring(tmp_path / "keys")
    bare, edge = FastAPI(root_path=root), FastAPI(root_path=root)
    for app in (bare, edge):
        for path in ("/v1/completions", "/v1/models", "/health", "/pause"):
            app.add_api_route(path, ok, methods=["GET", "POST"])
    edge.add_middleware(EdgeMiddleware, edge=Edge(EdgeSettings(b"k" * 32), ring), keyring=ring)

    async def status(app: Any, path: str, headers: dict[str, str]) -> int:
        method = "GET" if path.endswith(("health", "/models")) else "POST"
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return (await client.request(method, path, headers=headers)).status_code

    served = 0
    for prefix in ("", root.rstrip("/")):
        for path, known, unknown in (
            ("/v1/completions", 200, 401),
            ("/v1/models", 200, 401),
            ("/health", 200, 200),
            ("/pause", 403, 401),
        ):
            if await status(bare, prefix + path, {}) == 200:
                served += 1
                assert await status(edge, prefix + path, key) == known
                assert await status(edge, prefix + path, {}) == unknown
    assert served >= 4
    alike = f"{root.rstrip('/') or '/x'}health"
    assert (await status(edge, alike, key), await status(edge, alike, {})) == (403, 401)
