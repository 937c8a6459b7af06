"""Everything that reads what strangers send, as functions of bytes that must neither raise nor change anything.

Each target takes any bytes and returns nothing; what is meant to be refused is refused in there, and what was
refused must have left no trace. `tests/unit/test_fuzz.py` drives them with hypothesis, `scripts/fuzz.py` with
libFuzzer. To add a decoder, add a function to `TARGETS`.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace
from ulid import ULID

from coxswain.control.core import Answer, Beat, Outgoing, Send
from coxswain.control.policies.andes import Andes
from coxswain.control.policies.edf import Edf
from coxswain.control.policies.vtc import Vtc
from coxswain.control.policy import Policy
from coxswain.control.reader import Reader
from coxswain.control.rows import Rows
from coxswain.schemas import commands, status
from coxswain.schemas.commands import VERBS
from coxswain.schemas.errors import UNREADABLE, RefusedError
from coxswain.schemas.events import decode_event
from coxswain.schemas.names import NameRefusedError, check_tenant, check_token, sanitise_token, tenant_of_key
from coxswain.schemas.policy import ClassPolicy, TenantPolicy
from coxswain.schemas.request_id import normalise
from coxswain.schemas.subjects import CONTROLLER, OPERATOR, CommandSubject
from coxswain.service import keys, request_id
from coxswain.service.bus import intake
from coxswain.service.edge.caps import EdgeCaps
from coxswain.service.edge.core import Edge, EdgeSettings, RefusedRequestError, client_id
from coxswain.service.edge.views import EdgeFrame
from coxswain.service.keys import Grant
from coxswain.service.scheduler.verbs import Commands
from tests.support.control import Driver
from tests.support.fake_engine import FakeEngine, picture

NOW = 1767225600.0
KEY = bytes(range(32))
MAX_REMEMBERED = 64
"""Commands that are taken before an engine begins anew, so that a long run stays small and quick."""

POLICIES: tuple[Callable[[], Policy], ...] = (
    lambda: Vtc(Vtc.Params()),
    lambda: Vtc(Vtc.Params(predict="average", preempt_gap=10.0, fill=0.5)),
    lambda: Andes(Andes.Params()),
    lambda: Edf(Edf.Params()),
)
"""Of each kind of commands one that makes them, of tenants' numbers or of single requests."""

GRANT = Grant(tenant="acme", class_="chat", classes=("batch",), priority_min=-5, priority_max=5)


class _Engine:
    """An engine with two requests and its commands, replaced when it has seen enough."""

    def __init__(self) -> None:
        self.taken = MAX_REMEMBERED

    def fresh(self) -> tuple[FakeEngine, Commands]:
        if self.taken >= MAX_REMEMBERED:
            self.engine = FakeEngine()
            self.engine.lead(1.0, 5)
            for tenant in ("acme", "globex"):
                self.engine.submit(tenant)
            self.engine.step()
            self.commands = Commands(self.engine.core, "w1", "01INCARNATION")
            self.taken = 0
        self.taken += 1
        return self.engine, self.commands


_engine = _Engine()


class _Owner:
    """A keyring with one key."""

    def find(self, key: str) -> Grant | None:
        return GRANT if key == "k" else None


_edge = Edge(EdgeSettings(KEY, tenant_header=b"x-tenant"), _Owner())


def command(data: bytes) -> None:
    """A command as it comes from NATS, to any verb and role, and what the engine makes of it."""
    choice, payload = (data[0] if data else 0), data[1:]
    verb = (*VERBS, "more")[choice % (len(VERBS) + 1)]
    role = OPERATOR if choice & 0x40 else CONTROLLER if choice & 0x80 else "engine"
    engine, applied = _engine.fresh()
    before = picture(engine.core)
    try:
        asked, ignored = intake.command(CommandSubject(role, "w1", verb), payload, NOW)
    except RefusedError as error:
        _refused(error, payload)
        assert picture(engine.core) == before
        return
    reply = applied.apply(engine.now, role, verb, asked, ignored)
    assert commands.decode_reply(commands.encode(reply)) == reply
    if reply.outcome == "rejected":
        # A newer epoch counts all the same: it fences the older leader off.
        assert {**picture(engine.core), "leader": None} == {**before, "leader": None}
    engine.core.validate()


def _refused(error: RefusedError, payload: bytes) -> None:
    """The reply to a refused command can be read and has its code."""
    reply = intake.refusal(error, payload, worker="w1", incarnation="i", now=NOW, step=0)
    assert commands.decode_reply(commands.encode(reply)).code == error.code


def subject(data: bytes) -> None:
    """A command on any subject: role and verb are whatever stands there."""
    role, _, verb = data.decode(errors="replace").partition(".")
    try:
        intake.command(CommandSubject(role, "w1", verb), b'{"id": "c1", "targets": {"all": true}}', NOW)
    except RefusedError as error:
        intake.error_headers(error.code, error.message)


def question(data: bytes) -> None:
    """A query, its name and payload."""
    what, _, payload = data.partition(b"\n")
    try:
        intake.query(what.decode(errors="replace"), payload)
    except RefusedError:
        return


def lead(data: bytes) -> None:
    """A leader's heartbeat."""
    heard = intake.lead(data)
    if heard is not None and intake.epoch_ahead_s(heard.epoch, NOW) is None:
        engine, _ = _engine.fresh()
        engine.core.heard(engine.now, heard)
        engine.core.validate()
        _engine.taken = MAX_REMEMBERED  # a new leader: begin anew


def answer(data: bytes) -> None:
    """A worker's answers and events, as clients read them."""
    for decode in (
        commands.decode_reply,
        status.decode_page,
        status.decode_report,
        status.decode_config,
        decode_event,
    ):
        try:
            decode(data)
        except UNREADABLE:
            continue


def frame(data: bytes) -> None:
    """Status frames, one a line, and what controllers make of them: a worker that was broken into forges them.

    Whatever these say, no policy is blamed for it, and workers can read all that they are told.
    """
    for policy in POLICIES:
        driver = Driver(policy())
        reader = Reader(driver.core.fleet)
        now, answers = NOW, list[Answer]()
        for line in data.split(b"\n")[:4]:
            try:
                heard = reader.read(status.decode_frame(line).worker, line)
            except UNREADABLE:
                continue
            # It says so twice, and loses KV meanwhile: then some policies bound how many run.
            later = replace(heard, seq=heard.seq + 1, preempted_total=heard.preempted_total + 1)
            for each in (heard, later):
                now += 1.0
                sent = driver.step(now, each, answers=answers)
                for outgoing in sent:
                    _readable(outgoing)
                answers = [Answer(outgoing, ok=True) for outgoing in sent if isinstance(outgoing, Send)]


def _readable(outgoing: Outgoing) -> None:
    """A worker can read it, whatever it does about it then."""
    match outgoing:
        case Send(verb=verb, command=asked):
            _, ignored = commands.decode(verb, commands.encode(asked))
            assert not ignored
        case Beat(lead=said):
            assert intake.lead(commands.encode(said)) is not None


def edge_frame(data: bytes) -> None:
    """A status frame as the HTTP edge reads it."""
    caps = EdgeCaps(("w1",))
    try:
        heard = msgspec.json.decode(data, type=EdgeFrame)
    except UNREADABLE:
        return
    for second in range(3):
        caps.heard(heard, NOW + second)


def row(data: bytes) -> None:
    """A row of a table, its key and value."""
    key, _, value = data.partition(b"\n")
    for kind in (TenantPolicy, ClassPolicy):
        rows: Rows[Any] = Rows(kind, tenant_of_key)
        rows.put(key.decode(errors="replace"), value)
        rows.put("YWNtZQ", value)
        rows.end()


def names(data: bytes) -> None:
    """Names and ids."""
    text = data.decode(errors="replace")
    for check in (check_tenant, tenant_of_key, lambda name: check_token("worker", name)):
        try:
            check(text)
        except NameRefusedError:
            continue
    sanitise_token(text)
    parsed = request_id.parse(KEY, text)
    assert parsed.tenant is None, "a signature that nobody made"
    request_id.insert(text, request_id.make(KEY, "acme", "", str(ULID())))
    normalise(text)


def headers(data: bytes) -> None:
    """Headers of a request: whatever they say, it is the key's tenant, a class of its and a priority in range."""
    given = [(b"x-api-key", b"k")]
    for line in data.split(b"\n")[:64]:
        name, _, value = line.partition(b":")
        given.append((name.lower(), value))
    client_id(given)
    try:
        admitted = _edge.admit(given, "/v1/chat/completions", "192.0.2.1", str(ULID()))
    except RefusedRequestError:
        return
    seen = dict(admitted.headers)
    claim = request_id.parse(KEY, f"chatcmpl-{seen[b'x-request-id'].decode()}-1a2b3c4d")
    assert claim.tenant == "acme"
    assert claim.class_ in ("chat", "batch")
    assert -5 <= int(seen.get(b"x-vllm-priority", b"0")) <= 5
    assert sum(name == b"x-request-id" for name, _ in admitted.headers) == 1


def keys_file(data: bytes) -> None:
    """A keys file."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            keys.load(Path(file.name))
        except keys.KeysRefusedError:
            return


TARGETS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each
    for each in (command, subject, question, lead, answer, frame, edge_frame, row, names, headers, keys_file)
}
