"""Streaming sessions among others: they keep their slot between two turns, whoever else wants it."""

import pytest

from coxswain.schemas.commands import Targets
from coxswain.service.request_id import make
from tests.support.modes import MODES, PROMPT, Start, start
from tests.support.simulated import KEY

__all__ = ["start"]

pytestmark = pytest.mark.vllm


def named(tenant: str, number: int) -> str:
    """An engine's id for a request of a tenant."""
    public = make(bytes.fromhex(KEY), tenant, "", f"01KDWDV00000000000000000{number:02}")
    return f"cmpl-{public}-0-{number:08x}"


@MODES
def test_sessions_that_have_begun_are_not_kept_back_by_caps(start: Start, mode: dict[str, bool]) -> None:
    """Capped to none between two turns, sessions go on: else others would get slots that they have."""
    steered = start(mode)
    sessions = [named("acme", number) for number in range(4)]
    others = [named("globex", number) for number in range(10, 16)]
    for name in sessions:
        steered.add(name, PROMPT, 4, resumable=True)
    steered.run()
    assert steered.scheduler.num_waiting_for_streaming_input == 4
    steered.command("limit", targets=Targets(tenants=("acme",)), max_running=0)
    steered.command("preempt", *(name.removeprefix("cmpl-").rsplit("-", 2)[0] for name in sessions))
    for name in sessions:
        steered.add(name, [7] * 20, 30, resumable=True)
    for name in others:
        steered.add(name, PROMPT, 30)
    steered.until(lambda: steered.finished.keys() >= {*others})
    assert [reply.code for reply in steered.replies] == [None, 422]
    steered.run()
    assert {steered.said(name) for name in sessions} == {34}
    for name in sessions:
        steered.add(name, [1], 1)
    steered.run()
    steered.command("limit", targets=Targets(tenants=("acme",)), max_running=None)
    steered.step()
    steered.check_empty()
