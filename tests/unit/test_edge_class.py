"""The edge counts a request in the class in which the engine queues it: held to the real core, by its own frames."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from coxswain.schemas.commands import encode
from coxswain.schemas.policy import ClassPolicy, TenantPolicy
from coxswain.schemas.status import CommandStats
from coxswain.service.bus.board import Board
from coxswain.service.edge.caps import EdgeCaps, Passage
from coxswain.service.edge.core import Refusal
from coxswain.service.edge.views import EdgeFrame
from coxswain.service.scheduler.report import Gauges, Identity, Reporter
from tests.support.fake_engine import FakeEngine

GAUGES = Gauges("serving", 0, 0, 0, 0, 0, 0.0, 0)
NAMES = ("default", "chat", "batch", "ghost")


class Server:
    """An engine that admits nothing, and the edge before it, told of it after every request."""

    def __init__(self, classes: dict[str, ClassPolicy], tenants: dict[str, TenantPolicy]) -> None:
        self.engine = FakeEngine(slots=0)
        self.engine.core.configure(classes, tenants)
        self.caps = EdgeCaps(["w1"])
        self._reporter = Reporter(self.engine.core, Identity("w1", "01A", "m", "0"), 64)
        self._seq = 0
        self.tell()

    def tell(self) -> None:
        """The edge hears a full frame."""
        self._seq += 1
        board = Board(1.0)
        self._reporter.anew()
        board.take(self._reporter.draft(self.engine.now, GAUGES, CommandStats()))
        frame = board.full()
        payload = encode(msgspec.structs.replace(frame, seq=self._seq))
        self.caps.heard(msgspec.json.decode(payload, type=EdgeFrame), 0.0)

    def send(self, tenant: str, asked: str = "") -> tuple[str, str] | None:
        """A request: the class that the edge took it for and the class that it waits in, or None if refused."""
        passage = self.caps.enter(tenant, asked, 0.0)
        if isinstance(passage, Refusal):
            return None
        assert isinstance(passage, Passage)
        record = self.engine.submit(tenant, asked_class=asked)
        passage.sent(0.0, 1)
        self.tell()
        return passage.class_, record.class_


def test_class_that_a_tenant_may_not_have_does_not_evade_the_cap_of_its_own() -> None:
    """Who asks for a class that the engine will not give is held to the cap of the class that it will wait in."""
    server = Server(
        {"chat": ClassPolicy(max_queued=2), "batch": ClassPolicy()},
        {
            "a": TenantPolicy(class_="chat", max_queued=9),  # with caps it is known before it first comes
            "b": TenantPolicy(class_="chat", classes=("batch",), max_queued=9),
        },
    )
    assert [server.send("a") for _ in range(3)] == [("chat", "chat"), ("chat", "chat"), None]
    assert server.send("a", "batch") is None
    assert server.send("b", "batch") == ("batch", "batch")
    assert server.send("b") is None


def test_class_that_is_in_no_table_is_the_default_one() -> None:
    """A tenant whose row names a class that is not there waits in `default`, and is held to its cap."""
    server = Server({"default": ClassPolicy(max_queued=1)}, {"a": TenantPolicy(class_="ghost", max_queued=9)})
    assert [server.send("a") for _ in range(2)] == [("default", "default"), None]


rows = st.builds(
    TenantPolicy,
    class_=st.sampled_from(NAMES),
    classes=st.lists(st.sampled_from(NAMES), unique=True).map(tuple),
)


@settings(max_examples=60, deadline=None)
@given(
    st.sets(st.sampled_from(("chat", "batch"))),
    st.dictionaries(st.sampled_from(("a", "b")), rows),
    st.lists(st.tuples(st.sampled_from(("a", "b")), st.sampled_from(("", *NAMES))), max_size=8),
)
def test_edge_and_engine_agree_on_the_class(
    classes: set[str], tenants: dict[str, TenantPolicy], asked: list[tuple[str, str]]
) -> None:
    """Whatever the tables and whatever is asked for, of whoever was here before."""
    server = Server({name: ClassPolicy() for name in classes}, tenants)
    for tenant in ("a", "b"):
        server.send(tenant)
    for each in asked:
        told = server.send(*each)
        assert told is not None
        assert told[0] == told[1]
