"""The port between the steering core and the engine that it steers.

`mechanism.py` implements it over vLLM's scheduler; the core, its holds and its plan of who gets room call it.
Nothing else of an engine is known here.
"""

from collections.abc import Iterator
from typing import Protocol

from coxswain.service.scheduler.record import Record


class Engine(Protocol):
    """What the core can make the engine do, and ask of it. Each act takes effect from the very next step."""

    # Acts

    def hold(self, record: Record) -> None:
        """Stop scheduling a running request; keep its KV and its slot."""

    def park(self, record: Record) -> None:
        """Give back the slot of a kept request (`parkable`); its KV stays."""

    def drop(self, record: Record) -> None:
        """Free the KV of a running, kept or parked request; it goes to no queue."""

    def evict(self, record: Record) -> None:
        """Free the KV of a running request, or of one that waits with its KV, and queue it."""

    def resume(self, record: Record) -> None:
        """Schedule a kept request again; a parked one, for which there is a slot, from its next admission."""

    def enqueue(self, record: Record) -> None:
        """Put a released request back into the waiting queue."""

    def dequeue(self, record: Record) -> None:
        """Take a waiting request out of the engine's bookkeeping of waiting requests."""

    def reprioritized(self, record: Record) -> None:
        """The request's class or priority changed."""

    def abort(self, records: list[Record]) -> None:
        """End requests and tell their clients."""

    # Questions about one request

    def obstacle(self, record: Record, kv: str) -> str | None:
        """Why this request cannot be held with this `kv` now, or None; nothing stands against `drop` but not `keep`."""

    def in_flight(self, record: Record) -> int:
        """Tokens scheduled whose output has not been processed yet."""

    def ready(self, record: Record) -> bool:
        """Whether a waiting request could run in the next step, as far as it is up to itself."""

    def parkable(self, record: Record) -> bool:
        """Whether a kept request can be parked now: nothing of it is in flight."""

    def resumable(self, record: Record) -> bool:
        """Whether a kept request can go on as it is; if not, it must be parked first."""

    def waits_with_kv(self, record: Record) -> bool:
        """Whether it waits to be admitted again and has KV, as after a park."""

    def frees(self, record: Record) -> int:
        """KV blocks that are free at once when this request's KV is dropped; shared ones are not."""

    def in_transit(self, record: Record) -> bool:
        """Whether a step with this request in it was scheduled and has not come back."""

    def needs(self, record: Record, enough: int) -> int:
        """KV blocks that it takes to let it run; where that is within `enough`, an upper bound will do."""

    # Questions about room

    parks: bool
    """Whether this engine can park at all; if not, what must give way is dropped."""

    def free_blocks(self) -> int:
        """KV blocks that nobody has."""

    def step_tokens(self) -> int:
        """Tokens that one step computes at most."""

    def free_slots(self) -> int:
        """Requests that may begin to run in the next step; below 0 when more run than should."""

    def spare_slots(self) -> int:
        """Holds that would cost no other request its slot; below 0 when holds do."""

    def released(self) -> list[Record]:
        """Those that were released from a park and have not been admitted since: the next steps will, in any order."""

    def worst_running(self) -> Iterator[Record]:
        """Running requests, worst first: by class and priority, then the latest admitted."""
