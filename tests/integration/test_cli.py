"""The command line against a real nats-server and workers that answer on the real subjects."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import nats
import pytest
from msgspec import UNSET
from typer.testing import CliRunner, Result

from coxswain.control.cli import app
from coxswain.control.cli.exits import Exit
from coxswain.schemas import commands as c
from coxswain.schemas.errors import Code, RefusedError
from coxswain.schemas.events import Held, Queued
from coxswain.schemas.status import Frame, TenantStatus
from tests.support.fake_worker import INCARNATION, FakeWorker, request
from tests.support.nats import NatsServer

pytestmark = pytest.mark.nats


@pytest.fixture
def url(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's address, where `cox` looks for it."""
    monkeypatch.setenv("COX_NATS_URL", nats_server.url)
    monkeypatch.delenv("COX_FLEET", raising=False)
    return nats_server.url


def _cox(*arguments: str, **more: Any) -> Result:
    # As when piped, whatever width the tests' own terminal has.
    return CliRunner(env={"COLUMNS": None}).invoke(app, arguments, **more)


def _json(*arguments: str, code: Exit = Exit.DONE) -> Any:
    result = _cox(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_hold_and_continue_reach_the_one_worker_that_has_the_request(url: str) -> None:
    """By default every worker is asked; the others' 404 is no failure."""
    with FakeWorker(url, "w1", [request("r1")]) as w1, FakeWorker(url, "w2", [request("r2")]) as w2:
        held = _cox("hold", "r2", "--lease", "30s", "--kv", "drop")
        assert (held.exit_code, held.stderr) == (Exit.DONE, "")
        assert held.stdout == "w2: held 1 request from step 812, 1 token in flight still to arrive\n"
        assert w2.requests[0].state == "held"
        assert w1.requests[0].state == "running"
        assert _json("continue", "r2")["outcome"] == "applied"
        assert w2.requests[0].state == "running"
    role, verb, command = w2.seen[0]
    assert (role, verb) == ("operator", "preempt")
    assert isinstance(command, c.Preempt)
    assert (command.kv, command.lease_s) == ("drop", 30.0)
    assert command.expires_at is not None
    assert 0 < command.expires_at - time.time() <= 30
    assert "@" in command.issuer


def test_targets_are_the_union_of_what_is_named(url: str) -> None:
    """Requests (also from stdin), tenants and classes travel in one command."""
    with FakeWorker(url, requests=[request("r1"), request("r2", tenant="globex"), request("r3")]) as worker:
        result = _cox("hold", "-", "--tenant", "globex", "--class", "batch", "--json", input="r1\n\nr3\n")
    assert json.loads(result.stdout)["replies"][0]["counts"] == {"applied": 3}
    [(_, _, command)] = worker.seen
    assert isinstance(command, c.Preempt)
    assert command.targets == c.Targets(requests=("r1", "r3"), tenants=("globex",), classes=("batch",))


def test_prioritize_and_abort_say_what_they_were_told(url: str) -> None:
    """The new priority and class, and the reason, arrive as given."""
    with FakeWorker(url, requests=[request("r1")]) as worker:
        _json("prioritize", "r1", "--priority", "-5", "--class", "urgent")
        _json("prioritize", "--from-class", "default", "--priority", "3", "--worker", "w1")
        _json("abort", "--all", "--reason", "ran away")
    prioritize, by_class, abort = (command for _, _, command in worker.seen)
    assert isinstance(prioritize, c.Prioritize)
    assert (prioritize.priority, prioritize.class_) == (-5, "urgent")
    assert isinstance(by_class, c.Prioritize)
    assert (by_class.targets.classes, by_class.class_) == (("default",), None)
    assert isinstance(abort, c.Abort)
    assert (abort.targets.all, abort.reason) == (True, "ran away")


def test_limit_and_drain_say_what_they_were_told(url: str) -> None:
    """What is named is set or, with `none`, lifted; the rest is not touched. A drain begins and ends."""
    with FakeWorker(url, requests=[request("r1")]) as worker:
        _json(
            "limit", "--tenant", "default", "--class", "batch", "--max-running", "4", "--max-queued", "none"
        )
        assert "w1: draining" in _cox("drain", "--worker", "w1").stdout
        assert "w1: serving again" in _cox("drain", "--worker", "all", "--off").stdout
    limit, *drains = (command for _, _, command in worker.seen)
    assert isinstance(limit, c.Limit)
    assert limit.targets == c.Targets(tenants=("default",), classes=("batch",))
    assert (limit.max_running, limit.max_queued, limit.max_prefill_tokens_per_step) == (4, None, UNSET)
    assert [drain.on for drain in drains if isinstance(drain, c.Drain)] == [True, False]


def test_what_nobody_has_exits_4_or_6(url: str) -> None:
    """All missing: not found. Some missing: partly applied, and named on stderr."""
    with FakeWorker(url, "w1", [request("r1")]), FakeWorker(url, "w2"):
        missing = _cox("hold", "nope")
        assert (missing.exit_code, missing.stdout) == (Exit.NOT_FOUND, "")
        assert "404" in missing.stderr
        partial = _cox("hold", "r1", "nope")
        assert partial.exit_code == Exit.PARTIAL
        assert "w1: held 1 request" in partial.stdout
        assert "no request nope on any of 2 workers" in partial.stderr
        assert _json("hold", "r1", "nope", code=Exit.PARTIAL)["missing"] == ["nope"]


def test_a_refusal_shows_code_and_text(url: str) -> None:
    """Exit 5; with --json the replies are on stdout all the same."""
    refusal = RefusedError(Code.QUEUE_FULL, "4096 commands wait already: try again later")
    with FakeWorker(url, requests=[request("r1")], refuse=refusal):
        result = _cox("hold", "r1")
        assert result.exit_code == Exit.REFUSED
        assert result.stderr == "cox: w1 refused (429): 4096 commands wait already: try again later\n"
        document = _json("hold", "r1", code=Exit.REFUSED)
    assert (document["outcome"], document["replies"][0]["code"]) == ("rejected", 429)


@pytest.mark.parametrize(
    "arguments",
    [
        ("ps",),
        ("requests",),
        ("hold", "r1"),
        ("hold", "r1", "--worker", "w9"),
        ("rank", "--worker", "w9", "a=1"),
    ],
    ids=" ".join,
)
def test_nobody_there_exits_4(url: str, arguments: tuple[str, ...]) -> None:
    """The error says who was asked and what to do."""
    result = _cox(*arguments, "--timeout", "1s")
    assert result.exit_code == Exit.NOT_FOUND
    assert "main" in result.stderr
    assert "cox " in result.stderr


@pytest.mark.parametrize(("ahead_s", "words"), [(5.0, "ahead of"), (-5.0, "behind"), (0.0, "")])
def test_clocks_that_differ_are_reported(url: str, ahead_s: float, words: str) -> None:
    """More than a second between the worker's clock and ours is told on stderr; less is not."""
    with FakeWorker(url, requests=[request("r1")], ahead_s=ahead_s):
        result = _cox("hold", "r1")
    assert result.exit_code == Exit.DONE
    assert ("the clock of w1" in result.stderr) == bool(words)
    assert words in result.stderr


def _tenant(**fields: Any) -> TenantStatus:
    plain = {
        "tenant": "acme", "class_": "default", "queued": 0, "running": 1, "held": 0, "oldest_queued_s": 0.0,
        "virtual_time": 10.0, "base": 4.0, "charged": 6.0, "lift": 0.0, "weight": 3.0,
        "uncached_input_tokens_total": 1, "cached_input_tokens_total": 0, "output_tokens_total": 2,
        "recomputed_tokens_total": 0, "finished_total": 0,
    }  # fmt: skip
    return TenantStatus(**{**plain, **fields})


def test_rank_keeps_what_is_not_named(url: str) -> None:
    """A weight alone keeps the worker's base, and the other way round; the incarnation is the worker's."""
    tenants = (_tenant(), _tenant(tenant="globex"))
    with FakeWorker(url, tenants=tenants) as worker:
        result = _cox("rank", "--worker", "w1", "acme=2", "new=5", "--base", "globex=-7")
    assert (result.exit_code, result.stdout) == (Exit.DONE, "w1: ranked 3 tenants from step 812\n")
    [(_, _, rank)] = worker.seen
    assert isinstance(rank, c.Rank)
    assert rank.incarnation == INCARNATION
    found = {name: (row.base, row.weight) for name, row in rank.tenants.items()}
    assert found == {"acme": (4.0, 2.0), "globex": (-7.0, 3.0), "new": (0.0, 5.0)}


def test_ps_shows_workers_and_tenants(url: str) -> None:
    """A table for people; with --json the frames as they are, and the tenants summed."""
    with FakeWorker(url, "w1", [request("r1")], tenants=(_tenant(),)), FakeWorker(url, "w2"):
        text = _cox("ps").stdout
        document = _json("ps")
    assert "fleet main" in text
    assert "tiny-llama" in text
    assert [each["worker"] for each in document["workers"]] == ["w1", "w2"]
    assert document["tenants"][0]["output_share"] == 1.0


def test_frames_in_json_can_be_read_back(url: str) -> None:
    """What `ps --json` prints of a worker is a frame of the wire."""
    with FakeWorker(url, "w1", [request("r1")]):
        [frame] = _json("ps")["workers"]
    assert msgspec.convert(frame, Frame).requests[0].request == "r1"


def test_requests_lists_running_then_held_then_the_queue_in_order(url: str) -> None:
    """The queue is read page by page, beyond what a status frame shows; filters and the limit apply."""
    waiting = [request(f"q{number:04}", state="queued", tenant=f"t{number % 2}") for number in range(1_500)]
    with FakeWorker(url, requests=[*waiting, request("h1", state="held"), request("r1")]):
        document = _json("requests", "--limit", "2000")
        names = [each["status"]["request"] for each in document["requests"]]
        assert names == ["r1", "h1", *(each.request for each in waiting)]
        assert document["requests"][1_202]["status"]["position"] == 1_200
        assert (document["queued_total"], document["truncated"]) == (1_500, False)
        filtered = _json("requests", "--tenant", "t1", "--state", "queued", "--limit", "700")
        assert [each["status"]["request"] for each in filtered["requests"]][:2] == ["q0001", "q0003"]
        assert (len(filtered["requests"]), filtered["truncated"]) == (700, True)
        assert [each["status"]["request"] for each in _json("requests", "--state", "held")["requests"]] == [
            "h1"
        ]
        cut = _cox("requests", "--limit", "3")
    assert "q0000" in cut.stdout
    assert "1500 queued in all" in cut.stderr


def test_the_story_of_one_request_is_told_by_who_has_it(url: str) -> None:
    """Every worker is asked; nobody knowing it exits 4."""
    with FakeWorker(url, "w1"), FakeWorker(url, "w2", [request("r2")]):
        text = _cox("requests", "r2").stdout
        [told] = _json("requests", "r2")
        missing = _cox("requests", "nope")
    assert "running on w2" in text
    assert "admitted" in text
    assert (told["worker"], told["report"]["request"]) == ("w2", "r2")
    assert missing.exit_code == Exit.NOT_FOUND
    assert "nope" in missing.stderr


def test_init_is_safe_to_repeat_and_says_what_it_made(url: str) -> None:
    """The second time everything is kept."""
    first = _cox("init")
    assert first.stdout.count("created") == 4
    assert {each["outcome"] for each in _json("init")["made"]} == {"kept"}
    changed = _json("init", "--max-age", "1d")["made"]
    assert [each["outcome"] for each in changed if each["kind"] == "stream"] == ["updated"]


def test_tables_without_init_say_what_to_do(url: str) -> None:
    """The missing bucket is named, and `cox init`."""
    result = _cox("tenants")
    assert result.exit_code == Exit.NOT_FOUND
    assert "cox init" in result.stderr


def test_tenant_rows_change_field_by_field(url: str) -> None:
    """What is not named stays; `none` lifts a cap; a row can be removed once."""
    _cox("init")
    _json("tenants", "set", "Großkunde, AG", "--weight", "2", "--max-running", "3", "--classes", "chat,batch")
    row = _json("tenants", "set", "Großkunde, AG", "--priority-min", "0", "--max-running", "none")["row"]
    assert (row["weight"], row["max_running"], row["classes"], row["priority_min"]) == (
        2.0,
        None,
        ["chat", "batch"],
        0,
    )
    assert list(_json("tenants")["rows"]) == ["Großkunde, AG"]
    assert "Großkunde, AG" in _cox("tenants", "list").stdout
    wrong = _cox("tenants", "set", "Großkunde, AG", "--priority-max", "-1")
    assert wrong.exit_code == Exit.USAGE
    assert "priority_min" in wrong.stderr
    assert _json("tenants", "rm", "Großkunde, AG")["removed"] is True
    assert _cox("tenants", "rm", "Großkunde, AG").exit_code == Exit.NOT_FOUND


def test_a_tenants_class_without_a_row_is_pointed_out(url: str) -> None:
    """It may be a slip of the pen, or a class that gets its row next: it is stored, and said."""
    _cox("init")
    _cox("classes", "set", "chat", "--position", "-1")
    said = _cox("tenants", "set", "acme", "--class", "chta", "--classes", "chat,default")
    assert said.exit_code == Exit.DONE
    assert "no row for class chta: it has the defaults" in said.stderr
    assert _cox("tenants", "set", "acme", "--class", "chat").stderr == ""


def test_a_row_says_whether_anybody_is_there_to_apply_it(url: str, nats_server: NatsServer) -> None:
    """A table is only stored until a controller leads."""
    _cox("init")
    nobody, somebody = "no controller leads: it applies when one does", "the leading controller applies it"
    assert nobody in _cox("tenants", "set", "acme", "--weight", "2").stdout

    led, ended = threading.Event(), threading.Event()

    async def lead() -> None:
        nc = await nats.connect(nats_server.url)
        kv = await nc.jetstream().key_value("cox_main_lease")
        while not ended.is_set():  # each lasts 2 s
            await kv.put("leader", b"{}")
            led.set()
            await asyncio.sleep(0.5)
        await nc.close()

    leader = threading.Thread(target=asyncio.run, args=(lead(),))
    leader.start()
    try:
        assert led.wait(30)
        assert somebody in _cox("tenants", "set", "acme", "--weight", "3").stdout
        assert somebody in _cox("tenants", "rm", "acme").stdout
    finally:
        ended.set()
        leader.join()


def test_class_rows_change_field_by_field(url: str) -> None:
    """What workers of this version only store is said on stderr."""
    _cox("init")
    result = _cox(
        "classes",
        "set",
        "batch",
        "--position",
        "10",
        "--order",
        "priority",
        "--cut-in",
        "slots",
        "--slo",
        "2m",
    )
    assert result.exit_code == Exit.DONE
    row = _json("classes", "set", "batch", "--slo", "none", "--borrow", "yes")["row"]
    assert (row["position"], row["order"], row["slo_s"], row["borrow"]) == (10, "priority", None, True)
    assert _cox("classes", "rm", "batch").exit_code == Exit.DONE


def _held(seq: int, tenant: str = "acme") -> Held:
    return Held(
        id=f"w1:i:{seq}", worker="w1", incarnation="i", seq=seq, at=time.time(), step=3, request=f"r{seq}",
        tenant=tenant, class_="chat", priority=0, by="operator", kv="kept", reason="", lease_s=None,
    )  # fmt: skip


def _queued(seq: int) -> Queued:
    return Queued(
        id=f"w1:i:{seq}", worker="w1", incarnation="i", seq=seq, at=time.time(), step=3, prompt_tokens=9
    )


def test_events_are_read_from_the_log(url: str) -> None:
    """JSON lines in order; filters by kind, tenant, request and time; the whole log by default."""
    _cox("init")
    with FakeWorker(url) as worker:
        worker.tell(_queued(1), "queued")
        worker.tell(_held(2), "held")
        worker.tell(_held(3, tenant="globex"), "held")
    lines = _cox("events", "--no-follow", "--json").stdout.splitlines()
    assert [json.loads(line)["seq"] for line in lines] == [1, 2, 3]

    def found(*arguments: str) -> list[int]:
        result = _cox("events", "--no-follow", "--json", *arguments)
        return [json.loads(line)["seq"] for line in result.stdout.splitlines()]

    assert found("--kind", "held") == [2, 3]
    assert found("--tenant", "globex", "--since", "10m") == [3]
    assert found("--request", "r2") == [2]
    assert found("--since", "0s") == []
    text = _cox("events", "--no-follow").stdout.splitlines()
    assert len(text) == 3
    assert text[1].endswith("by operator until continued, kv kept, 0 tokens out r2")


def _start(*arguments: str, **more: Any) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", "from coxswain.control.cli import main; main()", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, **{**pipes, **more})


@contextmanager
def _told(worker: FakeWorker) -> Iterator[None]:
    """Events come all the time, so that a follower meets some whenever it begins to listen."""
    stop = threading.Event()

    def tell() -> None:
        for seq in range(1, 100_000):
            worker.tell(_held(seq), "held")
            if stop.wait(0.05):
                return

    teller = threading.Thread(target=tell)
    teller.start()
    try:
        yield
    finally:
        stop.set()
        teller.join()


def test_following_ends_quietly_by_ctrl_c(url: str) -> None:
    """New events need no stored log; SIGINT exits 130 and says nothing."""
    with FakeWorker(url) as worker, _told(worker), _start("events", "--json") as process:
        try:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["kind"] == "held"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=10)
        finally:
            process.kill()
    assert (process.returncode, errors) == (Exit.INTERRUPTED, "")


def test_a_reader_that_goes_away_ends_it_quietly(url: str) -> None:
    """`cox events | head -1` prints no error, for people and for programs; its code is as if SIGPIPE had ended it."""
    for arguments in (("events",), ("events", "--json")):
        with FakeWorker(url) as worker, _told(worker), _start(*arguments) as process:
            try:
                assert process.stdout is not None
                assert process.stderr is not None
                assert "held" in process.stdout.readline()
                process.stdout.close()
                assert process.wait(10) == Exit.UNREAD
                assert process.stderr.read() == ""
            finally:
                process.kill()


def test_watching_prints_one_document_per_look(url: str) -> None:
    """`ps --watch --json` is a stream of lines, for programs."""
    arguments = ("ps", "--watch", "--every", "100ms", "--json", "--timeout", "300ms")
    with FakeWorker(url), _start(*arguments) as process:
        try:
            assert process.stdout is not None
            looks = [json.loads(process.stdout.readline()) for _ in range(2)]
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=10)
        finally:
            process.kill()
    assert looks[0]["at"] < looks[1]["at"]
    assert process.returncode == Exit.INTERRUPTED
