"""What requests cost: input charged at admission, output as delivered, and what had to be computed twice. Pure.

Output that is expected is charged at admission too, before the next pick of the same step; beyond it as it comes, and
what does not come is given back at the end (VTC, OSDI'24, algorithm 3). Nobody expects anything unless told to.

The core says what happened; prices, weights and virtual time are the tenants' (`tenants.py`, docs/protocol.md).
Nothing here costs time per step and request: what was computed follows from where a request stood when something
happened to it. For every request that ended, exactly:

    positions that the device computed
        = uncached input − uncomputed input + recomputed + output − generations + discarded
"""

from collections.abc import Callable

from coxswain.service.scheduler.queue import SteeredQueue
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.roster import Roster
from coxswain.service.scheduler.states import HELD_KEPT, SLOTTED
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
        self._recomputing: dict[Record, None] = {}
        """What computes again at the moment."""
        self.expect: Callable[[Record], float] = _told
        """How many output tokens a request that is admitted will have; 0: wait and see."""

    # Input

    def charge_input(self, record: Record, cached: int) -> None:
        """Charge the input, of which `cached` tokens need no computing, less what was charged for it before."""
        record.cached_tokens = cached
        record.uncached_tokens = record.prompt_tokens - cached
        prices = self._tenants.prices
        self._charge_to(record, record.uncached_tokens * prices.input + cached * prices.cached)
        account = record.account
        if record not in account.meter.expected and (tokens := self.expect(record)) > 0.0:
            account.meter.expected[record] = tokens
            self.settle_output(account)

    def refund_input(self, record: Record) -> None:
        """Undo `charge_input`: the request was not admitted after all."""
        record.uncached_tokens = record.cached_tokens = 0
        self._charge_to(record, 0.0)
        self._expect_no_more(record)
        if record.account.ahead:  # or there is nothing to give back
            self.settle_output(record.account)

    def book_input(self, record: Record, cached: int, external: int) -> None:
        """The request was admitted: charge its input as it turned out, and count it in the tenant's totals."""
        self.charge_input(record, cached)
        record.has_kv = True
        record.external_tokens = min(external, cached)
        account = record.account
        account.uncached_input_tokens += record.uncached_tokens
        account.cached_input_tokens += record.cached_tokens
        account.external_input_tokens += record.external_tokens
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
        record.account.meter.catch_up(record)
        record.account.touch()  # of what it was delivered, more is in no list that grows
        self.settle_output(record.account)
        if record.lost_mark > record.resumed_at:
            self._settle_recompute(record)

    def settle_output(self, account: Account) -> None:
        """Charge a tenant what its requests were delivered."""
        meter = account.meter
        if not (meter.expected or account.ahead):
            account.settle()
            return
        self._tenants.ahead[account] = None
        before = account.virtual_time
        news = meter.read() - account.output_tokens
        account.deliver(news, self._tenants.prices.output, meter.owed())
        if account.virtual_time < before:
            self.moved_back(account)

    def learn(self, account: Account, tokens: float) -> None:
        """So many output tokens are expected of each request that the account has admitted from now on.

        If nothing was until now, of those that run as well. They were admitted together, before any had ended; of
        two tenants that learn one after the other, the second would be let in again and again until they ended.
        """
        first = account.expected_output == 0.0
        account.expected_output = tokens
        if first and tokens > 0.0:
            expected = account.meter.expected
            for record in account.meter.lists:
                expected.setdefault(record, tokens)
            self.settle_output(account)

    def _expect_no_more(self, record: Record) -> None:
        """It ended, or was not admitted after all: what was expected of it is given back when it is settled."""
        record.account.meter.expected.pop(record, None)

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
            self._recomputing.pop(record, None)

    def settle_all(self) -> None:
        """Settle every tenant: before prices change, or everybody's weight. All of them are news for status then.

        What was in flight when a request lost its KV may be delivered later: it is settled when that request moves on.
        """
        self.settle_counts()
        for account in self._tenants.accounts.values():
            if account not in self._tenants.ahead:
                account.settle()
            self._tenants.touched.setdefault(account, False)

    def settle_counts(self) -> None:
        """Settle what a frame shows and nobody can work out by himself: what is charged ahead, and recompute."""
        self.settle_ahead()
        for record in list(self._recomputing):
            self._settle_recompute(record)

    def settle_ahead(self) -> None:
        """Settle who is charged for output that is expected: before every step that admits.

        Their virtual times may have fallen, which no heap sees by itself. All others' only grow: they are settled
        when somebody looks at their rank (`Account.rank`), and of a thousand tenants few are looked at.
        """
        for account in list(self._tenants.ahead):
            self.settle_output(account)
            if not (account.ahead or account.meter.expected):
                del self._tenants.ahead[account]

    def lose_kv(self, record: Record) -> None:
        """The KV of a request is about to be freed, by vLLM or by us: remember what had been computed."""
        self.settle(record)
        self._recomputing.pop(record, None)
        record.lost_mark = max(record.lost_mark, record.payload.num_computed_tokens)
        record.resumed_at = record.lost_mark
        record.has_kv = False
        self.preempted_total += 1

    def resume(self, record: Record, computed: int, external: int) -> None:
        """The request computes again; its first `computed` positions were there without computing.

        Of these, `external` were loaded by a KV connector.
        """
        if record.has_kv:  # it waited with it: parked, or a session between two turns
            return
        record.has_kv = True
        record.resumed_at = computed
        record.settled_recompute = 0
        if record.lost_mark > computed:
            self._recomputing[record] = None
        account = record.account
        found = min(computed, record.lost_mark)
        reloaded = min(external, found)
        record.restored_tokens += found - reloaded
        record.reloaded_tokens += reloaded
        account.restored_tokens += found - reloaded
        account.reloaded_tokens += reloaded
        # Input that it had not reached yet, and need not compute now: others with its prefix have.
        self._spare(record, computed - found)
        account.touch()

    def load_failed(self, record: Record, begin: int, in_vain: int) -> None:
        """Loading failed in a step that began at `begin`: the `in_vain` positions it computed count for nothing.

        What was to be there from where the request stands now until `begin` stays counted as input or as reloaded,
        and is recomputed.
        """
        self._discard(record, in_vain)
        valid = record.payload.num_computed_tokens
        record.lost_mark = max(record.lost_mark, begin)
        record.resumed_at, record.settled_recompute = valid, 0
        if record.lost_mark > valid:
            self._recomputing[record] = None

    # What was computed for nothing, or never

    def reject_drafts(self, record: Record, drafts: int) -> None:
        """Drafts were computed, and vLLM is about to take them off what the request has computed.

        Where their positions had been computed before, with KV that was lost, they count as recomputed; once more when
        they are computed once more, which may never be.
        """
        if record.lost_mark > record.resumed_at:
            self._settle_recompute(record)
        computed = record.payload.num_computed_tokens
        stands = computed - drafts
        again = max(0, min(computed, record.lost_mark) - stands)
        if again:
            record.resumed_at, record.settled_recompute = stands, 0
            self._recomputing[record] = None
        self._discard(record, drafts - again)

    def _discard(self, record: Record, positions: int) -> None:
        record.discarded_tokens += positions
        record.account.discarded_tokens += positions
        record.account.touch()

    def _spare(self, record: Record, tokens: int) -> None:
        record.uncomputed_tokens += tokens
        record.account.uncomputed_input_tokens += tokens

    def end_turn(self, record: Record, in_flight: int) -> None:
        """A session's turn ended: `in_flight` positions were computed beyond its last token."""
        self._expect_no_more(record)
        self.settle(record)
        self._recomputing.pop(record, None)
        if not record.has_kv:
            over = max(0, record.lost_mark - (record.prompt_tokens + len(record.outputs) - 1))
            self._discard(record, over)
            record.lost_mark -= over
            record.resumed_at = record.lost_mark
            return
        self._discard(record, in_flight)
        record.lost_mark = min(record.lost_mark, record.payload.num_computed_tokens - in_flight)
        record.resumed_at = record.lost_mark

    def fold_turn(self, record: Record) -> None:
        """A session's output is about to become input, and its list of outputs to be emptied: charge it first."""
        self._expect_no_more(record)
        self.settle(record)
        record.account.meter.fold(record)

    def begin_turn(self, record: Record, prompt_tokens: int) -> None:
        """A session goes on with more input: charge and count it. Its KV so far is there."""
        record.earlier_outputs += record.settled
        record.settled = 0
        record.earlier_turns += 1
        record.prompt_tokens = prompt_tokens
        news = prompt_tokens - record.payload.num_computed_tokens
        record.uncached_tokens += news
        record.account.uncached_input_tokens += news
        record.account.charge(news * self._tenants.prices.input)
        record.account.touch()

    def close(self, record: Record) -> None:
        """The request ended: charge what it was delivered and count what was computed for nothing, or never."""
        if record.admitted_at is None:
            if record.uncached_tokens or record.cached_tokens:  # its KV was being loaded
                self.refund_input(record)
            return
        self._expect_no_more(record)
        # Its tenant is settled when somebody looks at it: it may have a thousand that run.
        record.account.meter.catch_up(record)
        if record.lost_mark > record.resumed_at:
            self._settle_recompute(record)
        self._recomputing.pop(record, None)
        done = max(record.lost_mark, record.payload.num_computed_tokens if record.has_kv else 0)
        used = record.prompt_tokens + max(0, len(record.outputs) - 1)
        if done > used:
            self._discard(record, done - used)
        elif done < used:
            self._spare(record, used - done)
            record.account.touch()

    def validate(self) -> None:
        """Check every invariant; for tests."""
        for record in self._roster.records.values():
            assert 0 <= record.settled <= len(record.outputs), record
            assert (record in record.account.meter.lists) == (record.state in SLOTTED), record
            assert record.lost_mark <= record.resumed_at or record in self._recomputing, record
            assert record.has_kv or record.state is not HELD_KEPT, record
        live = set(self._roster.records.values())
        for account in self._tenants.accounts.values():
            assert account in self._tenants.ahead or not (account.ahead or account.meter.expected), account
            assert account.meter.expected.keys() <= live, account


def _told(record: Record) -> float:
    return record.account.expected_output
