"""How many output tokens a tenant was delivered, without looking at each of its requests in Python. Pure.

And how many more are expected, where somebody said what to expect: that does look at each of them.

vLLM appends to a list per request as tokens are delivered. What a tenant got is the lengths of those lists, which C
sums at some 20 ns each: whose turn it is, is asked in every step that admits, with a thousand requests running.
Started and stopped by `roster.py` as requests get and lose their slot, read by `Account.settle` and `ledger.py`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coxswain.service.scheduler.record import Record


class Meter:
    """The output tokens of one tenant's requests. Each record's `settled` is how many of its own are in `past`."""

    __slots__ = ("expected", "lists", "past")

    def __init__(self) -> None:
        self.lists: dict[Record, list[Any]] = {}
        """vLLM's lists of those that have a slot."""
        self.past = 0
        """Tokens that are in none of the lists."""
        self.expected: dict[Record, float] = {}
        """Of requests that were admitted: how many tokens they were expected to have, until they have had them."""

    def start(self, record: "Record") -> None:
        """The request got a slot: its list grows."""
        self.lists[record] = record.outputs
        self.past -= record.settled

    def stop(self, record: "Record") -> None:
        """It lost its slot, or ended."""
        del self.lists[record]
        record.settled = 0
        self.catch_up(record)

    def catch_up(self, record: "Record") -> None:
        """Count what was in flight when the request lost its slot, and has been delivered since."""
        if record not in self.lists:
            self.past += len(record.outputs) - record.settled
            record.settled = len(record.outputs)

    def fold(self, record: "Record") -> None:
        """Its list is about to be emptied: a session's output becomes input. Keep the count."""
        self.catch_up(record)
        if record in self.lists:
            self.past += len(record.outputs)
        record.settled = len(record.outputs)

    def read(self) -> int:
        """All tokens delivered so far."""
        return self.past + sum(map(len, self.lists.values()))

    def owed(self) -> float:
        """Tokens that are expected and were not delivered yet."""
        owed, over = 0.0, []
        for record, expected in self.expected.items():
            more = expected - len(record.outputs)
            if more > 0.0:
                owed += more
            else:
                over.append(record)
        for record in over:
            del self.expected[record]
        return owed
