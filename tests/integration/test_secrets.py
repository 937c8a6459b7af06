"""No secret in anything that a role prints or logs, whatever goes wrong; workers: `test_edge_attacks.py`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coxswain.control.cli import app
from tests.support.nats import NatsServer
from tests.support.secured import Secured, secured

pytestmark = [pytest.mark.nats, pytest.mark.timeout(180)]

COX = (sys.executable, "-c", "from coxswain.control.cli import main; main()")
PASSWORD = "hunter2-in-url"
TOKEN = "t0ken-in-url"


def said(env: dict[str, str], *words: str) -> str:
    """All that `cox` prints, with tracebacks."""
    none = {name: None for name in os.environ if name.startswith("COX_")}
    return (
        CliRunner().invoke(app, words, env={**none, "COX_DEBUG": "1", "COX_TIMEOUT": "500ms", **env}).output
    )


def logged(*envs: dict[str, str]) -> str:
    """What controllers log in some seconds, side by side."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("COX_")}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [
        subprocess.Popen(["timeout", "-s", "INT", "20", *COX, "controller"], env=plain | env, **pipes)
        for env in envs
    ]
    text = ""
    for process in running:
        assert process.stdout is not None
        text += process.stdout.readline() + process.stdout.readline()  # it started; it came so far
        process.terminate()
        text += process.communicate(timeout=30)[0]
    return text


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Secured]:
    """A server with users, and secrets in every setting of its clients."""
    with secured(tmp_path) as server:
        yield server


def test_cox_and_controllers_never_show_a_secret(
    server: Secured, tmp_path: Path, nats_server: NatsServer
) -> None:
    """Good settings and broken ones: strangers' passwords and tokens in addresses, seeds where paths belong."""
    port = server.nats.port
    seed_file = server.seed("operator")
    seed = Path(seed_file).read_text().strip()
    torn = tmp_path / "torn.nk"
    torn.write_text(seed[:-3] + "\n")
    addresses = (
        f"nats://me:{PASSWORD}@127.0.0.1:{port}",
        f"nats://{TOKEN}@127.0.0.1:{port}",
        f"nats://me:{PASSWORD}@127.0.0.1:9",
        f"nats://me:{PASSWORD}@127.0.0.1:9,nats://{TOKEN}@no-such-host.invalid:1",
        f"nats://me:{PASSWORD}@127.0.0.1:x",
        nats_server.url.replace("//", f"//me:{PASSWORD}@"),
        f"nats://me:1/{PASSWORD}@127.0.0.1:{port}",
        f"me:{PASSWORD} {PASSWORD}@127.0.0.1:9",
    )
    keys = (seed_file, str(torn), seed, "")
    text = ""
    for number, address in enumerate(addresses):
        env = {"COX_NATS_URL": address, "COX_NATS_NKEY": keys[number % len(keys)]}
        text += said(env, "ps") + said(env, "doctor", "--json")
    for key in keys:
        text += said({"COX_NATS_URL": addresses[0], "COX_NATS_NKEY": key}, "abort", "r1")
    text += said({"COX_NATS_URL": server.nats.url, "COX_NATS_CREDS": seed}, "ps")
    text += logged(
        server.env("controller") | {"COX_NATS_URL": addresses[0]},
        {"COX_NATS_URL": addresses[2], "COX_NATS_NKEY": seed_file},
        {"COX_NATS_URL": addresses[0], "COX_NATS_CREDS": seed_file},
    )
    text += server.nats.log.read_text()
    assert "cannot be reached" in text
    assert "controller.started" in text
    shown = [secret for secret in (PASSWORD, TOKEN, seed, seed[:-3]) if secret in text]
    assert shown == [], [line for line in text.splitlines() if any(secret in line for secret in shown)][:5]
