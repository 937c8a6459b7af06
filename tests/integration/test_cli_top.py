"""`cox top` on a real nats-server: what is recorded is what is shown again, without a screen and with one."""

import asyncio
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from coxswain.common.connection import Connection
from coxswain.control.cli import app
from coxswain.control.cli.exits import Exit
from coxswain.control.client import Client
from coxswain.control.top.app import TopApp
from coxswain.control.top.sources import Live
from coxswain.control.view.recording import Recording
from coxswain.schemas.subjects import Subjects
from tests.support.fake_worker import FakeWorker, request
from tests.support.frames import frame, row
from tests.support.nats import NatsServer

pytestmark = pytest.mark.nats


def cox(*arguments: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, arguments)


async def publish(nc: Any, worker: str, *frames: Any) -> None:
    """Frames as a worker sends them."""
    for each in frames:
        await nc.publish(Subjects("main").status(worker), msgspec.json.encode(each))
    await nc.flush()


async def test_a_fleet_is_recorded_without_a_screen_and_shown_again(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Ctrl-C ends a recording well; every frame is in it, and pictures of it are as of then."""
    path = tmp_path / "incident.jsonl"
    command = [
        sys.executable,
        "-c",
        "from coxswain.control.cli import main; main()",
        "--nats",
        nats_server.url,
    ]
    process = await asyncio.create_subprocess_exec(
        *command, "top", "--record", str(path), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with await Client.connect(Connection(urls=(nats_server.url,), fleet="main")) as client:
            deadline = time.monotonic() + 30
            seq = 0
            while not path.exists() or path.read_bytes().count(b"\n") < 20:
                assert time.monotonic() < deadline, "nothing was recorded"
                seq += 1
                await publish(client.nc, "w1", frame("w1", "01A", seq, row("acme", queued=seq), queued=seq))
                await asyncio.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said, told = await asyncio.wait_for(process.communicate(), 20)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == Exit.INTERRUPTED
    assert (said, told.decode().count(f"frames in {path}")) == (b"", 1)
    with Recording(path) as played:
        seqs = [each.seq for _, each in played.read(played.end)]
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
    shown = await asyncio.to_thread(
        cox, "top", "--replay", str(path), "--speed", "500", "--every", "50ms", "--json"
    )
    assert shown.exit_code == Exit.DONE, shown.output
    last = json.loads(shown.stdout.splitlines()[-1])
    assert last["tenants"][0]["queued"] == last["queued"] == seqs[-1]


async def test_a_hold_from_the_keyboard_reaches_the_worker(nats_server: NatsServer) -> None:
    """From a frame on the screen to a command on the bus, and its outcome back."""
    with FakeWorker(nats_server.url, "w1", [request("r1"), request("r2", tenant="globex")]) as worker:
        async with await Client.connect(Connection(urls=(nats_server.url,), fleet="main")) as client:
            screen = TopApp(Live(client))
            async with screen.run_test(size=(80, 24)) as pilot:
                row_of = row("acme", running=1)
                full = msgspec.structs.replace(worker.frame(), tenants=(row_of,))
                deadline = time.monotonic() + 20
                while screen.tenant_table.key != "acme":
                    assert time.monotonic() < deadline, "no frame was shown"
                    await publish(client.nc, "w1", full)
                    screen.draw()
                    await pilot.pause()
                await pilot.press("h", "enter")
                while not any(
                    each.worker == "you" for each in screen.overview.picture(time.time()).happenings
                ):
                    assert time.monotonic() < deadline, "no answer was shown"
                    await pilot.pause(0.02)
        [(role, verb, command)] = worker.seen
    assert (role, verb) == ("operator", "preempt")
    assert command.targets.tenants == ("acme",)
    assert [each.state for each in worker.requests] == ["held", "running"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), Exit.USAGE, "not a terminal"),
        (("--record", "a", "--replay", "b"), Exit.USAGE, "give --record or --replay"),
        (("--replay", "/nothing/here", "--json"), Exit.USAGE, "cannot be read"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_words(arguments: tuple[str, ...], code: Exit, words: str) -> None:
    """No traceback, and no screen where there is none."""
    result = cox("top", *arguments)
    assert result.exit_code == code
    assert words in result.stderr
