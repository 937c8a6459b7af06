"""The program that the README shows, run as it stands against a steered engine and a real NATS server."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.support.nats import NatsServer
from tests.support.steered import FLEET, WORKER, engine_id, public_id, steered_rig
from tests.support.waiting import eventually

pytestmark = [pytest.mark.nats, pytest.mark.vllm]

PROGRAM = Path(__file__).resolve().parent.parent.parent / "examples" / "steer.py"
TOKENS = 900


async def test_the_example_holds_a_request_and_continues_it(nats_server: NatsServer) -> None:
    """While it waits the request gets no token; afterwards it ends with those of an undisturbed run."""
    env = {**os.environ, "COX_NATS_URL": nats_server.url, "COX_FLEET": FLEET}
    with steered_rig(nats_server.url) as rig:
        await eventually(lambda: rig.scheduler.port.connected)
        public = public_id("acme")
        name = engine_id(public)
        rig.submit(name, tokens=TOKENS)
        await eventually(lambda: rig.outputs.get(name))
        program = await asyncio.create_subprocess_exec(
            sys.executable, str(PROGRAM), WORKER, public, env=env,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        await eventually(lambda: rig.scheduler.core.roster.held)
        held_at = len(rig.outputs[name])
        await asyncio.sleep(1.0)
        assert len(rig.outputs[name]) == held_at < TOKENS
        said, _ = await asyncio.wait_for(program.communicate(), 60)
        assert program.returncode == 0, said.decode()
        assert said.decode().count('"outcome":"applied"') == 2, said.decode()
        rig.step_s = 0.0
        await eventually(lambda: name in rig.finished)
        assert rig.outputs[name] == rig.expected(name, TOKENS)
