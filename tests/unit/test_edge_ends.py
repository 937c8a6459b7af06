"""A server that was told to end: the HTTP edge sends new requests elsewhere by itself, whether or not NATS is there."""

import inspect
import weakref
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from coxswain.service.edge import hook as edge_hook
from coxswain.service.edge.asgi import EdgeMiddleware
from coxswain.service.edge.core import Edge, EdgeSettings


class Server:
    """As much of vLLM's application as the edge looks at; `shutdown` as `MPClient` begins its own."""

    def __init__(self) -> None:
        self._finalizer = weakref.finalize(self, lambda: None)
        self.state = SimpleNamespace(engine_client=SimpleNamespace(engine_core=self))
        self.asked: list[str] = []

    def shutdown(self) -> None:
        """Begin to end."""
        self._finalizer.detach()

    async def __call__(self, scope: Any, _receive: Any, send: Any) -> None:
        """Answer."""
        self.asked.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


async def test_what_asks_an_engine_is_refused_once_the_server_ends() -> None:
    """503 with Retry-After and an id of ours; probes and listings pass, and before it everything did."""
    server = Server()
    inner = EdgeMiddleware(
        server, Edge(EdgeSettings.from_env({"COX_IDENTITY_KEY": "ab" * 32})), ends=edge_hook.ends
    )

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await inner({**scope, "app": server}, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://w") as client:
        assert (await client.post("/v1/completions")).status_code == 200
        server.shutdown()
        answer = await client.post("/v1/completions")
        assert answer.status_code == 503
        assert "shutting down" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"]
        assert answer.headers["x-request-id"].startswith("cox.")
        for path in ("/health", "/v1/models"):
            assert (await client.get(path)).status_code == 200
        assert (await client.get("/ready")).status_code == 503
    assert server.asked == ["/v1/completions", "/health", "/v1/models"]


@pytest.mark.parametrize(
    "app", [None, SimpleNamespace(), SimpleNamespace(state=SimpleNamespace(engine_client=None))]
)
def test_a_server_that_is_none_of_ours_is_not_said_to_end(app: Any) -> None:
    """Another application, or one without an engine: nobody is refused for what is not there."""
    assert not edge_hook.ends(app)


@pytest.mark.vllm
def test_vllm_ends_as_we_think() -> None:
    """`MPClient.shutdown` detaches its finalizer before it waits for the engine; the server's state has the client."""
    from vllm.entrypoints.launchers.api_server import app_state
    from vllm.v1.engine.core_client import MPClient

    source = inspect.getsource(MPClient.shutdown)
    assert 0 < source.index("self._finalizer.detach()") < source.index("engine_manager.shutdown(")
    assert "state.engine_client = engine_client" in inspect.getsource(app_state)
