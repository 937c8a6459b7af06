"""Status frames and queries: what a listener knows after any stream of deltas is what is the case."""

from itertools import islice
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from coxswain.schemas.commands import encode
from coxswain.schemas.errors import Code, RefusedError
from coxswain.schemas.policy import ClassPolicy, TenantPolicy, TenantRank
from coxswain.schemas.status import MAX_PAGE, CommandStats, Frame, QueueQuery, RequestStatus, TenantStatus
from coxswain.service.bus import wire
from coxswain.service.bus.board import PATIENCE, Board
from coxswain.service.port import Draft, FrameOut
from coxswain.service.scheduler import report
from coxswain.service.scheduler import rows as module
from coxswain.service.scheduler.lines import MAX_SKIPPED
from coxswain.service.scheduler.report import Gauges, Identity, Reporter
from coxswain.service.scheduler.rows import row, tenant_row
from tests.support.fake_engine import FakeEngine
from tests.support.happenings import OPERATIONS, act, rank

GAUGES = Gauges(
    state="serving", active_slots=4, total_slots=8, total_blocks=100, used_blocks=10, held_blocks=3,
    step_s=0.02, events_dropped=2,
)  # fmt: skip


COMMANDS = CommandStats(
    applied_total=4,
    rejected_total={"404": 1},
    outcomes_total={"abort": {"applied": 4, "404": 1}},
    queue_depth=1,
)


class Reported:
    """An engine and its reporter."""

    def __init__(self, head: int = 64, slots: int = 3) -> None:
        self.engine = FakeEngine(slots=slots)
        self.head = head
        self.reporter = Reporter(self.engine.core, Identity("w1", "01INC", "m", "0.32.0"), head)
        self.board = Board(1.0)
        self.frame(full=True)  # the first one

    def tell(self, *, answer: bool = False) -> Draft:
        """What the engine tells next, across the socket to the bus."""
        told = self.reporter.draft(self.engine.now, GAUGES, COMMANDS, answer=answer)
        message = FrameOut(told, False)
        ((arrived,),) = (
            wire.read_batch(body).messages for body in wire.unpack(bytearray(wire.pack_up(0, [message])))
        )
        assert isinstance(arrived, FrameOut)
        assert self.board.take(arrived.draft)
        return told

    def frame(self, *, full: bool = False, peek: bool = False) -> Frame:
        """The next frame, as the bus makes it."""
        self.tell(answer=peek)
        while self.engine.core.roster.changed and not peek:  # more than one draft holds
            self.tell()
        if full:
            return self.board.full(peek=peek)
        delta = self.board.delta()
        assert delta is not None
        return delta


class Listener:
    """What somebody knows who applies frames as protocol.md says."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int], RequestStatus] = {}
        self.tenants: dict[str, TenantStatus] = {}

    def apply(self, frame: Frame) -> None:
        """A full frame replaces everything; a delta replaces rows and takes out those that are gone."""
        rows = {(row.request, row.child): row for row in frame.requests}
        gone = {(row.request, row.child) for row in frame.gone}
        assert len(rows) == len(frame.requests)
        assert not rows.keys() & gone, "then the order of applying them would matter"
        if frame.full:
            assert not gone
            assert not frame.charged
            assert not frame.bases
            self.requests, self.tenants = {}, {}
        for name in gone:
            del self.requests[name]  # only what was listed can go
        self.requests |= rows
        served = frame.tenants[len(frame.tenants) - len(frame.charged) :]
        assert {each.tenant: each.charged for each in served} == frame.charged
        assert frame.bases.keys() <= frame.charged.keys()
        for each in served:
            fields = "charged", "virtual_time", "output_tokens_total", "oldest_queued_s"
            known = replace(self.tenants[each.tenant], **{field: getattr(each, field) for field in fields})
            known = replace(known, base=frame.bases.get(each.tenant, known.base))
            assert each == known, "nothing else is other: who counts charges alone need not read it"
        self.tenants |= {row.tenant: row for row in frame.tenants}

    def knows(self, frame: Frame) -> None:
        """Everything in a full frame, except ages, which grow by themselves."""
        assert self.requests == {(row.request, row.child): row for row in frame.requests}
        assert {name: timeless(row) for name, row in self.tenants.items()} == {
            row.tenant: timeless(row) for row in frame.tenants
        }

    def knows_the_truth(self, reported: "Reported") -> None:
        """Everything that rows made from scratch, with nothing remembered, would say."""
        core = reported.engine.core
        core.ledger.settle_all()
        waiting = list(core.queue.walk())[: reported.head]
        places = {record: place for place, record in enumerate(waiting)}
        listed = [*core.roster.running, *core.roster.held, *waiting]
        expected = [row(core, record, places.get(record)) for record in listed]
        assert self.requests == {(each.request, each.child): each for each in expected}
        seen = [account for account in core.tenants.accounts.values() if account.seen]
        assert {name: timeless(each) for name, each in self.tenants.items()} == {
            account.name: timeless(tenant_row(account)) for account in seen
        }


def timeless(row: TenantStatus) -> TenantStatus:
    """The row without the age of the oldest request."""
    return replace(row, oldest_queued_s=0.0)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 8),
    st.lists(
        st.tuples(OPERATIONS, st.sampled_from(["", "", "delta", "full", "peek"])), min_size=50, max_size=50
    ),
)
def test_deltas_add_up_to_the_full_frame(
    head: int, happenings: list[tuple[tuple[int, int, int], str]]
) -> None:
    """After any delta, whatever happened since the last one, a listener knows what a full frame would say."""
    reported, listener = Reported(head), Listener()
    listener.apply(reported.frame(full=True))
    for operation, kind in happenings:
        act(reported.engine, *operation)
        if kind == "peek":
            reported.frame(full=True, peek=True)
        elif kind:
            listener.apply(reported.frame(full=kind == "full"))
            listener.knows_the_truth(reported)
            listener.knows(reported.frame(full=True, peek=True))
    listener.apply(reported.frame())
    listener.knows_the_truth(reported)
    listener.knows(reported.frame(full=True, peek=True))


def test_delta_is_empty_when_nothing_changed() -> None:
    """A frame after nothing happened has no rows: what is repeated on the wire is only the envelope."""
    reported = Reported()
    for _ in range(5):
        reported.engine.submit()
    reported.engine.step()
    reported.frame()
    frame = reported.frame()
    assert (frame.requests, frame.tenants, frame.gone) == ((), (), ())


def test_delta_has_places_that_moved_by_charging_alone() -> None:
    """Tokens delivered to one tenant move the other's waiting requests up, and a delta says so."""
    reported = Reported(slots=1)
    engine = reported.engine
    engine.submit("a", prompt=4)
    engine.admit()
    waiting = engine.submit("a"), engine.submit("b")
    rank(engine, "b", base=10)
    listener = Listener()
    listener.apply(reported.frame(full=True))
    assert [listener.requests[each.request, 0].position for each in waiting] == [0, 1]
    engine.deliver(next(iter(engine.running)), 9)
    listener.apply(reported.frame())
    assert [listener.requests[each.request, 0].position for each in waiting] == [1, 0]


def test_a_rank_that_changes_the_base_alone_is_told_in_short() -> None:
    """A controller ranks every tenant again and again: what else a rank changes is told in the row."""
    reported = Reported()
    engine = reported.engine
    for name in "abc":
        engine.submit(name)
    reported.frame(full=True)
    rank(engine, "a", base=10.0)
    rank(engine, "b", base=0.0)
    rank(engine, "c", base=5.0, weight=2.0)
    said = reported.frame()
    assert (said.charged, said.bases) == ({"a": 0.0, "b": 0.0}, {"a": 10.0})
    assert [(each.tenant, each.base) for each in said.tenants] == [("c", 5.0), ("a", 10.0), ("b", 0.0)]
    rank(engine, "c", base=5.0, weight=2.0, expected_output=3.0)
    rank(engine, "a", base=0.0)
    said = reported.frame()
    assert (said.bases, said.tenants[0].tenant, said.tenants[0].expected_output) == ({"a": 0.0}, "c", 3.0)


def test_delta_has_recomputed_totals() -> None:
    """Work that is done again, with no token delivered yet, is news of its tenant."""
    reported = Reported()
    engine = reported.engine
    record = engine.submit(prompt=100)
    engine.admit()
    engine.compute(record, 50)
    engine.run_short(record)
    engine.admit()
    reported.frame()
    engine.compute(record, 20)
    (row,) = reported.frame().tenants
    assert row.recomputed_tokens_total == 20


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(OPERATIONS, st.booleans()), min_size=30, max_size=60))
def test_no_tenants_output_falls_where_rows_wait_for_the_next_frame(
    happenings: list[tuple[tuple[int, int, int], bool]],
) -> None:
    """With more to tell than a draft holds, a tenant and its requests that come and go are told together."""
    reported, most = Reported(), dict[str, int]()
    requests, tenants = module.RequestRows.told, module.TenantRows.told
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.RequestRows, "told", lambda self, _limit: requests(self, 1))
        patch.setattr(module.TenantRows, "told", lambda self, _limit, due: tenants(self, 1, due))
        for operation, tells in happenings:
            act(reported.engine, *operation)
            if tells:
                reported.tell()
                for each in reported.board.full(peek=True).tenants:
                    assert each.output_tokens_total >= most.get(each.tenant, 0)
                    most[each.tenant] = each.output_tokens_total


def test_no_tenants_output_rises_beyond_what_it_is_where_many_requests_end_at_once() -> None:
    """What has ended is in the tenant's row: a draft too small for all that ended tells that it has."""
    count = module.ROWS_PER_STEP + 44
    reported = Reported(slots=count)
    records = [reported.engine.submit("f") for _ in range(count)]
    for _ in records:
        reported.engine.admit()
    for record in records:
        reported.engine.deliver(record, 20)
    reported.frame(full=True)
    for record in records:
        reported.engine.finish(record)
    for _ in range(3):
        reported.tell()
        (tenant,) = reported.board.full(peek=True).tenants
        assert tenant.output_tokens_total == 20 * count


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(OPERATIONS, min_size=30, max_size=60), st.lists(OPERATIONS, max_size=12))
def test_no_tenants_output_falls_where_everything_is_told_anew(
    before: list[tuple[int, int, int]], meanwhile: list[tuple[int, int, int]]
) -> None:
    """To a bus that begins anew, a little at a time: a tenant's row comes when all of its requests are known."""
    reported = Reported(slots=8)
    engine = reported.engine
    for operation in before:
        act(engine, *operation)
    most = {each.tenant: each.output_tokens_total for each in reported.frame(full=True).tenants}
    with pytest.MonkeyPatch.context() as patch:
        for where in (module, report):
            patch.setattr(where, "ROWS_PER_STEP", 2)
        reported.reporter.anew()
        reported.board = Board(1.0)
        while not reported.board.complete:
            reported.tell()
            for each in ((delta := reported.board.delta()) and delta.tenants) or ():
                assert each.output_tokens_total >= most.get(each.tenant, 0)
                most[each.tenant] = each.output_tokens_total
            if meanwhile:
                act(engine, *meanwhile.pop())
    assert most.keys() <= {each.tenant for each in reported.board.full().tenants}


def test_what_many_requests_were_delivered_is_told_with_the_last_of_them() -> None:
    """600 run for one tenant when the bus begins anew: its row waits for the third draft."""
    reported = Reported(slots=600)
    engine = reported.engine
    records = [engine.submit("f") for _ in range(600)]
    for _ in records:
        engine.admit()
    for record in records:
        engine.deliver(record, 20)
    (known,) = reported.frame(full=True).tenants
    reported.reporter.anew()
    reported.board = Board(1.0)
    told = []
    while not reported.board.complete:
        reported.tell()
        delta = reported.board.delta()
        told += [] if delta is None else delta.tenants
    told += reported.board.full().tenants
    assert {(each.output_tokens_total, each.charged) for each in told} == {(12_000, known.charged)}


def test_a_delta_says_what_a_full_frame_would_where_rows_wait_for_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a tenant's requests that end at once one is told before the other, and the tenant's row once."""
    reported, listener = Reported(slots=6), Listener()
    engine = reported.engine
    for name in "abcdff":
        engine.submit(name)
    last = [engine.admit() for _ in "abcdff"][-2:]
    for record in last:
        engine.deliver(record, 20)
    listener.apply(reported.frame(full=True))
    for name in "abcd":
        rank(engine, name, base=3.0)
    for record in last:
        engine.finish(record)
    for where in (module, report):
        monkeypatch.setattr(where, "ROWS_PER_STEP", 1)
    assert {record.account.name for record in last} == {"f"}
    while engine.core.roster.changed:
        reported.tell()
        delta = reported.board.delta()
        assert delta is not None
        listener.apply(delta)
        listener.knows(reported.board.full(peek=True))
    listener.knows_the_truth(reported)


def test_what_was_in_flight_of_a_dropped_request_is_in_the_next_full_frame() -> None:
    """Tokens that arrive after the KV was freed touch nothing: deltas may miss them, a full frame does not."""
    reported = Reported()
    record = reported.engine.submit()
    reported.engine.admit()
    reported.engine.core.holds.hold(reported.engine.now, record, "operator", "drop", None, "")
    reported.frame(full=True)
    reported.engine.deliver(record, 2)
    assert [each.output_tokens for each in reported.frame(full=True).requests] == [2]


def test_tenants_age_grows_in_full_frames_without_other_news() -> None:
    """How long a tenant's oldest request waits is as of now in every full frame, and no news by itself."""
    reported = Reported()
    reported.engine.submit("a")
    reported.frame(full=True)
    reported.engine.wait(3)
    assert reported.frame().tenants == ()
    assert [each.oldest_queued_s for each in reported.frame(full=True).tenants] == [3]


def test_frame_builds_only_the_rows_that_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With thousands held and thousands of tenants, a frame after one change makes one row of each, full or not."""
    reported = Reported(head=8)
    engine = reported.engine
    for i in range(2_000):
        record = engine.submit(f"t{i}")
        engine.core.holds.hold(engine.now, record, "operator", "keep", None, "")
    reported.frame(full=True)
    made: list[str] = []
    for name in ("row", "tenant_row"):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, name=name, real=real: (made.append(name), real(*args))[1]
        )
    for full in (False, True):
        engine.core.reprioritize(engine.now, record, 1 + full, None, "operator")
        record.account.charge(1)
        made.clear()
        frame = reported.frame(full=full)
        # A charge alone needs no new row: its numbers go beside the old one.
        assert made == ["row"]
        assert len(frame.requests) == len(frame.tenants) == (2_000 if full else 1)


def test_requests_that_come_to_wait_are_looked_at_only_where_a_frame_lists_them() -> None:
    """Of a thousand that come between two frames the first few are told, and no frame after it passes the rest."""
    reported = Reported(head=8)
    engine = reported.engine
    for _ in range(1_000):
        engine.submit()
    first = [record.request for record in islice(engine.core.queue.walk(), 8)]
    assert [each.request for _, each, _ in reported.tell().requests] == first
    assert not engine.core.roster.touched
    assert not engine.core.roster.changed


def test_request_that_ends_between_frames_leaves_nothing_behind() -> None:
    """Without frames, as when NATS is away, requests that come and go are not remembered for the next one."""
    reported = Reported()
    engine = reported.engine
    listed = engine.submit()
    reported.frame()
    engine.finish(listed)
    for _ in range(1_000):
        engine.finish(engine.submit())
    assert list(engine.core.roster.touched) == [listed]
    assert [each.request for each in reported.frame().gone] == [listed.request]
    assert not engine.core.roster.touched


def test_who_is_gone_is_said_to_have_had_all_of_its_output() -> None:
    """Between the last frame that listed it and its end it was delivered more: nobody else would tell."""
    reported = Reported()
    record = reported.engine.submit()
    reported.engine.admit()
    reported.engine.deliver(record, 3)
    assert [row.output_tokens for row in reported.frame().requests] == [3]
    reported.engine.deliver(record, 2)
    reported.engine.finish(record)
    assert [(gone.request, gone.output_tokens) for gone in reported.frame().gone] == [(record.request, 5)]


def test_delta_has_the_new_prompt_of_a_session() -> None:
    """A streaming session's next turn is news, though nothing of it was delivered yet."""
    reported = Reported()
    record = reported.engine.submit(prompt=10)
    reported.engine.admit()
    reported.frame()
    reported.engine.core.next_turn_begins(record)
    reported.engine.core.next_turn(record, 15)
    assert [row.prompt_tokens for row in reported.frame().requests] == [15]


def test_name_that_is_used_again_at_once_is_not_gone() -> None:
    """A client that repeats its id right after the first request ended has a request that is there."""
    reported = Reported()
    first = reported.engine.submit(request="same")
    reported.frame()
    reported.engine.finish(first)
    reported.engine.submit(request="same", prompt=99)
    frame = reported.frame()
    assert frame.gone == ()
    assert [(row.request, row.child, row.prompt_tokens) for row in frame.requests] == [("same", 0, 99)]


def test_peek_takes_no_note() -> None:
    """A full frame for a query leaves the stream of deltas as it was: what is news stays news, and has no revision."""
    reported = Reported()
    reported.engine.submit()
    revision = reported.frame().revision
    reported.engine.submit()
    assert reported.frame(full=True, peek=True).revision == 0
    assert reported.engine.core.roster.changed, "or a sleeping engine would keep it to itself"
    frame = reported.frame()
    assert (len(frame.requests), frame.revision) == (1, revision + 1)


def test_everything_is_told_anew_a_little_at_a_time() -> None:
    """To a bus that knows nothing: no draft has more rows than a step can bear, and the last makes everything known."""
    reported = Reported(head=2)
    engine = reported.engine
    for number in range(600):
        record = engine.submit(f"t{number}")
        if number % 2:
            engine.core.holds.hold(engine.now, record, "operator", "keep", None, "")
    before = reported.frame(full=True)
    engine.finish(record)
    reported.reporter.anew()
    drafts = [reported.tell()]
    assert drafts[0].frame.revision > before.revision + 1, "who ended meanwhile is not told: a gap says so"
    while not drafts[-1].complete:
        assert not reported.board.complete, "a full frame would lack rows"
        drafts.append(reported.tell())
    assert [draft.fresh for draft in drafts] == [True] + [False] * (len(drafts) - 1)
    assert max(len(draft.requests) for draft in drafts) <= module.ROWS_PER_STEP + 2
    assert max(len(draft.tenants) for draft in drafts) <= module.ROWS_PER_STEP
    after = reported.board.full()
    assert {row.request for row in before.requests} - {row.request for row in after.requests} == {
        record.request
    }
    assert len(after.tenants) == len(before.tenants) == 600


def test_tenants_that_were_only_ranked_are_no_news_to_a_bus_that_begins_anew() -> None:
    """A controller ranks thousands that never came here: they have no rows, and keep no full frame waiting."""
    reported = Reported()
    core = reported.engine.core
    reported.engine.submit("a")
    for number in range(10 * module.ROWS_PER_STEP):
        core.rank(f"t{number}", TenantRank(base=5.0, weight=2.0))
    reported.frame()
    reported.reporter.anew()
    draft = reported.tell()
    assert draft.complete
    assert [told.tenant for told, *_ in draft.tenants] == ["a"]
    assert not core.tenants.touched
    reported.engine.submit("t7")
    assert [(told.tenant, told.base) for told, *_ in reported.tell().tenants] == [("t7", 5.0)]


def test_a_bus_that_missed_something_says_so_and_makes_nothing_of_the_rest() -> None:
    """Rows told by what changed are worth nothing with a gap: everything is told anew, and then all is as it was."""
    reported = Reported()
    missed: list[None] = []
    board = Board(1.0, lambda: missed.append(None))

    def draft() -> Draft:
        return reported.reporter.draft(reported.engine.now, GAUGES, COMMANDS)

    reported.engine.submit("a")
    assert not board.take(draft()), "of what was told before it was there it knows nothing, and was told so"
    reported.reporter.anew()
    assert board.take(draft())
    reported.engine.submit("b")
    draft()
    reported.engine.submit("c")
    assert not board.take(draft())
    assert (len(missed), board.complete, board.delta()) == (1, False, None)
    assert not board.take(draft())
    assert len(missed) == 1
    reported.reporter.anew()
    assert board.take(draft())
    assert [row.tenant for row in board.full().requests] == ["a", "b", "c"]


def test_a_bus_asks_again_when_what_it_asked_for_was_lost() -> None:
    """The first of what is told anew never came: or status would be silent for as long as the bus lives."""
    reported = Reported()
    missed: list[None] = []
    board = Board(1.0, lambda: missed.append(None))

    def draft() -> Draft:
        return reported.reporter.draft(reported.engine.now, GAUGES, COMMANDS)

    draft()
    for _ in range(PATIENCE - 1):
        assert not board.take(draft())
    assert not missed, "what was under way when it was asked for is no reason to ask again"
    assert not board.take(draft())
    assert len(missed) == 1
    reported.reporter.anew()
    assert board.take(draft())
    assert board.complete


def test_output_is_charged_by_whoever_looks() -> None:
    """The engine settles nobody for a frame, and what a frame says is what it would have if it had."""
    reported = Reported()
    engine = reported.engine
    record = engine.submit(prompt=10)
    engine.admit()
    reported.frame(full=True)
    engine.deliver(record, 7)
    (row,) = reported.frame().tenants
    assert (record.account.output_tokens, record.account.charged) == (0, 10)
    assert (row.output_tokens_total, row.charged, row.virtual_time) == (7, 24, 24)
    rank(engine, "a", weight=0.5)
    engine.deliver(record, 1)
    (row,) = reported.frame().tenants
    assert (row.output_tokens_total, row.charged) == (8, 28)


@pytest.mark.parametrize("head", [0, 3, 64])
def test_frame_lists_who_runs_who_is_held_and_the_first_k_waiting(head: int) -> None:
    """Running and held requests are all listed, of the waiting ones the first K, each with its place."""
    reported = Reported(head)
    engine = reported.engine
    for i in range(20):
        engine.submit("ab"[i % 2])
    held = engine.submit()
    engine.core.holds.hold(engine.now, held, "operator", "keep", None, "")
    running = [engine.admit() for _ in range(3)]
    frame = reported.frame(full=True)
    waiting = list(engine.core.queue.walk())
    listed = {row.request: row for row in frame.requests}
    assert listed.keys() == {each.request for each in (*running, held, *waiting[:head])}
    assert [listed[each.request].position for each in waiting[:head]] == list(range(min(head, len(waiting))))
    assert {listed[each.request].state for each in running} == {"running"}
    assert (listed[held.request].held_by, listed[held.request].position) == (("operator",), None)
    assert (frame.queued, frame.running, frame.held, frame.slots.held) == (17, 3, 1, 0)


def test_row_says_what_is_known_of_a_request() -> None:
    """Counts, KV and the class's deadline are in the row, as of now."""
    reported = Reported()
    engine = reported.engine
    engine.core.configure({"chat": ClassPolicy(slo_s=2.5)}, {"a": TenantPolicy(class_="chat")})
    record = engine.submit(prompt=10, priority=3)
    engine.admit(cached=4)
    engine.compute(record)
    engine.core.holds.hold(engine.now, record, "operator", "keep", None, "")
    (row,) = reported.frame(full=True).requests
    assert row == RequestStatus(
        request="r1", child=0, tenant="a", class_="chat", priority=3, state="held", kv="kept",
        arrived_at=1_000.0, prompt_tokens=10, cached_tokens=4, output_tokens=1, deadline_s=1_002.5,
        held_by=("operator",), position=None,
    )  # fmt: skip


def test_tenants_row_has_totals_and_the_age_of_its_oldest() -> None:
    """Totals are cumulative, and a tenant that was only ranked is not listed."""
    reported = Reported()
    engine = reported.engine
    rank(engine, "only-ranked", base=4)
    done = engine.submit("a", prompt=10)
    engine.admit()
    engine.deliver(done, 3)
    engine.finish(done)
    engine.submit("a")
    engine.wait(7)
    (row,) = reported.frame(full=True).tenants
    assert (row.tenant, row.queued, row.running, row.held, row.oldest_queued_s) == ("a", 1, 0, 0, 7)
    assert (row.uncached_input_tokens_total, row.output_tokens_total, row.finished_total) == (10, 3, 1)
    assert row.virtual_time == row.base + row.charged + row.lift == 16


def test_tenants_row_says_nothing_of_what_is_nothing() -> None:
    """On the wire only what differs from its default: a fleet has hundreds of thousands of rows, most of the idle."""
    reported = Reported()
    engine = reported.engine

    def told() -> Any:
        (row,) = msgspec.json.decode(encode(reported.frame(full=True)))["tenants"]
        return row

    done = engine.submit("a", prompt=10)
    assert told() == {"tenant": "a", "queued": 1}
    engine.admit()
    engine.deliver(done, 3)
    engine.finish(done)
    assert (
        told().keys().isdisjoint({"weight", "base", "lift", "expected_output", "oldest_queued_s", "queued"})
    )


def test_leader_is_as_last_heard() -> None:
    """Epoch, age and policy of the leader; nothing before one was heard."""
    reported = Reported()
    assert reported.frame().leader.epoch is None
    reported.engine.lead(2.0, 3)
    reported.engine.wait(1.5)
    leader = reported.frame().leader
    assert (leader.epoch, leader.age_s, leader.policy) == ((2.0, 3), 1.5, "vtc")


# Queries


def pages(reported: Reported, limit: int) -> list[Any]:
    """All pages of the queue."""
    found = [reported.reporter.page(QueueQuery(limit=limit))]
    while found[-1].next is not None:
        found.append(reported.reporter.page(QueueQuery(after=found[-1].next, limit=limit)))
    return found


@pytest.mark.parametrize(("waiting", "limit"), [(0, 10), (1, 1), (20, 7), (21, 7), (2_500, 5_000)])
def test_pages_cover_the_queue_once(waiting: int, limit: int) -> None:
    """A queue that does not move is listed by its pages in order, each request once, with its place."""
    reported = Reported()
    reported.engine.core.configure({"gold": ClassPolicy(position=-1)}, {"c": TenantPolicy(class_="gold")})
    for i in range(waiting):
        reported.engine.submit("abc"[i % 3], priority=i % 5)
    found = pages(reported, limit)
    rows = [row for page in found for row in page.requests]
    assert [row.request for row in rows] == [each.request for each in reported.engine.core.queue.walk()]
    assert [row.position for row in rows] == list(range(waiting))
    assert {page.total for page in found} == {waiting}
    assert max(len(page.requests) for page in found) <= min(limit, MAX_PAGE)


@pytest.mark.parametrize("after", ["x", "-1", "1.5", "9" * 5_000])
def test_page_after_nonsense_is_refused(after: str) -> None:
    """Only what a page gave as `next` continues it."""
    with pytest.raises(RefusedError) as refusal:
        Reported().reporter.page(QueueQuery(after=after))
    assert refusal.value.code == Code.MALFORMED


@pytest.mark.parametrize("overdue", [False, True])
@pytest.mark.parametrize("after", ["5", "9" * 20])
def test_page_after_the_end_is_empty(after: str, overdue: bool) -> None:
    """A queue that shrank meanwhile has nothing left to list, also while a class is overdue."""
    reported = Reported()
    core = reported.engine.core
    core.configure({"default": ClassPolicy(ageing_s=1.0 if overdue else None)}, {})
    reported.engine.submit()
    for now in (0.0, 5.0):
        core.queue.age(now)
    assert bool(core.queue._aged_heads()) is overdue
    page = reported.reporter.page(QueueQuery(after=after))
    assert (page.requests, page.next, page.total) == ((), None, 1)


@pytest.mark.parametrize("order", ["fair", "priority"])
def test_pages_deep_in_the_queue_are_as_cheap_as_its_order_allows(order: str) -> None:
    """Far places are where they belong, in both orders, among requests that have left meanwhile."""
    reported = Reported()
    engine = reported.engine
    engine.core.configure({"default": ClassPolicy(order=order)}, {})
    submitted = [
        engine.submit("abbc"[i % 4], priority=i * 7919 % 11, arrived_at=float(i * 31 % 7))
        for i in range(4 * MAX_SKIPPED)
    ]
    for record in submitted[::4]:
        engine.core.queue.remove(record)
    in_order = [record.request for record in engine.core.queue.walk()]
    assert len(in_order) == 3 * MAX_SKIPPED
    for skip in (MAX_SKIPPED - 1, MAX_SKIPPED, MAX_SKIPPED + 1, len(in_order) - 1):
        page = reported.reporter.page(QueueQuery(after=str(skip), limit=10))
        assert [row.request for row in page.requests] == in_order[skip : skip + 10]


def test_request_is_told_with_its_place_and_story() -> None:
    """A question about one request gives every child, its place in the queue, and what happened to it."""
    reported = Reported()
    engine = reported.engine
    engine.submit()
    child = engine.submit(request="x")
    engine.submit(request="x")
    engine.core.holds.hold(engine.now, child, "operator", "keep", engine.now + 5, "")
    report = reported.reporter.request("chatcmpl-x")
    assert report.request == "x"
    assert [(each.status.state, each.status.position) for each in report.children] == [
        ("held", None),
        ("queued", 1),
    ]
    assert [line.kind for line in report.children[0].story] == ["queued", "held"]
    assert "by=operator" in report.children[0].story[1].detail


def test_request_that_is_not_here_is_404() -> None:
    """A request that ended or never was is not found."""
    with pytest.raises(RefusedError) as refusal:
        Reported().reporter.request("nobody")
    assert refusal.value.code == Code.NOT_FOUND
