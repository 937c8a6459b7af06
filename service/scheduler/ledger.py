"""What requests cost: input charged at admission, output as delivered, and what had to be computed twice. Pure.

The core says what happened; prices, weights and virtual time are the tenants' (`tenants.py`, docs/protocol.md).
"""

from coxswain.service.scheduler.queue import SteeredQueue
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.roster import Roster
from coxswain.service.scheduler.tenants import Account, Tenants


class Ledger:
    """Charges the work of one engine to its tenants and counts recomputed tokens."""

    def __init__(self, roster: Roster, tenants: Tenants, queue: SteeredQueue) -> None:
        self._roster = roster
        self._tenants = tenants
        self._queue = queue
        self.preempted_total = 0
        """Times that a request lost its KV, by vLLM or by us."""
        self.recomputed_total = 0
        """Positions computed again."""

    # Input

    def charge_input(self, record: Record, cached: int) -> None:
        """Charge the input, of which `cached` tokens need no computing, less what was charged for it before."""
        record.cached_tokens = cached
        record.uncached_tokens = record.prompt_tokens - cached
        prices = self._tenants.prices
        self._charge_to(record, record.uncached_tokens * prices.input + cached * prices.cached)

    def refund_input(self, record: Record) -> None:
        """Undo `charge_input`: the request was not admitted after all."""
        record.uncached_tokens = record.cached_tokens = 0
        self._charge_to(record, 0.0)

    def book_input(self, record: Record, cached: int) -> None:
        """The request was admitted: charge its input as it turned out, and count it in the tenant's totals."""
        self.charge_input(record, cached)
        account = record.account
        account.uncached_input_tokens += record.uncached_tokens
        account.cached_input_tokens += record.cached_tokens
        account.touch()

    def _charge_to(self, record: Record, cost: float) -> None:
        before = record.charged_input
        if cost != before:
            record.account.charge(cost - before)
            record.charged_input = cost
            if cost < before:
                self.moved_back(record.account)

    def moved_back(self, account: Account) -> None:
        """A tenant's virtual time fell: tell both heaps that order by it."""
        self._tenants.moved_back(account)
        self._queue.moved_back(account)

    # Output and recompute

    def settle(self, record: Record) -> None:
        """Charge what the request was delivered and count what it recomputed since it was last settled."""
        delivered = len(record.outputs)
        if delivered != record.settled:
            account = record.account
            account.output_tokens += delivered - record.settled
            account.charge((delivered - record.settled) * self._tenants.prices.output)
            record.settled = delivered
        if record.lost_mark > record.resumed_at:
            self._settle_recompute(record)

    def _settle_recompute(self, record: Record) -> None:
        again = min(record.payload.num_computed_tokens, record.lost_mark) - record.resumed_at
        if again > record.settled_recompute:
            news = again - record.settled_recompute
            record.recomputed_tokens += news
            record.account.recomputed_tokens += news
            record.account.touch()
            self.recomputed_total += news
            record.settled_recompute = again
        if again == record.lost_mark - record.resumed_at:
            record.resumed_at = record.lost_mark

    def settle_all(self) -> None:
        """Settle whatever may be delivered tokens now: before order or totals are read.

        Once per step, so it looks only at what has a slot. What was in flight when a request lost its KV may be
        delivered later: it is settled when that request moves on.
        """
        for group in (self._roster.running, self._roster.kept):
            for record in group:
                if len(record.outputs) != record.settled or record.lost_mark > record.resumed_at:
                    self.settle(record)

    def lose_kv(self, record: Record) -> None:
        """The KV of a request is about to be freed, by vLLM or by us: remember what had been computed."""
        self.settle(record)
        record.lost_mark = max(record.lost_mark, record.payload.num_computed_tokens)
        record.resumed_at = record.lost_mark
        self.preempted_total += 1

    def resume(self, record: Record, computed: int) -> None:
        """The request computes again; its first `computed` positions were there without computing."""
        record.resumed_at = computed
        record.settled_recompute = 0

    def validate(self) -> None:
        """Check every invariant; for tests."""
        for record in self._roster.records.values():
            assert 0 <= record.settled <= len(record.outputs), record
