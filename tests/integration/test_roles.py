"""Users made by `cox init --auth` on a real nats-server: what each role may say and hear, and what it may not.

What is allowed is written down here once more, by hand, and every subject of the system is tried: a right that
`schemas/permissions.py` gives too much, or too little, is a difference.
"""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import nats
import pytest
from nats.aio.client import Client as Nats

from coxswain.schemas.commands import VERBS
from coxswain.schemas.events import KINDS
from coxswain.schemas.names import tenant_key
from coxswain.schemas.subjects import QUERIES
from tests.support.bus import Worker
from tests.support.secured import Secured, secured

pytestmark = pytest.mark.nats

ROOT = Path(__file__).resolve().parents[2]
ROLES = ("admin", "controller", "operator", "viewer", "edge", "worker-w1")
STREAMS = ("COX_main_EVENTS", "KV_cox_main_lease", "KV_cox_main_tenants", "KV_cox_main_classes")
READ = r"\$JS\.(API\.(STREAM\.(INFO|MSG\.GET)|CONSUMER\.(CREATE|INFO|DELETE))|FC)\.{}(\..+)?"
ALL_STREAMS = "(COX_main_EVENTS|KV_cox_main_(lease|tenants|classes))"
TABLES = "KV_cox_main_(lease|tenants|classes)"
DISCOVERY = r"\$SRV\.(PING|INFO|STATS)(\.coxswain-worker(\.id)?)?"

MAY_PUBLISH = {
    "worker-w1": (r"cox\.v1\.main\.status\.w1", r"cox\.v1\.main\.event\.w1\.\w+", r"_INBOX\..+"),
    "controller": (
        r"cox\.v1\.main\.cmd\.controller\..+", r"cox\.v1\.main\.lead", r"cox\.v1\.main\.query\.\w+\.queue",
        r"\$KV\.cox_main_lease\.leader", READ.format(TABLES),
    ),
    "operator": (
        r"cox\.v1\.main\.cmd\.operator\..+", r"cox\.v1\.main\.query\..+", r"\$KV\.cox_main_(tenants|classes)\..+",
        READ.format(ALL_STREAMS), DISCOVERY,
    ),
    "viewer": (r"cox\.v1\.main\.query\..+", READ.format(ALL_STREAMS), DISCOVERY),
    "edge": (),
    "admin": (rf"\$JS\.API\.STREAM\.(INFO|CREATE|UPDATE|DELETE|PURGE)\.{ALL_STREAMS}",),
}  # fmt: skip
MAY_HEAR = {
    "worker-w1": (
        r"cox\.v1\.main\.cmd\.\w+\.(w1|all)\.\w+", r"cox\.v1\.main\.query\.(w1|all)\.\w+", r"cox\.v1\.main\.lead",
        r"cox\.v1\.main\.status\.w1", r"cox\.v1\.main\.event\.w1\.\w+", DISCOVERY,
    ),
    "controller": (r"cox\.v1\.main\.status\.\w+",),
    "operator": (r"cox\.v1\.main\.status\.\w+", r"cox\.v1\.main\.event\..+", r"cox\.v1\.main\.lead"),
    "viewer": (r"cox\.v1\.main\.status\.\w+", r"cox\.v1\.main\.event\..+", r"cox\.v1\.main\.lead"),
    "edge": (r"cox\.v1\.main\.status\.\w+", r"cox\.v1\.main\.event\..+"),
    "admin": (),
}  # fmt: skip


def every_subject() -> list[str]:
    """Every subject of a fleet, of its neighbour, of JetStream and of the server itself."""
    found = [
        "lead",
        "anything",
        "_INBOX.somebody.1",
        "$SYS.REQ.SERVER.PING",
        "$SYS.REQ.ACCOUNT.COX_main.CONNZ",
    ]
    for fleet in ("main", "other"):
        root = f"cox.v1.{fleet}"
        found += [f"{root}.lead", f"$KV.cox_{fleet}_lease.leader", f"$KV.cox_{fleet}_lease.other"]
        found += [f"$KV.cox_{fleet}_classes.batch", f"$KV.cox_{fleet}_tenants.{tenant_key('acme')}"]
        for worker in ("w1", "w2", "all"):
            roles = ("operator", "controller", "engine", "viewer", "w1")
            found += [f"{root}.cmd.{role}.{worker}.{verb}" for role in roles for verb in (*VERBS, "more")]
            found += [f"{root}.query.{worker}.{what}" for what in (*QUERIES, "more")]
            found += [f"{root}.event.{worker}.{kind}" for kind in KINDS] + [f"{root}.status.{worker}"]
    verbs = ("INFO", "CREATE", "UPDATE", "DELETE", "PURGE", "SNAPSHOT", "RESTORE", "MSG.GET", "MSG.DELETE")
    for stream in (*STREAMS, "COX_other_EVENTS", "KV_cox_other_tenants", "OTHER"):
        found += [f"$JS.API.STREAM.{verb}.{stream}" for verb in verbs]
        found += [f"$JS.API.STREAM.PEER.REMOVE.{stream}", f"$JS.API.STREAM.LEADER.STEPDOWN.{stream}"]
        found += [f"$JS.API.CONSUMER.{verb}.{stream}" for verb in ("CREATE", "NAMES", "LIST")]
        found += [
            f"$JS.API.CONSUMER.{verb}.{stream}.c" for verb in ("INFO", "DELETE", "MSG.NEXT", "PAUSE", "UNPIN")
        ]
        found += [
            f"$JS.API.CONSUMER.CREATE.{stream}.c.filter.x",
            f"$JS.API.CONSUMER.DURABLE.CREATE.{stream}.c",
        ]
        found += [
            f"$JS.API.DIRECT.GET.{stream}",
            f"$JS.API.DIRECT.GET.{stream}.$KV.x",
            f"$JS.FC.{stream}.c.1",
        ]
        found += [f"$JS.ACK.{stream}.c.1.1.1.1.1", f"$JS.SNAPSHOT.RESTORE.{stream}.1", f"$JS.M.{stream}"]
    found += [f"$JS.API.{what}" for what in ("INFO", "STREAM.NAMES", "STREAM.LIST", "ACCOUNT.PURGE.COX_main")]
    found += [f"$JS.API.{what}" for what in ("META.LEADER.STEPDOWN", "SERVER.REMOVE")]
    found += [f"$SRV.{verb}{rest}" for verb in ("PING", "INFO", "STATS")
              for rest in ("", ".coxswain-worker", ".coxswain-worker.id", ".other", ".other.id")]  # fmt: skip
    return found


def matching(patterns: tuple[str, ...]) -> set[str]:
    """Those of all subjects that one of the patterns allows."""
    return {each for each in every_subject() if any(re.fullmatch(pattern, each) for pattern in patterns)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A server with every role."""
    with secured(tmp_path_factory.mktemp("roles")) as server:
        yield server


async def connected(server: Secured, label: str) -> tuple[Nats, list[str]]:
    """A plain client of a user, and what the server refuses it (lower case, as nats-py has it)."""
    refused: list[str] = []

    async def heard(error: Exception) -> None:
        refused.extend(re.findall(r'violation for \w+ to "([^"]*)"', str(error)))

    return await nats.connect(**server.at(label).options(), error_cb=heard), refused


async def settled(client: Nats) -> None:
    """Wait until the server has judged all that was sent: nats-py's first PING overtakes what is pending."""
    await client.flush()
    await client.flush()


@pytest.mark.parametrize("label", ROLES)
async def test_a_role_publishes_exactly_what_it_may(server: Secured, label: str) -> None:
    """Every subject of the system is tried; the server refuses all but the role's own."""
    client, refused = await connected(server, label)
    subjects = every_subject()
    for subject in subjects:
        await client.publish(subject, b"no request of JetStream's")  # so that what is allowed has no effect
    await settled(client)
    await client.close()
    allowed = {subject for subject in subjects if subject.lower() not in refused}
    assert allowed == matching(MAY_PUBLISH[label])


@pytest.mark.parametrize("label", ROLES)
async def test_a_role_hears_exactly_what_it_may(server: Secured, label: str) -> None:
    """The same for subscriptions, with wildcards over them all, and everybody's inboxes."""
    client, refused = await connected(server, label)
    subjects = every_subject()
    wild = [
        ">",
        "*",
        "cox.>",
        "cox.v1.main.>",
        "cox.v1.*.status.*",
        "_INBOX.>",
        "_INBOX.*.>",
        "$JS.>",
        "$KV.>",
    ]
    own = server.at(label).options()["inbox_prefix"] + ".>"
    for subject in (*subjects, *wild, own):
        await client.subscribe(subject)
    await settled(client)
    await client.close()
    assert set(map(str.lower, wild)) <= set(refused)
    assert own.lower() not in refused
    allowed = {subject for subject in subjects if subject.lower() not in refused}
    assert allowed == matching(MAY_HEAR[label])


async def test_nobody_connects_without_a_key_or_with_a_strangers(server: Secured, tmp_path: Path) -> None:
    """No key, and a good key that the server does not know, are turned away."""
    for options in ({}, {"nkeys_seed": Secured(tmp_path).seed("viewer")}):
        client = Nats()
        with pytest.raises(nats.errors.Error, match=r"(?i)authorization"):
            await client.connect(server.nats.url, allow_reconnect=False, **options)
        await client.close()


@pytest.mark.parametrize("label", ["worker-w1", "viewer", "controller", "operator"])
async def test_answers_cannot_be_sent_where_one_may_not_publish(server: Secured, label: str) -> None:
    """Who asks chooses where the answer goes: neither JetStream nor a worker carries it into a table or the lease."""
    client, _ = await connected(server, label)
    admin, _ = await connected(server, "admin")
    js = admin.jetstream()
    before = {stream: (await js.stream_info(stream)).state.last_seq for stream in STREAMS[1:]}
    targets = [
        f"$KV.cox_main_tenants.{tenant_key('acme')}",
        "$KV.cox_main_classes.batch",
        "$KV.cox_main_lease.leader",
    ]
    asks = sorted(
        subject for subject in matching(MAY_PUBLISH[label]) if subject.startswith(("$JS.API", "cox"))
    )
    with Worker(server.nats.url, **server.env("worker-w1")) as worker:
        await worker.connected()
        for subject in asks:
            for target in targets:
                await client.publish(subject, b"" if ".INFO" in subject else b"{}", reply=target)
        await settled(client)
        for subject in asks:  # whoever answers at all, answers into our inbox
            if ".event." in subject or subject.endswith(".w1.status"):
                assert (await client.request(subject, b"", timeout=5)).data
                break
        await asyncio.sleep(0.2)
    assert before == {stream: (await js.stream_info(stream)).state.last_seq for stream in STREAMS[1:]}
    await client.close()
    await admin.close()


async def test_nobody_has_a_worker_write_its_own_subjects(server: Secured) -> None:
    """Whatever a viewer asks a worker, no answer lands in the event log or among status, and it still may ask."""
    viewer, _ = await connected(server, "viewer")
    edge, _ = await connected(server, "edge")
    asks = sorted(
        each for each in matching(MAY_PUBLISH["viewer"]) if re.fullmatch(rf"{DISCOVERY}|.*w1\.\w+", each)
    )
    asks = [each for each in asks if not each.endswith(".id")]
    log = await viewer.jetstream().stream_info(STREAMS[0])
    heard = await edge.subscribe("cox.v1.main.status.*")
    await edge.flush()
    with Worker(server.nats.url, **server.env("worker-w1")) as worker:
        await worker.connected()
        for subject in asks:
            for target in ("cox.v1.main.event.w1.held", "cox.v1.main.status.w1"):
                await viewer.publish(subject, b"", reply=target)
        for subject in asks:  # each is answered behind what came before on its subject
            assert (await viewer.request(subject, b"", timeout=30)).data
    await settled(edge)
    assert heard.pending_msgs == 0
    assert (await viewer.jetstream().stream_info(STREAMS[0])).state.last_seq == log.state.last_seq
    assert {"$SRV.INFO.coxswain-worker", "cox.v1.main.query.w1.status"} <= set(asks)
    await viewer.close()
    await edge.close()


def test_the_document_says_how_many_subjects_were_tried() -> None:
    """docs/security.md counts what the tests above try and what each role may of it."""
    count = len(every_subject())
    text = (ROOT / "docs" / "security.md").read_text()
    assert f"{count:,} subjects" in text
    for label in ROLES:
        may, hears = len(matching(MAY_PUBLISH[label])), len(matching(MAY_HEAR[label]))
        role = label.split("-")[0]
        row = f"| {role} | {may} | {count - may:,} | {hears} | {count - hears:,} |"
        assert row in text, row
