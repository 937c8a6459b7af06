"""Who connects, as the edge sees it behind the server that vLLM uses: X-Forwarded-For decides nothing.

The real middleware under a real uvicorn, in a process of its own, since importing it reads the environment; vLLM's
modules that it hooks are empty ones.
"""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

SECRET = "5e" * 32
SERVE = """
import socket, sys, types
for name in ("vllm", "vllm.v1", "vllm.v1.engine", "vllm.v1.engine.async_llm", "vllm.v1.engine.input_processor"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["vllm.v1.engine.async_llm"].AsyncLLM = object
hooked = {"assign_request_id": staticmethod(id), "process_inputs": id}
sys.modules[name].InputProcessor = type("InputProcessor", (), hooked)

from coxswain.service import request_id
from coxswain.service.identity import Identity
import uvicorn

async def tell_tenant(scope, receive, send):
    name = dict(scope["headers"])[b"x-request-id"].decode()
    tenant = request_id.parse(bytes.fromhex(sys.argv[1]), f"cmpl-{name}-0-1a2b3c4d").tenant
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": tenant.encode()})

listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(Identity(tell_tenant), log_level="error", lifespan="off")).run([listening])
"""


@pytest.mark.parametrize(
    ("trusted", "tenant"), [(None, "acme"), ("10.0.0.0/8", "default")], ids=["loopback", "elsewhere"]
)
def test_forwarded_address_neither_hides_a_proxy_nor_makes_one(trusted: str | None, tenant: str) -> None:
    """Whatever X-Forwarded-For says, the tenant header is believed of who connects, and of nobody else."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("COX_", "FORWARDED"))}
    env |= {"COX_IDENTITY_KEY": SECRET, "COX_TENANT_HEADER": "X-Tenant"}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path)} | ({"COX_TRUSTED_PROXIES": trusted} if trusted else {})
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, SECRET], env=env, stdout=subprocess.PIPE, cwd=Path(__file__).parent
    ) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            for forwarded in ({}, {"X-Forwarded-For": "203.0.113.9"}, {"X-Forwarded-For": "10.9.9.9"}):
                reply = httpx.get(
                    f"http://127.0.0.1:{port}/v1/models",
                    headers={"X-Tenant": "acme", **forwarded},
                    timeout=30,
                )
                assert reply.text == tenant, forwarded
        finally:
            server.kill()
