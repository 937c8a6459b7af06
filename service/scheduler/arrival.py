"""What an arriving request meets: the fields of its `queued` event. Pure; called by the core.

They go out with the event and are not kept: a request that waits weighs enough already.
"""

from typing import Any

from coxswain.service.scheduler.queue import SteeredQueue
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.roster import Roster


def met(record: Record, queue: SteeredQueue, roster: Roster) -> dict[str, Any]:
    """The fields for a request that is in the roster and not yet in the queue. O(log of what waits)."""
    account, first = record.account, queue.peek() if queue else None
    fields: dict[str, Any] = {
        "prompt_tokens": record.prompt_tokens, "waiting": len(queue), "tenant_waiting": account.queued - 1,
        "running": len(roster.running), "virtual_time": account.rank[0],
    }  # fmt: skip
    if first is not None:
        fields |= {
            "next_request": first.request, "next_tenant": first.account.name, "next_class": first.class_,
            "next_priority": first.priority, "next_virtual_time": first.account.virtual_time,
        }  # fmt: skip
    return fields
