"""The HTTP edge, driven through ASGI: who is believed, what is refused, what vLLM gets to see."""

import asyncio
import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
from ulid import ULID

from coxswain.common.logs import get_logger
from coxswain.service import keys, request_id
from coxswain.service.config import SettingRefusedError
from coxswain.service.edge import hook as edge_hook
from coxswain.service.edge.asgi import EdgeMiddleware, ticket
from coxswain.service.edge.core import Edge, EdgeSettings, Ticket
from coxswain.service.keys import Grant, Keyring
from coxswain.service.request_id import Claim

SECRET = "ab" * 32
KEY = bytes.fromhex(SECRET)
ENV = {"COX_IDENTITY_KEY": SECRET}
CHAT = "/v1/chat/completions"


class Inside:
    """What stands where vLLM would: records what it sees, answers as vLLM does with its own X-Request-Id."""

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.ticket: Ticket | None = None
        self.later: asyncio.Task[Ticket | None] | None = None
        self.scopes: list[str] = []

    async def __call__(self, scope: Any, _receive: Any, send: Any) -> None:
        """Handle one connection."""
        self.scopes.append(scope["type"])
        self.headers = scope.get("headers", [])
        self.ticket = ticket.get()
        if scope["type"] != "http":
            return

        async def background() -> Ticket | None:
            await asyncio.sleep(0.01)
            return ticket.get()

        self.later = asyncio.create_task(background())
        headers = [(b"X-Request-Id", b"vllm's own"), (b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    def header(self, name: str) -> list[str]:
        """The values of a header as vLLM sees it."""
        return [value.decode() for found, value in self.headers if found == name.encode()]

    def identity(self) -> Claim | None:
        """Who vLLM's id says is asking, if it proves that."""
        (public,) = self.header("x-request-id")
        found = request_id.parse(KEY, f"chatcmpl-{public}-1a2b3c4d")
        return None if found.tenant is None else found


class Rig:
    """The edge around `Inside`, with a client."""

    def __init__(self, env: dict[str, str], peer: str = "127.0.0.1", ring: Keyring | None = None) -> None:
        self.inside = Inside()
        self.app = EdgeMiddleware(self.inside, Edge(EdgeSettings.from_env(ENV | env), ring), ring)
        self.peer = peer

    async def post(self, headers: Any = None, path: str = CHAT, method: str = "POST") -> httpx.Response:
        """Send one request."""
        transport = httpx.ASGITransport(self.app, client=(self.peer, 40_000))
        async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
            return await client.request(method, path, headers=headers)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the keys file will be."""
    return tmp_path / "keys.json"


def with_key(file: Path, grant: Grant) -> tuple[Rig, dict[str, str]]:
    """A rig that asks for keys, and the headers with one."""
    key = keys.add(file, grant, now=1.0)
    ring = Keyring(file, get_logger(io.StringIO()))
    return Rig({"COX_KEYS": str(file)}, ring=ring), {"authorization": f"Bearer {key}"}


async def test_without_configuration_everybody_is_default() -> None:
    """With neither keys nor a tenant header, requests pass as tenant `default`, with a fresh id."""
    rig = Rig({})
    reply = await rig.post({"x-tenant": "acme"})
    assert reply.status_code == 200
    who = rig.inside.identity()
    assert who is not None
    assert who[:2] == ("default", "")
    assert reply.headers.get_list("x-request-id") == [who.request]
    again = await rig.post()
    assert again.headers["x-request-id"] != reply.headers["x-request-id"]


async def test_clients_own_id_is_repeated_but_not_used() -> None:
    """The client's X-Request-Id comes back as X-Client-Request-Id, bounded, and never reaches vLLM."""
    rig = Rig({})
    forged = request_id.make(b"x" * 32, "acme", "", str(ULID()))
    reply = await rig.post([("x-request-id", forged), ("x-request-id", "second")])
    assert reply.headers["x-client-request-id"] == forged
    assert rig.inside.header("x-request-id") == [reply.headers["x-request-id"]]
    assert forged not in reply.headers["x-request-id"]
    reply = await rig.post([(b"x-request-id", "é".encode() + b"y" * 500)])
    assert reply.headers["x-client-request-id"] == "y" * len(reply.headers["x-client-request-id"])
    assert len(reply.headers["x-client-request-id"]) <= 128
    assert "x-client-request-id" not in (await rig.post()).headers


@pytest.mark.parametrize("style", ["Bearer {}", "bearer {}", "x-api-key"])
async def test_key_names_the_tenant(file: Path, style: str) -> None:
    """A key in either header makes the request its tenant's, whatever else the client sends."""
    key = keys.add(file, Grant(tenant="acme, Ltd. ☃", class_="gold"), now=1.0)
    rig = Rig({"COX_KEYS": str(file)}, ring=Keyring(file))
    header = {"x-api-key": key} if style == "x-api-key" else {"authorization": style.format(key)}
    assert (await rig.post({**header, "x-tenant": "other"})).status_code == 200
    who = rig.inside.identity()
    assert who is not None
    assert who[:2] == ("acme, Ltd. ☃", "gold")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer cox-sk-1-2"},
        {"authorization": "Basic YTpi"},
        {"x-api-key": "no"},
        [(b"authorization", b"Bearer \xff\xfe")],
    ],
)
async def test_no_known_key_is_401(file: Path, headers: Any) -> None:
    """Without a known key the answer is an OpenAI-style 401 with a request id, and vLLM sees nothing."""
    rig, _ = with_key(file, Grant(tenant="acme"))
    reply = await rig.post(headers)
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.headers["x-request-id"].startswith("cox.default.")
    error = reply.json()["error"]
    assert (error["code"], error["type"], error["param"]) == (401, "AuthenticationError", None)
    assert "API key" in error["message"]
    assert rig.inside.scopes == []


async def test_revoked_key_is_refused_while_running(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key revoked in the file is refused at the next look, without a restart."""
    rig, key = with_key(file, Grant(tenant="acme"))
    clock = [1000.0]
    monkeypatch.setattr("coxswain.service.edge.asgi.time", SimpleNamespace(monotonic=lambda: clock[0]))
    assert (await rig.post(key)).status_code == 200
    keys.revoke(file, next(iter(keys.load(file).values())).id)
    clock[0] += 1.5
    assert (await rig.post(key)).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/metrics", "/metrics/"])
async def test_probes_stay_open(file: Path, path: str) -> None:
    """Probes need no key and pass untouched."""
    rig, _ = with_key(file, Grant(tenant="acme"))
    reply = await rig.post({"x-request-id": "mine"}, path, "GET")
    assert reply.status_code == 200
    assert rig.inside.header("x-request-id") == ["mine"]
    assert rig.inside.ticket is None


async def test_preflight_stays_open(file: Path) -> None:
    """A browser's OPTIONS carries no key and passes."""
    rig, _ = with_key(file, Grant(tenant="acme"))
    assert (await rig.post(method="OPTIONS")).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/pause",
        "/sleep",
        "/collective_rpc",
        "/docs",
        "/",
        "/v1/load_lora_adapter",
        "/inference/v1/abort_requests",
    ],
)
async def test_administration_needs_an_admin_key(file: Path, path: str) -> None:
    """A tenant's key opens the serving API only; one with `admin` opens the rest too."""
    rig, tenant = with_key(file, Grant(tenant="acme"))
    reply = await rig.post(tenant, path)
    assert reply.status_code == 403
    assert "admin" in reply.json()["error"]["message"]
    rig, admin = with_key(file, Grant(tenant="ops", admin=True))
    assert (await rig.post(admin, path)).status_code == 200


@pytest.mark.parametrize(
    "path", [CHAT, CHAT + "/", "/v1/models", "/v1/responses/resp_1/cancel", "/tokenize", "/v2/rerank"]
)
async def test_serving_api_needs_only_a_key(file: Path, path: str) -> None:
    """A tenant's key opens every path of the serving API."""
    rig, tenant = with_key(file, Grant(tenant="acme"))
    assert (await rig.post(tenant, path)).status_code == 200
    assert (await rig.post({}, path)).status_code == 401


@pytest.mark.parametrize(
    ("classes", "asked", "given"),
    [(None, "any", "any"), (("batch",), "batch", "batch"), (("batch",), "gold", "gold"), ((), None, "gold")],
)
async def test_class_within_the_bounds_is_given(
    file: Path, classes: tuple[str, ...] | None, asked: str | None, given: str
) -> None:
    """A class that the key allows, or its own, is taken; none asked for is the key's own."""
    rig, key = with_key(file, Grant(tenant="acme", class_="gold", classes=classes))
    assert (await rig.post(key | ({"x-cox-class": asked} if asked else {}))).status_code == 200
    who = rig.inside.identity()
    assert who is not None
    assert who.class_ == given
    assert rig.inside.header("x-cox-class") == []


async def test_class_beyond_the_bounds_is_403(file: Path) -> None:
    """A class that the key does not allow is refused with the ones that it does."""
    rig, key = with_key(file, Grant(tenant="acme", class_="gold", classes=("batch",)))
    reply = await rig.post(key | {"x-cox-class": "platinum"})
    assert reply.status_code == 403
    assert "allowed: batch, gold" in reply.json()["error"]["message"]


@pytest.mark.parametrize("name", ["", "UPPER", "a b", "a.b", "x" * 65, "all", "é"])
async def test_malformed_class_is_400(name: str) -> None:
    """What is not a class name is refused, whoever asks."""
    reply = await Rig({}).post([(b"x-cox-class", name.encode())])
    assert reply.status_code == 400
    assert "X-Cox-Class" in reply.json()["error"]["message"]


@pytest.mark.parametrize(("asked", "seen"), [("3", "3"), ("-7", "-5"), ("99", "5"), ("+4", "4")])
async def test_priority_is_clamped(file: Path, asked: str, seen: str) -> None:
    """The header's priority reaches vLLM once, inside the key's range."""
    rig, key = with_key(file, Grant(tenant="acme", priority_min=-5, priority_max=5))
    await rig.post(key | {"x-vllm-priority": asked})
    assert rig.inside.header("x-vllm-priority") == [seen]
    assert rig.inside.ticket is not None
    assert rig.inside.ticket[1:3] == (int(seen), int(seen)), (
        "where vLLM does not read it, our hook sees to it"
    )
    await rig.post(key)
    assert rig.inside.ticket[1:3] == (-5, 5)


@pytest.mark.parametrize(
    "text", ["", "high", "1.5", "1_0", "0x1", "2147483648", "-2147483649", "9" * 40, "٣"]
)
async def test_malformed_priority_is_400(text: str) -> None:
    """What is not a 32-bit number is refused, not guessed at."""
    reply = await Rig({}).post([(b"x-vllm-priority", text.encode())])
    assert reply.status_code == 400
    assert "X-Vllm-Priority" in reply.json()["error"]["message"]


async def test_doubled_header_is_400() -> None:
    """Two values of a header that decides something are refused: proxies disagree on which one counts."""
    reply = await Rig({}).post([("x-vllm-priority", "1"), ("x-vllm-priority", "-9")])
    assert reply.status_code == 400
    assert "twice" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("peer", "tenant"),
    [
        ("127.0.0.1", "acme ☃"),
        ("::1", "acme ☃"),
        ("::ffff:127.0.0.1", "acme ☃"),
        ("10.1.2.3", "default"),
        ("unknown", "default"),
    ],
)
async def test_tenant_header_is_believed_from_loopback_only(peer: str, tenant: str) -> None:
    """By default only this machine's proxies may say who asks; from others the header is dropped."""
    rig = Rig({"COX_TENANT_HEADER": "X-Tenant"}, peer=peer)
    await rig.post([(b"x-tenant", "acme ☃".encode())])
    who = rig.inside.identity()
    assert who is not None
    assert who.tenant == tenant
    assert rig.inside.header("x-tenant") == []


async def test_trusted_networks_are_configurable() -> None:
    """COX_TRUSTED_PROXIES replaces the default."""
    env = {"COX_TENANT_HEADER": "X-Tenant", "COX_TRUSTED_PROXIES": "10.0.0.0/8, fd00::/8"}
    for peer, tenant in (("10.9.9.9", "acme"), ("fd00::1", "acme"), ("127.0.0.1", "default")):
        rig = Rig(env, peer=peer)
        await rig.post({"x-tenant": "acme"})
        who = rig.inside.identity()
        assert who is not None
        assert who.tenant == tenant


async def test_proxy_speaks_without_a_key_others_need_one(file: Path) -> None:
    """With both configured, a trusted peer's header is enough; without the header even it needs a key."""
    keys.add(file, Grant(tenant="acme"), now=1.0)
    env = {"COX_TENANT_HEADER": "x-tenant", "COX_KEYS": str(file)}
    assert (await Rig(env, ring=Keyring(file)).post({"x-tenant": "t"})).status_code == 200
    assert (await Rig(env, ring=Keyring(file)).post()).status_code == 401
    assert (await Rig(env, "10.0.0.1", Keyring(file)).post({"x-tenant": "t"})).status_code == 401


@pytest.mark.parametrize("value", [b"", b"\xff", b"x" * 129, b"other"])
async def test_impossible_tenant_is_400(value: bytes) -> None:
    """A trusted header that names no possible tenant is refused, not mapped to another one."""
    reply = await Rig({"COX_TENANT_HEADER": "x-tenant"}).post([(b"x-tenant", value)])
    assert reply.status_code == 400


async def test_ticket_follows_background_work_and_ends_with_the_request() -> None:
    """Tasks that the request starts see its ticket after the response; nobody else does."""
    rig = Rig({})
    reply = await rig.post()
    assert rig.inside.later is not None
    held = await rig.inside.later
    assert held is not None
    assert held.request == reply.headers["x-request-id"]
    assert ticket.get() is None


async def test_lifespan_passes_untouched() -> None:
    """Server start and stop are none of the edge's business."""
    rig = Rig({})
    await rig.app({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert rig.inside.scopes == ["lifespan"]


async def test_websocket_needs_a_key_too(file: Path) -> None:
    """A websocket without a key is closed before it opens; with one it passes, named."""
    rig, key = with_key(file, Grant(tenant="acme"))
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": [], "client": ("127.0.0.1", 1)}
    await rig.app(scope, None, send)  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]
    scope["headers"] = [(b"authorization", key["authorization"].encode())]
    await rig.app(scope, None, send)  # type: ignore[arg-type]
    assert rig.inside.scopes == ["websocket"]
    assert rig.inside.ticket is not None


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"COX_IDENTITY_KEY": ""}, "VLLM_PLUGINS"),
        ({"COX_IDENTITY_KEY": "abc"}, "COX_IDENTITY_KEY"),
        ({"COX_TENANT_HEADER": "no header"}, "COX_TENANT_HEADER"),
        ({"COX_TENANT_HEADER": "x-tenant", "FORWARDED_ALLOW_IPS": "*"}, "FORWARDED_ALLOW_IPS"),
        ({"COX_TRUSTED_PROXIES": "10.0.0.0/33"}, "COX_TRUSTED_PROXIES"),
        ({"COX_TRUSTED_PROXIES": "everybody"}, "COX_TRUSTED_PROXIES"),
    ],
)
def test_bad_setting_is_refused_by_name(env: dict[str, str], named: str) -> None:
    """A setting that is not allowed stops the start with its name."""
    with pytest.raises(SettingRefusedError, match=named):
        EdgeSettings.from_env(ENV | env)


HELD = Ticket(request_id.make(KEY, "acme", "", str(ULID())), -5, 5)
OTHER = request_id.make(KEY, "victim", "gold", str(ULID()))


@pytest.mark.parametrize(
    "internal",
    [
        f"chatcmpl-{HELD.request}-1a2b3c4d",
        f"cmpl-{HELD.request}-0-1a2b3c4d",
        "resp_0123456789abcdef0123456789abcdef_0-1a2b3c4d",
        f"resp_{OTHER}_0-1a2b3c4d",
        f"{HELD.request}{OTHER}-1a2b3c4d",
        OTHER,
        "",
    ],
    ids=["chat", "completion", "response", "response-of-another", "two", "another", "nothing"],
)
def test_hook_makes_every_request_the_tickets(internal: str) -> None:
    """Whatever id vLLM or the body made, the scheduler finds the ticket's identity in it."""
    request = SimpleNamespace(request_id=internal, external_req_id=internal, priority=0)
    edge_hook.apply(request, HELD)
    found = request_id.parse(KEY, request.request_id)
    assert found.request == HELD.request
    assert found.tenant == "acme"
    assert request.external_req_id == internal
    assert request.request_id.endswith("-1a2b3c4d") == internal.endswith("-1a2b3c4d")


def test_hook_bounds_every_turn_of_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn is given its session's id, not one of its own, and priority 0: not more than the key may use."""

    class InputProcessor:
        """vLLM's, as far as it is hooked."""

        def process_inputs(self, request_id: str, *, priority: int = 0) -> SimpleNamespace:
            """What becomes of a turn."""
            return SimpleNamespace(request_id=request_id, priority=priority)

        @staticmethod
        def assign_request_id(request: SimpleNamespace) -> None:
            """A name of its own."""

    class AsyncLLM:
        """vLLM's before it refused anything itself."""

    for name in (
        "vllm",
        "vllm.v1",
        *(f"vllm.v1.engine{part}" for part in ("", ".async_llm", ".input_processor")),
    ):
        module: Any = ModuleType(name)
        module.InputProcessor, module.AsyncLLM = InputProcessor, AsyncLLM
        monkeypatch.setitem(sys.modules, name, module)
    edge_hook.install()
    edge_hook.install()
    assert InputProcessor().process_inputs("a").priority == 0, "nobody's request"
    token = ticket.set(HELD._replace(priority_min=3))
    try:
        assert [InputProcessor().process_inputs("a", priority=p).priority for p in (0, 4, 9)] == [3, 4, 5]
    finally:
        ticket.reset(token)


@pytest.mark.parametrize(("body", "bounded"), [(0, 0), (-(2**31), -5), (10**30, 5)])
def test_hook_clamps_the_bodys_priority(body: int, bounded: int) -> None:
    """A priority in the body is bounded like one in the header."""
    request = SimpleNamespace(request_id="chatcmpl-x-1a2b3c4d", priority=body)
    edge_hook.apply(request, HELD)
    assert request.priority == bounded
