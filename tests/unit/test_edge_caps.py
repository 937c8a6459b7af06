"""Caps at the HTTP edge: who is let through, what is counted, and how far counts can be off."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coxswain.common.connection import Connection
from coxswain.schemas.commands import encode
from coxswain.schemas.status import ClassStatus, Frame, TenantStatus
from coxswain.service.bus.frames import split
from coxswain.service.config import SettingRefusedError, Settings
from coxswain.service.edge import hook as edge_hook
from coxswain.service.edge.asgi import EdgeMiddleware, ticket
from coxswain.service.edge.caps import LOST_S, STALE_S, EdgeCaps, Passage
from coxswain.service.edge.core import Edge, EdgeSettings, Refusal
from coxswain.service.edge.page import Message
from coxswain.service.edge.status import EdgeStatus, listener, workers_behind
from coxswain.service.edge.views import ClassSeen, EdgeFrame, TenantSeen
from tests.support.frames import frame, row
from tests.support.waiting import eventually

decode = msgspec.json.Decoder(EdgeFrame).decode
SECRET = "ab" * 32


@pytest.mark.parametrize(
    ("part", "whole"), [(TenantSeen, TenantStatus), (ClassSeen, ClassStatus), (EdgeFrame, Frame)]
)
def test_what_a_row_leaves_out_is_the_same_to_the_edge(part: type, whole: type) -> None:
    """The edge reads some fields of each row: one that is not there means to it what the wire contract says."""
    fields = {each.name: (each.encode_name, each.default) for each in msgspec.structs.fields(whole)}
    for each in msgspec.structs.fields(part):
        assert (each.encode_name, each.default) == fields[each.name]


class Engine:
    """One engine's counts of tenant `a`, and the frames that it would send."""

    def __init__(self, name: str = "w1", *, max_queued: int | None = 3, class_cap: int | None = None) -> None:
        self.name = name
        self.incarnation = "01A"
        self.state = "serving"
        self.max_queued = max_queued
        self.class_cap = class_cap
        self.queued = self.running = self.finished = 0
        self.seq = 0
        self.oldest_s = 0.0

    def seen(self, *, full: bool = True) -> EdgeFrame:
        """Its status now, as the edge decodes it."""
        self.seq += 1
        tenant = row(
            "a", class_="chat", queued=self.queued, running=self.running, finished_total=self.finished,
            oldest_queued_s=self.oldest_s, max_queued=self.max_queued,
        )  # fmt: skip
        chat = ClassStatus(
            class_="chat", queued=self.queued, running=self.running, held=0, oldest_queued_s=self.oldest_s,
            max_queued=self.class_cap,
        )  # fmt: skip
        status = frame(
            self.name, self.incarnation, self.seq, tenant, full=full, state=self.state, classes=(chat,)
        )
        return decode(encode(status))


def enter(caps: EdgeCaps, now: float = 0.0, tenant: str = "a", class_: str = "") -> Passage:
    """A request that is let through, and whole at once."""
    passage = caps.enter(tenant, class_, now)
    assert isinstance(passage, Passage), passage
    assert passage.whole(now) is None
    return passage


def refused(caps: EdgeCaps, now: float = 0.0, tenant: str = "a", class_: str = "") -> Refusal:
    """A request that is not."""
    refusal = caps.enter(tenant, class_, now)
    assert isinstance(refusal, Refusal)
    return refusal


# Decisions


def test_everybody_is_served_before_any_frame() -> None:
    """An edge that has heard nothing refuses nobody, and keeps no count that could grow."""
    caps = EdgeCaps(["w1"])
    for _ in range(1_000):
        enter(caps).sent(0.0, 1)
    assert not caps.underway
    assert not caps.sent


def test_queued_and_what_was_let_through_since() -> None:
    """Up to the cap passes: what the frame has, what is on its way, what was sent; not one more."""
    caps, engine = EdgeCaps(["w1"]), Engine(max_queued=3)
    engine.queued = 1
    caps.heard(engine.seen(), 0.0)
    first, _ = enter(caps), enter(caps)
    assert refused(caps).status == 429
    first.sent(0.0, 1)
    assert refused(caps).status == 429
    engine.queued, engine.running = 1, 1  # it arrived, and the other was admitted
    caps.heard(engine.seen(full=False), 0.05)
    enter(caps, 0.05)
    refused(caps, 0.05)


def test_request_that_ends_without_the_engine_is_counted_no_more() -> None:
    """What vLLM's front end answers by itself (a 400, say) frees its place at once."""
    caps, engine = EdgeCaps(["w1"]), Engine(max_queued=1)
    caps.heard(engine.seen(), 0.0)
    passage = enter(caps)
    refused(caps)
    passage.left()
    passage.left()
    enter(caps)


def test_children_and_prompts_count_each() -> None:
    """One decision per HTTP request; what it turns into counts in full: `n` for each prompt."""
    caps, engine = EdgeCaps(["w1"]), Engine(max_queued=5)
    caps.heard(engine.seen(), 0.0)
    passage = enter(caps)
    passage.sent(0.0, 2)
    passage.sent(0.0, 2)
    passage.left()
    enter(caps)
    assert "5 requests waiting" in refused(caps).message


def test_class_cap_counts_all_tenants() -> None:
    """A class's cap holds for tenants that have none; a tenant's own class counts where none was asked for."""
    caps, engine = EdgeCaps(["w1"]), Engine(max_queued=None, class_cap=2)
    engine.queued = 1
    caps.heard(engine.seen(), 0.0)
    enter(caps, tenant="b", class_="chat")
    assert "class 'chat'" in refused(caps).message
    enter(caps, tenant="b")  # in `default`, of which nothing is known
    enter(caps, tenant="b", class_="unknown")


def test_an_unfinished_upload_takes_a_place_of_its_tenant_alone() -> None:
    """Who sends no body keeps nobody else out of the class; when it comes and there is no place left, it is refused."""
    caps, engine = EdgeCaps(["w1"]), Engine(max_queued=2, class_cap=3)
    caps.heard(engine.seen(), 0.0)
    slow = [caps.enter("a", "chat", 0.0) for _ in range(2)]
    assert "tenant 'a'" in refused(caps).message
    for _ in range(3):
        enter(caps, tenant="b", class_="chat")
    assert "class 'chat'" in refused(caps, tenant="b", class_="chat").message
    for passage in slow:
        assert isinstance(passage, Passage)
        late = passage.whole(0.0)
        assert late is not None
        assert "class 'chat' has 3" in late.message
        passage.left()
    assert (caps.underway["a"], caps.underway_in["chat"]) == (0, 3)


def test_what_the_front_end_works_on_for_long_leaves_its_class_to_others() -> None:
    """A body whose links vLLM is long in fetching keeps its tenant's place alone; once the engine has it, it counts."""
    caps, engine = EdgeCaps(["w1"]), Engine(max_queued=3, class_cap=2)
    caps.heard(engine.seen(), 0.0)
    fetching = [enter(caps, class_="chat") for _ in range(2)]
    caps.heard(engine.seen(), LOST_S)
    refused(caps, LOST_S, tenant="b", class_="chat")
    caps.heard(engine.seen(), LOST_S + 0.2)
    assert fetching[0].whole(LOST_S + 0.2) is None, "asked once, and for good"
    other = enter(caps, LOST_S + 0.2, tenant="b", class_="chat")
    assert (caps.underway["a"], caps.underway_in["chat"]) == (2, 1)
    for passage in fetching:
        passage.sent(LOST_S + 0.2, 1)
    assert "class 'chat' has 3" in refused(caps, LOST_S + 0.2, tenant="b", class_="chat").message
    other.left()
    assert not caps.underway
    assert not caps.underway_in
    caps.heard(engine.seen(), 2 * LOST_S + 0.4)
    assert (caps.sent_in["chat"], caps.underway_in["chat"]) == (0, 0)


def test_refusal_says_the_limit_and_when_to_try_again() -> None:
    """Retry-After is how often the queue has room, by what waited longest; within 1 to 60 s."""
    caps, engine = EdgeCaps(["w1"]), Engine(max_queued=4)
    engine.queued = 4
    for oldest_s, retry_s in ((0.0, 1), (38.0, 10), (4_000.0, 60)):
        engine.oldest_s = oldest_s
        caps.heard(engine.seen(), 0.0)
        refusal = refused(caps)
        assert (refusal.status, refusal.kind, refusal.retry_after_s) == (429, "RateLimitError", retry_s)
        assert "tenant 'a' has 4 requests waiting here, and at most 4 may (max_queued)" in refusal.message


def test_zero_refuses_all() -> None:
    """A cap of 0 turns a tenant away altogether."""
    caps = EdgeCaps(["w1"])
    caps.heard(Engine(max_queued=0).seen(), 0.0)
    refused(caps)


def test_draining_refuses_everybody_when_all_engines_do() -> None:
    """503 once every engine behind the server drains; that outlasts their silence, as their numbers do not."""
    caps, one, two = EdgeCaps(["w1", "w1-dp1"]), Engine(), Engine("w1-dp1")
    one.state = two.state = "draining"
    two.state = "serving"
    caps.heard(one.seen(), 0.0)
    caps.heard(two.seen(), 0.0)
    enter(caps, tenant="b")
    two.state = "draining"
    caps.heard(two.seen(), 0.0)
    refusal = refused(caps, STALE_S + 1, tenant="b")
    assert (refusal.status, refusal.retry_after_s) == (503, 10)
    one.state = "serving"
    caps.heard(one.seen(), 0.0)
    enter(caps, tenant="b")


def test_numbers_of_a_silent_worker_count_no_more() -> None:
    """For 5 s the last values stand; then everybody is served."""
    caps, engine = EdgeCaps(["w1"]), Engine(max_queued=0)
    caps.heard(engine.seen(), 0.0)
    refused(caps, STALE_S)
    enter(caps, STALE_S + 0.1)


def test_caps_of_several_engines_add_up() -> None:
    """Behind one server with several engines a tenant may queue as much as all of them allow together."""
    caps, one, two = EdgeCaps(["w1-dp0", "w1-dp1"]), Engine("w1-dp0"), Engine("w1-dp1")
    one.queued, two.queued = 3, 1
    caps.heard(one.seen(), 0.0)
    caps.heard(two.seen(), 0.0)
    enter(caps)
    enter(caps)
    refused(caps)
    two.max_queued = None
    caps.heard(two.seen(), 0.0)
    enter(caps)


def test_what_never_arrived_is_forgotten() -> None:
    """A request that was sent and that no frame ever has does not hold its place for ever."""
    caps, engine = EdgeCaps(["w1"]), Engine(max_queued=1)
    caps.heard(engine.seen(), 0.0)
    enter(caps).sent(0.0, 1)
    caps.heard(engine.seen(), LOST_S)
    refused(caps, LOST_S)
    caps.heard(engine.seen(), LOST_S + 0.2)
    enter(caps, LOST_S + 0.2)


def test_counts_do_not_grow_while_frames_are_missing() -> None:
    """With NATS gone, no more is remembered than what a few seconds bring."""
    caps = EdgeCaps(["w1"])
    caps.heard(Engine(max_queued=None).seen(), 0.0)
    for i in range(10_000):
        passage = enter(caps, i / 100, tenant=f"t{i}")
        passage.sent(i / 100, 1)
    assert len(caps.sent) <= (LOST_S + 1) * 100
    assert caps.sent_in.total() == caps.sent_of.total() == sum(map(len, caps.sent.values()))


def test_tenants_beyond_the_workers_accounts_share_a_row() -> None:
    """Past 65,536 tenants the rest come in the row `other`: they count there, and in their class no longer than due."""
    caps, seq, finished = EdgeCaps(["w1"]), 0, 1

    def heard(now: float, *rows: TenantStatus, queued: int = 0) -> None:
        nonlocal seq
        seq += 1
        chat = ClassStatus(class_="chat", queued=queued, running=0, held=0, oldest_queued_s=0.0, max_queued=3)
        other = row("other", class_="chat", queued=queued, finished_total=finished, max_queued=2)
        status = frame("w1", "01A", seq, other, *rows, full=False, classes=(chat,))
        caps.heard(decode(encode(status)), now)

    heard(0.0)
    for number in range(20):
        enter(caps, number / 10, tenant=f"t{number}").sent(number / 10, 1)
        finished += 1
        heard(number / 10 + 0.05)
        assert not caps.sent_in + caps.sent_of + caps.underway
    for tenant in ("x", "y"):
        enter(caps, 2.0, tenant=tenant).sent(2.0, 1)
    assert "tenant 'other' has 2" in refused(caps, 2.0, tenant="z").message
    heard(2.1, queued=2)
    assert "tenant 'other' has 2" in refused(caps, 2.1, tenant="z").message
    finished += 2
    heard(2.2)
    assert not caps.sent_in + caps.sent_of
    # One that has an account all the same, and had no row as it never came: its own row tells of it.
    enter(caps, 2.3, tenant="ranked").sent(2.3, 1)
    heard(2.4, row("ranked", class_="chat", finished_total=1))
    assert not caps.sent_in + caps.sent_of
    enter(caps, 2.5, tenant="ranked").sent(2.5, 1)
    assert (caps.sent_of["ranked"], caps.sent_of["other"]) == (1, 0)


def test_new_incarnation_and_late_frames() -> None:
    """A restarted worker counts from zero; a late frame of its former life, or an older one, changes nothing."""
    caps, engine = EdgeCaps(["w1"]), Engine(max_queued=1)
    engine.queued = 1
    late = engine.seen()
    engine.queued = 0
    caps.heard(engine.seen(), 0.0)
    caps.heard(late, 0.1)
    enter(caps, 0.1).left()
    new = Engine(max_queued=1)
    new.incarnation = "01B"
    new.queued = 1
    caps.heard(new.seen(), 0.2)
    caps.heard(engine.seen(), 0.3)
    refused(caps, 0.3)
    caps.heard(Engine("other", max_queued=0).seen(), 0.3)
    assert caps.views.keys() == {"w1"}


def test_full_frame_in_parts() -> None:
    """A frame over the limit of a message comes in parts, and counts once all are there; gone classes are gone."""
    caps = EdgeCaps(["w1"])
    rows = [row(f"t{i}", max_queued=0) for i in range(50)]
    chat = ClassStatus(class_="chat", queued=0, running=0, held=0, oldest_queued_s=0.0)
    caps.heard(decode(encode(frame("w1", "01A", 1, classes=(chat,)))), 0.0)
    parts = split(frame("w1", "01A", 2, *rows), 2_500)
    assert len(parts) > 2
    for part in parts[1:]:
        caps.heard(decode(part), 0.0)
    enter(caps, tenant="t0")
    caps.heard(decode(parts[0]), 0.0)
    refused(caps, tenant="t0")
    assert caps.views["w1"].classes == {}


# The bound


class World:
    """One engine and several server processes in front of it, step by step, with the truth in hand.

    Args:
        processes: how many.
        cap: `max_queued` of the tenant, or of its class.
        seed: what happens.
    """

    def __init__(self, processes: int, cap: int, seed: int, *, of_class: bool = False) -> None:
        self.random = random.Random(seed)
        self.engine = Engine(max_queued=None if of_class else cap, class_cap=cap if of_class else None)
        self.edges = [EdgeCaps(["w1"]) for _ in range(processes)]
        self.uploads: list[Passage] = []
        """Let in, their bodies still to come."""
        self.front: list[Passage] = []
        self.wire = 0
        self.now = 0.0
        self.confirmed = 0
        """Arrivals that the last frame has."""
        self.frame()

    def frame(self) -> None:
        """The engine's status reaches all processes."""
        seen = self.engine.seen(full=self.random.random() < 0.3)
        for edge in self.edges:
            edge.heard(seen, self.now)
        self.confirmed = self.arrived

    @property
    def arrived(self) -> int:
        """How many the engine was ever given."""
        return self.engine.queued + self.engine.running + self.engine.finished

    @property
    def waiting(self) -> int:
        """How many wait, or are on their way to."""
        return self.engine.queued + self.wire + len(self.front)

    @property
    def unconfirmed(self) -> int:
        """How many were let in that the last frame cannot have."""
        return self.arrived - self.confirmed + self.wire + len(self.front)

    def step(self) -> list[tuple[int, int]]:
        """Something happens; `waiting` and `unconfirmed` after each that was let in."""
        seen = []
        self.now += 0.001
        engine, chance = self.engine, self.random.random
        process = self.random.randrange(len(self.edges))
        for _ in range(self.random.choice((0, 1, 1, 5))):
            passage = self.edges[process].enter("a", "", self.now)
            if isinstance(passage, Passage):
                self.uploads.append(passage)
                seen.append((self.waiting + len(self.uploads), self.unconfirmed + len(self.uploads)))
        while self.uploads and chance() < 0.8:
            passage = self.uploads.pop(self.random.randrange(len(self.uploads)))
            if passage.whole(self.now) is None:
                self.front.append(passage)
            else:
                passage.left()
        while self.front and chance() < 0.6:
            passage = self.front.pop(self.random.randrange(len(self.front)))
            if chance() < 0.1:
                passage.left()  # answered with a 400
            else:
                passage.sent(self.now, 1)
                self.wire += 1
        if chance() < 0.5:
            engine.queued, self.wire = engine.queued + self.wire, 0
        if engine.queued and chance() < 0.5:
            engine.queued, engine.running = engine.queued - 1, engine.running + 1
        if engine.running and chance() < 0.5:
            engine.running, engine.finished = engine.running - 1, engine.finished + 1
        if chance() < 0.05:
            self.frame()
        return seen


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 12))
def test_one_process_never_lets_the_queue_over_its_cap(seed: int, cap: int) -> None:
    """Whatever happens, in whatever order frames come: what waits, and what is on its way to, is never over the cap."""
    world = World(1, cap, seed)
    for _ in range(300):
        world.step()
        assert world.waiting + len(world.uploads) <= cap


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 12))
def test_one_process_never_lets_a_class_over_its_cap(seed: int, cap: int) -> None:
    """The same for a class, of what is there: an upload is asked again when it has come."""
    world = World(1, cap, seed, of_class=True)
    for _ in range(300):
        world.step()
        assert world.waiting <= cap


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(2, 5))
def test_several_processes_exceed_it_by_what_no_frame_has(seed: int, cap: int, processes: int) -> None:
    """None lets in what a frame's count leaves no room for: over the cap is only what was let in since that frame."""
    world = World(processes, cap, seed)
    for _ in range(300):
        for waiting, unconfirmed in world.step():
            assert waiting <= cap - 1 + unconfirmed


def test_room_is_given_again() -> None:
    """The count follows the queue down: what left it makes room with the next frame, however often."""
    world = World(1, 3, 7)
    let_in = sum(len(world.step()) for _ in range(1_000))
    assert world.engine.finished > 50
    assert let_in > world.engine.finished


# Through ASGI


class Listening:
    """The edge around an app that answers after it was told to, with counts that tests fill."""

    def __init__(self) -> None:
        self.caps = EdgeCaps(["w1"])
        self.engine = Engine(max_queued=1)
        self.caps.heard(self.engine.seen(), asyncio.get_running_loop().time())
        self.go = asyncio.Event()
        self.passed = 0
        self.paths: list[str] = []
        self.reads = False
        """Whether the app reads bodies, and takes fright of a client that is gone."""
        self.refused: list[int] = []
        status = EdgeStatus(Connection(urls=("nats://127.0.0.1:1",)), self.caps)
        status.start = lambda: None  # type: ignore[method-assign]
        settings = EdgeSettings.from_env({"COX_IDENTITY_KEY": SECRET, "COX_TENANT_HEADER": "x-tenant"})
        app = EdgeMiddleware(self.inside, Edge(settings), None, lambda _app: status, self.refused.append)
        transport = httpx.ASGITransport(app=app, client=("127.0.0.1", 1))
        self.client = httpx.AsyncClient(
            transport=transport, base_url="http://edge", headers={"x-tenant": "a"}
        )

    async def inside(self, scope: Any, receive: Any, send: Any) -> None:
        """Where vLLM would be."""
        self.passed += 1
        self.paths.append(scope["path"])
        while self.reads and (message := await receive()).get("more_body", True):
            if message["type"] == "http.disconnect":
                await send({"type": "http.response.start", "status": 400, "headers": []})
                raise ConnectionError("the client is gone")
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


async def test_http_answer_is_openais_with_retry_after() -> None:
    """429 with Retry-After, a body in OpenAI's form, and the public id; what passes again passes."""
    edge = Listening()
    running = asyncio.create_task(edge.client.post("/v1/completions"))
    await eventually(lambda: edge.passed == 1)
    answer = await edge.client.post("/v1/chat/completions")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    error = answer.json()["error"]
    assert (error["type"], error["code"], "max_queued" in error["message"]) == ("RateLimitError", 429, True)
    assert answer.headers["x-request-id"].startswith("cox.a.")
    edge.go.set()
    assert (await running).status_code == 200
    assert (await edge.client.post("/v1/completions")).status_code == 200


@pytest.mark.parametrize("raises", [False, True], ids=["503", "500"])
async def test_list_that_is_answered_with_an_error_waits_nowhere(raises: bool) -> None:
    """vLLM took some of its prompts, refused the next, and aborted all: they count no more, what came after does."""

    class OfVllm(Listening):
        async def inside(self, _scope: Any, receive: Any, send: Any) -> None:
            await receive()
            passage = ticket.get().passage  # type: ignore[union-attr]
            for _ in range(3):
                passage.sent(asyncio.get_running_loop().time(), 1)
            passage.refused()
            if raises:
                raise RuntimeError("of vLLM")
            await send({"type": "http.response.start", "status": 503, "headers": []})
            await send({"type": "http.response.body", "body": b"busy"})

    edge, now = OfVllm(), asyncio.get_running_loop().time()
    with contextlib.suppress(RuntimeError):
        await edge.client.post("/v1/completions", content=b"{}")
    assert not edge.caps.sent_of + edge.caps.sent_in + edge.caps.underway
    enter(edge.caps, now).sent(now, 1)
    edge.engine.finished += 2  # the next frame has the first two, and the other one not yet
    edge.caps.heard(edge.engine.seen(full=False), now)
    assert (edge.caps.sent_of["a"], edge.caps.sent_in["chat"]) == (1, 1)


async def test_an_upload_is_asked_again_when_it_is_there() -> None:
    """The class filled up while the body came: 429 all the same, in place of what the app makes of a client gone."""
    edge = Listening()
    edge.engine.max_queued, edge.engine.class_cap = None, 1
    edge.caps.heard(edge.engine.seen(), asyncio.get_running_loop().time())
    edge.reads = True
    arrived = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await arrived.wait()
        yield b"}"

    slow = asyncio.create_task(edge.client.post("/v1/completions", content=body()))
    await eventually(lambda: edge.passed == 1)
    quick = asyncio.create_task(edge.client.post("/v1/completions"))
    await eventually(lambda: edge.passed == 2)
    arrived.set()
    answer = await slow
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.headers["x-request-id"].startswith("cox.a.")
    assert edge.refused == [429]
    edge.go.set()
    assert (await quick).status_code == 200
    assert not edge.caps.underway
    assert not edge.caps.underway_in


def full_class(edge: Listening) -> None:
    """Its one place is taken by somebody else."""
    now = asyncio.get_running_loop().time()
    edge.engine.max_queued, edge.engine.class_cap = None, 1
    edge.caps.heard(edge.engine.seen(), now)
    enter(edge.caps, now, tenant="b", class_="chat")


async def raw(edge: Listening, app: Any) -> list[Message]:
    """What a client is sent that sends a body and waits, by an app within the edge whose class fills up meanwhile."""
    body: list[Message] = [{"type": "http.request", "body": b"{}", "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        if not body:
            await asyncio.Event().wait()
        full_class(edge)
        return body.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    middleware: Any = edge.client._transport.app  # type: ignore[attr-defined]
    middleware._app = app
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [(b"x-tenant", b"a")]}
    async with asyncio.timeout(30):
        await middleware(scope, receive, send)
    return sent


async def test_to_an_app_a_refused_client_is_gone_however_often_it_asks() -> None:
    """The client itself is there and says no more: an app that waits for its end is told at once."""
    edge, seen = Listening(), []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        seen.extend([(await receive())["type"] for _ in range(3)])
        await send({"type": "http.response.start", "status": 400, "headers": []})

    sent = await raw(edge, app)
    assert seen == ["http.disconnect"] * 3
    assert [message.get("status") for message in sent] == [429, None]
    assert edge.refused == [429]


async def test_who_is_being_answered_is_not_refused_any_more() -> None:
    """An app that answers before the body ends has decided: its answer stays whole, and is the only one."""
    edge, seen = Listening(), []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": []})
        seen.append((await receive())["type"])
        await send({"type": "http.response.body", "body": b"too long"})

    start, body = await raw(edge, app)
    assert seen == ["http.request"]
    assert (start["status"], body["body"]) == (413, b"too long")
    assert not edge.refused


async def test_only_what_asks_an_engine_is_counted() -> None:
    """Listings, token counts, cancellations and probes pass a full queue and a drain."""
    edge = Listening()
    edge.go.set()
    edge.engine.queued, edge.engine.state = 9, "draining"
    edge.caps.heard(edge.engine.seen(), asyncio.get_running_loop().time())
    for path in ("/v1/models", "/health", "/v1/responses/resp_1"):
        assert (await edge.client.get(path)).status_code == 200
    for path in (
        "/tokenize", "/v1/messages/count_tokens", "/v1/responses/resp_1/cancel", "/pause",
        "/v1/chat/completions/render", "/v1/completions/derender",
    ):  # fmt: skip
        assert (await edge.client.post(path)).status_code == 200
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/responses", "/score"):
        answer = await edge.client.post(path)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")


@pytest.mark.parametrize("path", ["/ready", "/ready/"])
async def test_a_server_is_ready_while_it_takes_requests(path: str) -> None:
    """As vLLM says of its health, and not while it drains, whatever is queued: balancers go elsewhere by themselves."""
    edge = Listening()
    edge.go.set()
    for state, status in (("serving", 200), ("draining", 503), ("serving", 200)):
        edge.engine.queued, edge.engine.state = 9, state
        edge.caps.heard(edge.engine.seen(), asyncio.get_running_loop().time())
        assert (await edge.client.get(path)).status_code == status
    assert edge.paths == ["/health", "/health"]


@pytest.mark.parametrize("path", ["/ready", "/health", "/metrics"])
async def test_a_probe_is_no_websocket(path: str) -> None:
    """Open to all as they are, what stands behind probes speaks HTTP only, and vLLM's metrics fail loudly at more."""
    edge = Listening()
    edge.go.set()
    send = AsyncMock()
    app: Any = edge.client._transport.app  # type: ignore[attr-defined]
    await app({"type": "websocket", "path": path, "headers": [], "client": None}, None, send)
    send.assert_awaited_once_with({"type": "websocket.close", "code": 1008})
    assert not edge.paths


async def test_websocket_is_refused_before_it_opens() -> None:
    """A websocket to a server that drains is closed with 1013, try again later."""
    edge = Listening()
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    edge.engine.state = "draining"
    edge.caps.heard(edge.engine.seen(), asyncio.get_running_loop().time())
    app: Any = edge.client._transport.app  # type: ignore[attr-defined]
    await app({"type": "websocket", "path": "/v1/realtime", "headers": [], "client": None}, None, send)
    assert sent == [{"type": "websocket.close", "code": 1013}]


async def test_an_open_websocket_leaves_its_tenants_place_to_others() -> None:
    """It may stay open for hours without asking for anything: what it asks for then is counted as it comes."""
    edge, ended = Listening(), AsyncMock()
    app: Any = edge.client._transport.app  # type: ignore[attr-defined]
    scope = {
        "type": "websocket",
        "path": "/v1/realtime",
        "headers": [(b"x-tenant", b"a")],
        "client": ("127.0.0.1", 1),
    }
    open_ = asyncio.create_task(app(scope, None, ended))
    await eventually(lambda: edge.passed == 1)
    posted = asyncio.create_task(edge.client.post("/v1/completions"))
    await eventually(lambda: edge.passed == 2 or posted.done())
    assert not open_.done()
    edge.go.set()
    assert (await posted).status_code == 200
    await open_


def test_hook_counts_what_the_engine_is_given() -> None:
    """vLLM's own request says how many it becomes; one without sampling parameters is one."""
    caps = EdgeCaps(["w1"])
    caps.heard(Engine(max_queued=None).seen(), 0.0)
    edge = Edge(EdgeSettings.from_env({"COX_IDENTITY_KEY": SECRET}))
    held = edge.admit([], "/v1/completions", None, "0" * 26).ticket
    for sampling in (SimpleNamespace(n=3), None):
        passage = enter(caps)
        request = SimpleNamespace(request_id="cmpl-x-0-1a2b3c4d", priority=0, sampling_params=sampling)
        edge_hook.apply(request, held._replace(passage=passage))
    assert (len(caps.sent["a"]), caps.underway.total()) == (4, 0)


@pytest.mark.vllm
def test_what_vllm_itself_refuses_waits_nowhere() -> None:
    """vLLM answers 503 (`--max-num-queued-reqs`) after it named a request: that one, and no other, counts no more."""
    from vllm.exceptions import QueueOverflowError
    from vllm.v1.engine.async_llm import AsyncLLM

    edge_hook.install()
    caps = EdgeCaps(["w1"])
    caps.heard(Engine(max_queued=None).seen(), 0.0)
    front = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_queued_reqs=3, max_num_queued_tokens=None),
        admission_stats=None,
        get_num_unfinished_requests=lambda: 3,
        _record_admission_rejection=lambda _reason: None,
    )
    edge = Edge(EdgeSettings.from_env({"COX_IDENTITY_KEY": SECRET}))
    passage = enter(caps, class_="chat")
    held = ticket.set(edge.admit([], "/v1/completions", None, "0" * 26).ticket._replace(passage=passage))
    try:
        passage.sent(0.0, 1)
        with pytest.raises(QueueOverflowError):
            AsyncLLM.check_admission(front, 2)
        assert len(caps.sent["a"]) == 1, "a first look, before the next request is made"
        passage.sent(1.0, 2)
        for _ in range(2):
            with pytest.raises(QueueOverflowError):
                AsyncLLM.check_admission(front, 2, "cmpl-x-0")
            assert [(each.at, each.class_) for each in caps.sent["a"]] == [(0.0, "chat")]
        assert (caps.sent_of["a"], caps.sent_in["chat"]) == (1, 1)
        front.get_num_unfinished_requests = lambda: 0
        AsyncLLM.check_admission(front, 1, "cmpl-x-1")
        assert len(caps.sent["a"]) == 1
    finally:
        ticket.reset(held)


# Which engines, and whether


def parallel(size: int, *, rank: int = 0, local: int = 1, local_only: bool = False) -> Any:
    """vLLM's settings of data parallelism."""
    return SimpleNamespace(
        data_parallel_size=size, data_parallel_rank=rank, data_parallel_size_local=local, local_engines_only=local_only
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (None, ["w"]),
        (parallel(1), ["w"]),
        (parallel(2), ["w", "w-dp0", "w-dp1"]),
        (parallel(8, rank=3, local_only=True), ["w-dp3"]),
        (parallel(8, rank=4, local=2, local_only=True), ["w-dp4", "w-dp5"]),
    ],
)
def test_engines_behind_a_server(config: Any, names: list[str]) -> None:
    """All ranks that this server feeds, by the names that they give themselves."""
    assert list(workers_behind("w", config)) == names


def test_whether_the_edge_listens() -> None:
    """Only with an address of NATS, and unless told not to."""
    on = Settings.from_env({"COX_NATS_URL": "nats://x:4222", "COX_WORKER": "w"})
    assert listener(Settings.from_env({"COX_WORKER": "w"}), {}) is None
    assert listener(on, {"COX_EDGE_CAPS": "off"}) is None
    listen = listener(on, {"COX_EDGE_CAPS": "on"})
    assert listen is not None
    assert listen(SimpleNamespace(state=SimpleNamespace())).caps.workers == {"w"}
    with pytest.raises(SettingRefusedError, match="COX_EDGE_CAPS"):
        listener(on, {"COX_EDGE_CAPS": "maybe"})
