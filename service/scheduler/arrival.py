"""What an arriving request meets: the fields of its `queued` event. Pure; called by the core.

They go out with the event and are not kept: a request that waits weighs enough already.
"""

from typing import Any

from coxswain.service.scheduler.queue import SteeredQueue
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.roster import Roster


def met(record: Record, queue: SteeredQueue, roster: Roster) -> dict[str, Any]:
    """The fields for a request that is in the roster and not yet in the queue.

    Whose turn it is, is as of the last frame or admission: who is charged since is not looked at for every arrival.
    """
    account, first = record.account, queue.glance()
    fields: dict[str, Any] = {
        "prompt_tokens": record.prompt_tokens, "waiting": len(queue), "tenant_waiting": account.queued - 1,
        "running": len(roster.running), "virtual_time": account.rank[0],
    }  # fmt: skip
    if first is not None:
        next_account = first.account
        fields["next_request"], fields["next_tenant"] = first.request, next_account.name
        fields["next_class"], fields["next_priority"] = first.group.name, first.priority
        fields["next_virtual_time"] = next_account.rank[0]
    return fields
