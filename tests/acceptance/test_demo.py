"""`cox demo` as a newcomer runs it: it shows what it claims, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coxswain.control.demo.report import Report

pytestmark = [pytest.mark.vllm, pytest.mark.nats, pytest.mark.slow]

COX = [str(Path(sys.executable).with_name("cox"))]


def start(scratch: Path, *arguments: str) -> "subprocess.Popen[str]":
    """The demo, without a terminal, its temporary files in `scratch` (short: vLLM's sockets go there too)."""
    scratch.mkdir()
    return subprocess.Popen(
        [*COX, "demo", *arguments],
        env=os.environ | {"TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def mentioning(text: str) -> list[str]:
    """The command lines of all processes that mention `text`, or run in an environment that does."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if text in line or text in (folder / "environ").read_bytes().decode(errors="replace"):
                found.append(line)
        except OSError:
            continue
    return found


@pytest.mark.alone
@pytest.mark.timeout(400)
def test_it_shows_what_it_claims(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Exit code 0, every claim marked as seen, a report that says the same, and nothing left."""
    folder = tmp_path_factory.mktemp("d")
    scratch, path = folder / "t", folder / "report.json"
    demo = start(scratch, "--seconds", "15", "--report", str(path))
    out, _ = demo.communicate(timeout=380)
    assert demo.returncode == 0, out
    assert "✗" not in out
    report = json.loads(path.read_bytes())
    assert report["hold"]["identical"] is True
    assert report["vtc"]["polite_ttft_p95_s"] < report["fcfs"]["polite_ttft_p95_s"]
    assert set(report) == set(Report.__struct_fields__)
    assert list(scratch.iterdir()) == []
    assert mentioning(str(scratch)) == []


@pytest.mark.alone
@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(
    tmp_path_factory: pytest.TempPathFactory, number: signal.Signals
) -> None:
    """Interrupted while the worker starts, it ends at once with 130: no process, no temporary file."""
    scratch = tmp_path_factory.mktemp("d") / "t"
    demo = start(scratch)
    deadline = time.monotonic() + 60
    while not list(scratch.glob("cox-demo-*/logs/worker.log")):
        assert demo.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(mentioning(str(scratch))) >= 3, "the demo, NATS and the worker run"
    demo.send_signal(number)
    out, _ = demo.communicate(timeout=40)
    assert demo.returncode == 130, out
    assert list(scratch.iterdir()) == []
    assert mentioning(str(scratch)) == []
