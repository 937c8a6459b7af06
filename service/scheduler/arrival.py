"""An arriving request: its record, made of vLLM's request, and what it meets: the fields of its `queued` event. Pure.

The fields go out with the event and are not kept: a request that waits weighs enough already.
"""

from typing import Any, Final

from coxswain.schemas.names import DEFAULT
from coxswain.service.request_id import parse
from coxswain.service.scheduler.queue import SteeredQueue
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.roster import Roster

JUMP_S: Final = 0.1
"""A wall clock that is further from ours than it was at the start has jumped."""


def received(request: Any, key: bytes | None, now: float, jumped: float) -> Record:
    """The record of a request that vLLM has made, of whoever its id proves. Touches nothing else.

    Args:
        request: vLLM's.
        key: what ids are signed with, or None.
        now: by our clock (Unix s).
        jumped: by how much the wall clock is ahead of ours (s). By it vLLM's server says when the request arrived.
    """
    claim = parse(key, request.request_id)
    at = request.arrival_time - jumped if abs(jumped) > JUMP_S else request.arrival_time
    return Record(
        id=request.request_id, request=claim.request, tenant=claim.tenant or DEFAULT, asked_class=claim.class_,
        priority=request.priority, arrived_at=min(at, now), prompt_tokens=request.num_prompt_tokens,
        outputs=request._output_token_ids,  # noqa: SLF001
    )  # fmt: skip


def met(record: Record, queue: SteeredQueue, roster: Roster) -> dict[str, Any]:
    """The fields for a request that is in the roster and not yet in the queue.

    Whose turn it is, and by how much, is as of the last frame or admission: who is charged since is not looked at for
    every arrival.
    """
    account, first = record.account, queue.glance()
    fields: dict[str, Any] = {
        "prompt_tokens": record.prompt_tokens, "waiting": len(queue), "tenant_waiting": account.queued - 1,
        "running": len(roster.running), "virtual_time": account.virtual_time,
    }  # fmt: skip
    if first is not None:
        next_account = first.account
        fields["next_request"], fields["next_tenant"] = first.request, next_account.name
        fields["next_class"], fields["next_priority"] = first.group.name, first.priority
        fields["next_virtual_time"] = next_account.virtual_time
    return fields
