"""The port between the steering core and the engine that it steers.

The vLLM shell (`steered.py`) implements it; the core and its holds call it. Nothing else of an engine is known here.
"""

from typing import Protocol

from coxswain.service.scheduler.record import Record


class Engine(Protocol):
    """What the core can make the engine do. Each takes effect from the very next step."""

    def obstacle(self, record: Record, kv: str) -> str | None:
        """Why this request cannot be held with this `kv` now, or None."""

    def hold(self, record: Record) -> None:
        """Stop scheduling a running request; keep its KV and its slot."""

    def drop(self, record: Record) -> None:
        """Free the KV of a running or kept request; it goes to no queue."""

    def resume(self, record: Record) -> None:
        """Schedule a kept request again."""

    def enqueue(self, record: Record) -> None:
        """Put a released request back into the waiting queue."""

    def dequeue(self, record: Record) -> None:
        """Take a waiting request out of the engine's bookkeeping of waiting requests."""

    def reprioritized(self, record: Record) -> None:
        """The request's class or priority changed."""

    def abort(self, records: list[Record]) -> None:
        """End requests and tell their clients."""

    def in_flight(self, record: Record) -> int:
        """Tokens scheduled whose output has not been processed yet."""
