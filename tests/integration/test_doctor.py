"""`cox doctor` against real servers: healthy, broken in every way that it knows, and as every role."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.js.api import DiscardPolicy, KeyValueConfig, StreamConfig
from typer.testing import CliRunner

from coxswain.common.connection import Connection
from coxswain.control.cli import app
from coxswain.control.cli.exits import Exit
from coxswain.control.client import Client
from coxswain.control.tables import LEASE_TTL_S, init
from coxswain.schemas.status import Leader
from coxswain.service.worker import SHUTDOWN_S
from tests.support.fake_worker import FakeWorker, request
from tests.support.nats import NatsServer
from tests.support.secured import USERS, secured

pytestmark = pytest.mark.nats


def cox(*words: str, **env: str) -> Any:
    """Run `cox`."""
    return CliRunner().invoke(
        app, words, env={"COX_FLEET": "main", "COX_NATS_NKEY": "", "COX_NATS_CA": "", **env}
    )


def examined(url: str, code: Exit, **env: str) -> dict[str, tuple[str, str, str]]:
    """What the doctor found, by check: level, finding, how to mend it. The last of several of one check."""
    done = cox("doctor", "--json", "--nats", url, **env)
    assert done.exit_code == code, done.output
    told = json.loads(done.stdout)
    assert told["healthy"] == (code == Exit.DONE)
    return {each["check"]: (each["level"], each["found"], each["mend"]) for each in told["findings"]}


@contextmanager
def leading(url: str) -> Iterator[None]:
    """A controller, as a process."""
    line = [
        sys.executable,
        "-c",
        "from coxswain.control.cli import main; main()",
        "--nats",
        url,
        "controller",
    ]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


def test_a_healthy_fleet(nats_server: NatsServer) -> None:
    """Stream, buckets, a worker and a leader as they should be: no failure, no warning, exit 0, nothing changed."""
    url = nats_server.url
    cox("init", "--nats", url)
    with FakeWorker(url), leading(url):
        deadline = time.monotonic() + 30
        while (found := examined(url, Exit.DONE))["leader"][0] != "ok":
            assert time.monotonic() < deadline, found
        text = cox("doctor", "--nats", url).stdout
    assert {level for level, _, _ in found.values()} == {"ok"}
    assert "with vtc" in found["leader"][1]
    assert {"connection", "role", "COX_main_EVENTS", "KV_cox_main_lease", "worker w1"} <= found.keys()
    assert text.endswith("all is well\n")
    assert asyncio.run(_revisions(url)) == 0


async def _revisions(url: str) -> int:
    client = await nats.connect(url)
    state = (await client.jetstream().stream_info("KV_cox_main_classes")).state
    await client.close()
    return int(state.last_seq)


def test_no_nats_and_no_jetstream(tmp_path: Path) -> None:
    """Nothing listens: exit 3. NATS without JetStream: exit 1, and `-js`."""
    found = examined("nats://127.0.0.1:9", Exit.UNREACHABLE)
    assert found["connection"][0] == "fail"
    server = NatsServer(tmp_path, jetstream=False).start()
    try:
        level, _, mend = examined(server.url, Exit.UNEXPECTED, COX_TIMEOUT="500ms")["jetstream"]
    finally:
        server.kill()
    assert (level, "-js" in mend) == ("fail", True)


def test_nothing_set_up(nats_server: NatsServer) -> None:
    """Before `cox init` every part is missing; nobody answers and nobody leads."""
    found = examined(nats_server.url, Exit.UNEXPECTED, COX_TIMEOUT="500ms")
    for name in ("COX_main_EVENTS", "KV_cox_main_lease", "KV_cox_main_tenants", "KV_cox_main_classes"):
        assert found[name] == ("fail", "it is missing", "run `cox init`")
    assert found["workers"][0] == "fail"
    assert found["leader"][0] == "warn"


async def _spoil(url: str) -> None:
    client = await Client.connect(Connection(urls=(url,)))
    js = client.js
    await js.add_stream(StreamConfig(name="COX_main_EVENTS", subjects=["cox.v1.main.event.>"]))
    await js.create_key_value(KeyValueConfig(bucket="cox_main_lease", ttl=3600))
    await js.create_key_value(KeyValueConfig(bucket="cox_main_tenants", history=1))
    await js.create_key_value(KeyValueConfig(bucket="cox_main_classes", history=8))
    await client.close()


async def _refuse_new(url: str) -> None:
    client = await Client.connect(Connection(urls=(url,)))
    config = (await client.js.stream_info("COX_main_EVENTS")).config
    await client.js.update_stream(config.evolve(discard=DiscardPolicy.NEW))
    await client.close()


def test_a_log_that_keeps_its_oldest_events(nats_server: NatsServer) -> None:
    """One that refuses what is new is seen, and mended by what is said, which leaves its age as it was."""
    url = nats_server.url
    cox("init", "--nats", url, "--max-age", "1d")
    asyncio.run(_refuse_new(url))
    level, found, mend = examined(url, Exit.UNEXPECTED, COX_TIMEOUT="500ms")["COX_main_EVENTS"]
    assert (level, "refuses new events" in found) == ("warn", True)
    command = re.search(r"`cox (.+)`", mend)
    assert command
    assert "updated  stream" in cox(*command[1].split(), "--nats", url).stdout
    config = asyncio.run(_log(url))
    assert (config.discard, config.max_age) == (DiscardPolicy.OLD, 86_400.0)


async def _log(url: str) -> StreamConfig:
    client = await nats.connect(url)
    config = (await client.jetstream().stream_info("COX_main_EVENTS")).config
    await client.close()
    return config


def test_everything_wrong(nats_server: NatsServer) -> None:
    """An endless log, a lease that outlives its holder, a skewed clock, no spare slots, lost events, two leaders."""
    url = nats_server.url
    asyncio.run(_spoil(url))
    skewed = FakeWorker(url, "late", ahead_s=-30.0)
    crowded = FakeWorker(
        url,
        "full",
        events_dropped_total=7,
        events_waiting=900,
        events_waiting_s=31.5,
        config="1" * 16,
        leader=Leader(epoch=(1.0, 8), age_s=1.0),
    )
    crowded.scheduler |= {"max_num_active_seqs": None, "signed_ids": False, "enable_prefix_caching": False}
    crowded.scheduler |= {"shutdown_timeout_s": 0, "api_servers": 1}
    skewed.scheduler |= {"shutdown_timeout_s": 0, "api_servers": 2}
    old = FakeWorker(url, "old", vllm_version="0.31.0")
    old.scheduler |= {"coxswain": "0.0.1"}
    with skewed, crowded, old:
        done = cox("doctor", "--nats", url)
        found = examined(url, Exit.UNEXPECTED)
    assert "grows until the disk is full" in found["COX_main_EVENTS"][1]
    assert "--max-bytes 1073741824" in found["COX_main_EVENTS"][2]
    assert f"3600 s, not {LEASE_TTL_S:g}" in found["KV_cox_main_lease"][1]
    assert "1 revisions, not 8" in found["KV_cox_main_tenants"][1]
    assert found["KV_cox_main_classes"][0] == "ok"
    assert re.search(r"clock is -(29\.[5-9]|30\.[0-5]) s", found["worker late"][1])
    assert re.search(r"workers obey different leaders; the latest, \[1\.0, 8\]: full$", found["leader"][1])
    text = " ".join(done.stdout.split())
    for part in (
        "no spare slots: a held request keeps one of 20", "no signing key", "no prefix cache", "7 events lost",
        f"it aborts every request that it has mend: --shutdown-timeout {SHUTDOWN_S}",
        "900 events wait for the log, the oldest for 32 s",
        "runs Coxswain 0.0.1", "vLLM versions differ: 0.31.0, 0.32.0", "different tables in force",
        "no controller leads", "mend: set both clocks by NTP",
    ):  # fmt: skip
        assert part in text, part


def test_rows_that_nobody_can_read_are_named(nats_server: NatsServer) -> None:
    """Somebody wrote into the buckets without `cox`: each row that is not in force, why, and not their contents."""
    url = nats_server.url
    asyncio.run(_scribble(url))
    with FakeWorker(url, "w1"):
        done = cox("doctor", "--json", "--nats", url)
    warned = [each for each in json.loads(done.stdout)["findings"] if each["check"] == "KV_cox_main_tenants"]
    assert [each["level"] for each in warned] == ["ok", *["warn"] * 6]
    assert "the row of t0 is not in force" in warned[1]["found"]
    assert "cox tenants set" in warned[1]["mend"]
    assert warned[-1]["found"] == "and 2 more"
    assert "\x1b" not in done.stdout


async def _scribble(url: str) -> None:
    async with await Client.connect(Connection(urls=(url,), fleet="main")) as client:
        await init(client.js, client.subjects)
        values = (b"{", b"[]", b"\xff\xfe", b'{"weight": -1}', b'{"weight": "\x1b[31m"}', b"[" * 100_000, b"")
        for number, value in enumerate(values):
            await client.nc.request(f"$KV.{client.subjects.tenants_bucket}.t{number}", value)


def test_a_broken_worker_hides_no_other(nats_server: NatsServer) -> None:
    """One answers what nobody can read: the rest is shown and commanded, and it is said that there is something."""
    url = nats_server.url
    broken = FakeWorker(url, "w1", state="\x1b[2J")  # type: ignore[arg-type]
    with broken, FakeWorker(url, "w2", [request("r2")]) as well:
        shown = cox("ps", "--json", "--nats", url)
        found = examined(url, Exit.UNEXPECTED)
        held = cox("hold", "--all", "--nats", url)
    assert [each["worker"] for each in json.loads(shown.stdout)["workers"]] == ["w2"]
    assert "passed over" in shown.stderr
    assert found["worker w2"][0] == "ok"
    assert "an answer cannot be read" in found["workers"][1]
    assert held.exit_code == Exit.DONE, held.output
    assert [verb for _, verb, _ in well.seen] == ["preempt"]
    assert "\x1b[2J" not in shown.output + held.output


def test_every_role_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With users, the doctor says whose key this is, what it may, and what it could not look at."""
    with secured(tmp_path) as server:
        for label in (user.replace(":", "-") for user in USERS if user != "worker:w2"):
            sees_no_worker = label in ("viewer", "operator")
            code = Exit.UNEXPECTED if sees_no_worker else Exit.DONE
            found = examined(server.nats.url, code, COX_NATS_NKEY=server.seed(label), COX_TIMEOUT="500ms")
            assert found["role"][0] == "ok", (label, found["role"])
            assert found["role"][1].startswith(label.partition("-")[0]), found["role"]
        Path(server.seed("viewer")).chmod(0o644)
        found = examined(
            server.nats.url, Exit.UNEXPECTED, COX_NATS_NKEY=server.seed("viewer"), COX_TIMEOUT="500ms"
        )
        assert found["key"][2] == "chmod 600 it"
        # As Kubernetes mounts a Secret: somebody else's, and our group may read it.
        monkeypatch.setattr(os, "getuid", lambda: 4_711)
        for mode, warned in ((0o440, False), (0o460, True), (0o444, True)):
            Path(server.seed("viewer")).chmod(mode)
            found = examined(
                server.nats.url, Exit.UNEXPECTED, COX_NATS_NKEY=server.seed("viewer"), COX_TIMEOUT="500ms"
            )
            assert ("key" in found) == warned, oct(mode)
