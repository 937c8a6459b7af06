"""Who may take whose room where caps, borrowing and cut-in meet: a real EngineCore, checked step by step."""

import pytest

from coxswain.schemas import events as ev
from coxswain.schemas.commands import Targets
from coxswain.schemas.policy import ClassPolicy, TenantPolicy
from coxswain.service.request_id import make
from coxswain.service.scheduler.states import State
from tests.support.modes import MODES, PROMPT, Start, start
from tests.support.simulated import KEY

__all__ = ["start"]

pytestmark = pytest.mark.vllm

CHAT = TenantPolicy(class_="urgent", max_running=1)


def public(tenant: str, number: int) -> str:
    """The id of a request of a tenant, as commands know it."""
    return make(bytes.fromhex(KEY), tenant, "", f"01KDWDV00000000000000000{number:02}")


def named(tenant: str, number: int) -> str:
    """The same as the engine knows it."""
    return f"cmpl-{public(tenant, number)}-0-{number:08x}"


@MODES
def test_who_would_borrow_its_room_cuts_in_on_nobody(start: Start, mode: dict[str, bool]) -> None:
    """Beyond its cap a class that may cut in takes what is free, and gives it to the next that is within its caps."""
    steered = start(mode)
    policy = ClassPolicy(position=-1, cut_in="slots", borrow=True)
    steered.scheduler.core.configure({"urgent": policy}, {"chat": CHAT})
    tenants = ("chat", "chat", "chat", "hull", "hull", "hull", "hull")
    first, second, third, *batch, other = (named(tenant, number) for number, tenant in enumerate(tenants))
    records = steered.scheduler.core.roster.records
    events = steered.events()
    for number, name in enumerate((first, *batch, second)):
        steered.add(name, [30 + number] * 20, 60 if name != batch[2] else 20)
        steered.until_said(name, 1)
    assert steered.scheduler.core.limits.lent
    steered.add(third, [50] * 20, 60)
    steered.until_said(batch[2], 20)
    assert not steered.said(third), "five slots, and what it outranks in three of them"
    assert not [kind for _, kind, _ in events if kind is ev.Held]
    steered.until_said(third, 1)
    steered.add(other, [60] * 20, 4)
    steered.until_said(other, 1)
    assert [record.id for record, kind, _ in events if kind is ev.Held] == [third]
    assert {records[name].state for name in (first, second, *batch[:2])} == {State.RUNNING}
    steered.run()
    steered.check_empty()


@MODES
def test_session_over_its_cap_lets_nobody_cut_in(start: Start, mode: dict[str, bool]) -> None:
    """It cannot be held, but borrows nothing: who may not cut in gets held KV as always, when vLLM admits it."""
    steered = start(mode)
    core = steered.scheduler.core
    core.configure({"urgent": ClassPolicy(position=-1, cut_in="slots")}, {"chat": CHAT})
    tenants = ("acme", "hull", "hull", "hull", "hull", "chat")
    session, held, *running, head, urgent = (named(tenant, number) for number, tenant in enumerate(tenants))
    steered.add(session, PROMPT, 200, resumable=True)
    steered.add(held, list(range(3, 263)), 20)
    steered.until_said(held, 1)
    steered.command("preempt", public("hull", 1))
    for first, name in zip((300, 600), running, strict=True):
        steered.add(name, list(range(first, first + 170)), 20)
        steered.until_said(name, 1)
    steered.told("limit", targets=Targets(tenants=("acme",)), max_running=0)
    assert (core.limits.exceeded, core.limits.lent) == (True, False)
    events = steered.events()
    steered.add(urgent, PROMPT, 4)
    steered.add(head, list(range(900, 1150)), 4)
    steered.until_said(head, 1)
    said = [(record.id, fields["reason"]) for record, kind, fields in events if kind in (ev.Dropped, ev.Held)]
    assert said == [(held, f"blocks are needed for {public('hull', 4)}")]
    steered.command("limit", targets=Targets(tenants=("acme",)), max_running=None)
    steered.add(session, [1], 1)
    steered.command("continue", public("hull", 1))
    steered.run()
    steered.check_empty()
