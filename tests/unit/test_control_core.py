"""The control core: what it sends, to whom, when, and when it keeps quiet."""

from itertools import pairwise

from msgspec.structs import replace

from coxswain.control.core import BEAT_S, EXPIRES_S, MAX_RANK_ROWS, RANK_ROWS_PER_STEP, Answer, Beat, Send
from coxswain.control.policies.fcfs import Fcfs
from coxswain.control.policies.vtc import Vtc
from coxswain.control.policy import Directives
from coxswain.control.told import ANSWER_S, ECHO_S
from coxswain.schemas.commands import encode
from coxswain.schemas.policy import ClassPolicy, Prices, TenantPolicy, TenantRank, digest
from coxswain.schemas.status import Leader
from tests.support.control import EPOCH, Driver, Fixed
from tests.support.frames import frame, row

CLASSES = {"batch": ClassPolicy(position=1)}
TENANTS = {"acme": TenantPolicy(weight=2.0)}


def test_only_a_leader_says_anything() -> None:
    """A standby watches in silence; when it gets the lease it speaks at once, heartbeat first."""
    driver = Driver(Fcfs(Fcfs.Params()))
    driver.epoch = None
    assert driver.step(0.0, frame()) == []
    driver.epoch = EPOCH
    first, second = driver.step(0.1, frame(seq=2))
    assert isinstance(first, Beat)
    assert first.lead.epoch == EPOCH
    assert isinstance(second, Send)
    assert second.verb == "configure"


def test_the_heartbeat_comes_twice_a_second_and_says_what_it_sees() -> None:
    """Workers hear `lead` every half second, with the number of workers and requests that the leader sees."""
    driver = Driver(Fixed())
    beats = []
    for tick in range(41):
        status = frame("w1", "01A", tick, row("a", queued=2, running=1), queued=2, running=1)
        beats += [each for each in driver.step(tick * 0.05, status) if isinstance(each, Beat)]
    assert len(beats) == 1 + int(2.0 / BEAT_S)
    sight = beats[-1].lead.sees
    assert (sight.workers, sight.tenants, sight.queued, sight.running) == (1, 1, 2, 1)


def test_a_new_incarnation_is_greeted_before_it_is_commanded() -> None:
    """A restarted worker obeys no controller before it has heard `lead`, so that goes first, at once."""
    driver = Driver(Fcfs(Fcfs.Params()))
    driver.step(0.0, frame())
    outgoing = driver.step(0.1, frame("w1", "01B", 1))
    assert [type(each) for each in outgoing] == [Beat, Send]


def test_commands_carry_epoch_id_and_deadline() -> None:
    """Every command can be fenced, recognised when repeated, and refused when late."""
    driver = Driver(Fcfs(Fcfs.Params()))
    driver.tenants = TENANTS
    (send,) = driver.sends(50.0, frame())
    assert (send.command.epoch, send.command.issuer) == (EPOCH, "c1")
    assert send.command.id == "id0"


def test_deadlines_are_told_by_the_workers_clock() -> None:
    """A worker whose clock is an hour off is steered all the same: its frames say what time it is."""
    driver = Driver(Fcfs(Fcfs.Params()))
    driver.tenants = TENANTS
    (send,) = driver.sends(50.0, replace(frame(), sent_at=3_650.0))
    assert send.command.expires_at == 3_650.0 + EXPIRES_S


def test_tables_that_a_worker_has_are_not_sent_again() -> None:
    """The worker's own digest decides, not what was sent: it is silent while they agree."""
    driver = Driver(Fixed())
    driver.classes, driver.tenants = CLASSES, TENANTS
    have = digest(CLASSES, TENANTS)
    assert driver.sends(0.0, frame(config=have)) == []
    (send,) = driver.sends(0.1, frame("w1", "01B", 1))
    assert (dict(send.command.classes), dict(send.command.tenants)) == (CLASSES, TENANTS)


def test_a_table_edit_reaches_every_worker_once() -> None:
    """A changed row goes to each live worker, and again only if its status does not show it in time."""
    driver = Driver(Fixed())
    driver.sends(0.0, frame("w1"), frame("w2"))
    driver.tenants = TENANTS
    sends = driver.sends(0.1)
    assert {send.worker for send in sends} == {"w1", "w2"}
    ok = [Answer(send, ok=True) for send in sends]
    assert driver.sends(0.2, answers=ok) == []
    later = 0.1 + ECHO_S + 0.1
    echoed = frame("w1", "01A", 2, config=digest({}, TENANTS))
    assert [send.worker for send in driver.sends(later, echoed, frame("w2", "01A", 2))] == ["w2"]


class Older:
    """Times at which a worker that does not know a field of the class table is sent both tables."""

    def __init__(self, driver: Driver, config: str) -> None:
        self.config = config
        self.ignored: tuple[str, ...] = ("classes.batch.new",)
        self.sent: list[float] = []
        self._driver = driver
        self._answers: list[Answer] = []
        self._tick = 0

    def live(
        self, seconds: float, *, lost: frozenset[int] = frozenset(), applies: str | None = None
    ) -> list[float]:
        """Its status goes out twenty times a second but for the `lost` ticks; `configure` leaves it with `applies`."""
        began = len(self.sent)
        for tick in range(int(seconds * 20)):
            self._tick += 1
            now = self._tick * 0.05
            status = () if tick in lost else (frame(seq=self._tick, config=self.config),)
            sends = self._driver.sends(now, *status, answers=self._answers)
            assert {send.verb for send in sends} <= {"configure"}
            self._answers = [Answer(send, ok=True, ignored=self.ignored) for send in sends]
            self.sent += [now for _ in sends]
            self.config = applies if sends and applies else self.config
        return self.sent[began:]


def test_a_worker_that_does_not_know_a_field_is_sent_the_tables_once() -> None:
    """What it reports then is all that it can have of them: it is told again when the tables or its report change."""
    driver = Driver(Fixed())
    driver.classes = CLASSES
    worker = Older(driver, digest({}, {}))
    assert len(worker.live(20.0, applies="less")) == 1
    driver.tenants = TENANTS
    assert len(worker.live(20.0, applies="less and more")) == 1
    worker.config = "an operator's own"
    assert len(worker.live(20.0, applies="less and more")) == 1
    driver.tenants = {}
    assert len(worker.live(20.0, applies="less")) == 1


def test_tables_that_were_replaced_at_once_are_sent_again_when_they_come_back() -> None:
    """Others came before the worker's report of its part was read: what it reports later is not of that part."""
    driver = Driver(Fixed())
    driver.classes, known = CLASSES, {"batch": ClassPolicy(position=7)}
    worker = Older(driver, digest({}, {}))
    worker.live(1.0, applies="less")
    driver.classes, ignored, worker.ignored = known, worker.ignored, ()
    worker.live(5.0, applies=digest(known, {}))
    driver.classes, worker.ignored = CLASSES, ignored
    assert len(worker.live(20.0, applies="less")) == 1


def test_a_worker_that_took_part_of_the_tables_is_told_again_after_a_restart() -> None:
    """It may be another version by now."""
    driver = Driver(Fixed())
    driver.classes = CLASSES
    worker = Older(driver, digest({}, {}))
    worker.live(5.0, applies="less")
    (send,) = driver.sends(6.0, frame("w1", "01B", 1, config="less"))
    assert send.verb == "configure"


def test_what_a_worker_has_of_the_tables_is_read_from_its_status_and_not_guessed() -> None:
    """Frames that are lost after it took what it knows cost one `configure` more, not one for ever, nor silence."""
    driver = Driver(Fixed())
    driver.classes = CLASSES
    worker = Older(driver, digest({}, {}))
    lost = frozenset(range(1, int(20 * (ECHO_S + 0.5))))
    assert len(worker.live(20.0, lost=lost, applies="less")) == 2


def test_an_edit_of_one_row_in_place_is_one() -> None:
    """The shell keeps one table and puts into it what it reads: one class edited alone must reach the workers."""
    driver = Driver(Fixed())
    driver.classes = {"batch": ClassPolicy(position=1)}
    assert driver.sends(0.0, frame(config=digest(driver.classes, {}))) == []
    driver.classes["batch"] = ClassPolicy(position=7)
    (send,) = driver.sends(0.1)
    assert send.command.classes["batch"].position == 7
    driver.sends(0.2, frame(seq=2, config=digest(driver.classes, {})), answers=[Answer(send, ok=True)])
    driver.tenants["acme"] = TenantPolicy(weight=7.0)
    (send,) = driver.sends(0.3)
    assert send.command.tenants["acme"].weight == 7.0


def test_a_row_that_spells_out_a_default_is_the_row_that_leaves_it_out() -> None:
    """On the wire and in digests, whenever it came: else a worker that was sent one would never have what is wanted."""
    spelt = replace(CLASSES["batch"], quantum_s=float("0"), linger_s=float("0"))
    driver = Driver(Fixed())
    driver.classes, driver.tenants = CLASSES, TENANTS
    wanted = digest(CLASSES, TENANTS)
    assert driver.sends(0.0, frame(config=wanted)) == []
    driver.classes = {"batch": spelt}
    driver.tenants = {"acme": replace(TENANTS["acme"], priority_min=int("-2147483648"))}
    assert driver.sends(0.1) == []
    (send,) = driver.sends(0.2, frame("w2"))
    assert b"_s" not in encode(send.command.classes)
    assert digest(send.command.classes, send.command.tenants) == wanted


def test_a_table_that_only_ever_spells_a_default_out_is_sent_without_it() -> None:
    """A worker of a version that does not know the field then has the same digest."""
    driver = Driver(Fixed())
    driver.classes = {"batch": replace(CLASSES["batch"], linger_s=float("0"))}
    driver.tenants = {"acme": TenantPolicy(weight=float("1"))}
    (send,) = driver.sends(0.0, frame())
    assert encode(send.command.classes) == b'{"batch":{"position":1}}'
    assert encode(send.command.tenants) == b'{"acme":{}}'


def test_a_refused_configure_is_tried_again_with_growing_patience() -> None:
    """A worker that refuses is asked again after 0.25 s, then 0.5 s, then 1 s, not at every step."""
    driver = Driver(Fixed())
    driver.tenants = TENANTS
    tries, answers = [], [Answer(send, ok=False) for send in driver.sends(0.0, frame())]
    for tick in range(1, 45):
        now = tick * 0.05
        sends = driver.sends(now, frame(seq=tick + 1), answers=answers)
        tries += [now for _ in sends]
        answers = [Answer(send, ok=False) for send in sends]
    gaps = [after - before for before, after in pairwise(tries)]
    assert len(tries) == 3
    assert all(after > 1.5 * before for before, after in pairwise(gaps))


def test_nothing_is_configured_before_both_tables_were_read() -> None:
    """A controller that has not seen the tables must not replace them by empty ones."""
    driver = Driver(Fcfs(Fcfs.Params()))
    driver.classes = None
    assert driver.sends(0.0, frame()) == []


def test_fcfs_puts_every_class_in_priority_order() -> None:
    """Classes of the table, those that only requests name, and `default` all get `order: priority`."""
    driver = Driver(Fcfs(Fcfs.Params()))
    driver.classes = CLASSES
    (send,) = driver.sends(0.0, frame("w1", "01A", 1, row("a", class_="chat")))
    assert {name: each.order for name, each in send.command.classes.items()} == {
        "batch": "priority", "chat": "priority", "default": "priority",
    }  # fmt: skip
    assert send.command.classes["batch"].position == 1


def test_vtc_leaves_the_order_of_the_table() -> None:
    """Under VTC a class with `order: priority` stays so: the table is sent as it is."""
    driver = Driver(Vtc(Vtc.Params()))
    driver.classes = {"urgent": ClassPolicy(order="priority")}
    sends = driver.sends(0.0, frame())
    configures = [send.command for send in sends if send.verb == "configure"]
    assert [dict(each.classes) for each in configures] == [driver.classes]


def test_a_base_that_is_right_is_not_sent() -> None:
    """Ranks go out only where a worker's base is off by more than half a token, or its weight is another."""
    wanted = {"a": TenantRank(base=10.2), "b": TenantRank(base=20.0), "c": TenantRank(weight=3.0)}
    driver = Driver(Fixed(ranks={"w1": wanted}))
    (send,) = driver.sends(0.0, frame("w1", "01A", 1, row("a", base=10.0), row("b", base=1.0), row("c")))
    assert send.verb == "rank"
    assert send.command.incarnation == "01A"
    assert set(send.command.tenants) == {"b", "c"}


def test_a_rank_is_sent_once_until_status_could_show_it() -> None:
    """No repeat while the worker's frames may still be older than the rank; one if they never show it."""
    driver = Driver(Fixed(ranks={"w1": {"a": TenantRank(base=9.0)}}))
    (send,) = driver.sends(0.0, frame("w1", "01A", 1, row("a")))
    ok = [Answer(send, ok=True)]
    assert driver.sends(0.1, frame("w1", "01A", 2, row("a")), answers=ok) == []
    assert len(driver.sends(ECHO_S + 0.2, frame("w1", "01A", 3, row("a")))) == 1


def test_a_failed_rank_is_sent_again() -> None:
    """A rank for a tenant that the worker does not list cannot be checked by status; its answer decides."""
    driver = Driver(Fixed(ranks={"w1": {"elsewhere": TenantRank(base=9.0)}}))
    (send,) = driver.sends(0.0, frame())
    assert driver.sends(0.1, answers=[Answer(send, ok=False)]) == []
    (send,) = driver.sends(0.5)
    assert driver.sends(0.6, answers=[Answer(send, ok=True)]) == []
    assert driver.sends(2.9, frame(seq=2)) == []


def test_prices_go_to_each_worker_once() -> None:
    """A new leader may follow one with other prices, so each worker is told once, come what may."""
    driver = Driver(Fixed(prices=Prices(output=3.0)))
    (send,) = driver.sends(0.0, frame())
    assert send.command.prices == Prices(output=3.0)
    assert driver.sends(0.1, frame(seq=2), answers=[Answer(send, ok=True)]) == []
    driver.epoch = (100.0, 8)
    assert len(driver.sends(0.2, frame(seq=3))) == 1


def test_one_rank_is_in_flight_per_worker() -> None:
    """While a worker has not answered, it is not sent another rank; after 2 s it is."""
    driver = Driver(Fixed(ranks={"w1": {"a": TenantRank(base=1.0)}}))
    driver.step(0.0, frame())
    driver.core.policy.directives = Directives(ranks={"w1": {"a": TenantRank(base=50.0)}})
    assert driver.sends(1.0, frame(seq=2)) == []
    driver.sends(2.1, frame(seq=3))
    assert len(driver.sends(2.6, frame(seq=4))) == 1


def test_a_late_answer_is_not_taken_for_that_to_the_next_command() -> None:
    """After its patience the core sends anew; what then comes to the first command says nothing of the second."""
    driver = Driver(Fixed(ranks={"w1": {"elsewhere": TenantRank(base=9.0)}}))
    (first,) = driver.sends(0.0, frame())
    assert driver.sends(ANSWER_S + 0.1, frame(seq=2)) == []
    (second,) = driver.sends(ANSWER_S + 0.4, frame(seq=3))
    driver.core.policy.directives = Directives(ranks={"w1": {"elsewhere": TenantRank(base=50.0)}})
    for ok in (True, False):
        late = [Answer(first, ok=ok)]
        assert driver.sends(ANSWER_S + 0.5, frame(seq=4), answers=late) == [], "the second is still in flight"
    (third,) = driver.sends(ANSWER_S + 0.6, frame(seq=5), answers=[Answer(second, ok=True)])
    assert third.command.tenants["elsewhere"].base == 50.0


def test_what_nobody_answered_is_told_again() -> None:
    """Prices and tenants that a worker does not list show nowhere: without an answer they count as never told."""
    ranks = {"w1": {"elsewhere": TenantRank(base=9.0)}}
    driver = Driver(Fixed(ranks=ranks, prices=Prices(output=3.0)))
    (first,) = driver.sends(0.0, frame())
    driver.sends(ANSWER_S + 0.1, frame(seq=2))
    (again,) = driver.sends(ANSWER_S + 0.4, frame(seq=3))
    assert again.command.tenants == first.command.tenants
    assert again.command.prices == first.command.prices


def test_no_tenant_is_passed_over_where_one_rank_has_no_room_for_all() -> None:
    """Whose base changes at every step is told before those that were told just now, whatever they are called."""
    names = [f"t{number:04}" for number in range(MAX_RANK_ROWS + 100)]
    driver = Driver(Fixed())
    told, answers = set[str](), []
    for tick in range(2):
        ranks = {name: TenantRank(base=float(100 * tick + 100)) for name in names}
        driver.core.policy.directives = Directives(ranks={"w1": ranks})
        (send,) = driver.sends(0.1 * tick, frame(seq=tick + 1), answers=answers)
        assert len(send.command.tenants) == MAX_RANK_ROWS
        told |= send.command.tenants.keys()
        answers = [Answer(send, ok=True)]
    assert told == set(names)


def test_where_there_are_too_many_ranks_for_one_step_workers_take_turns() -> None:
    """A step's length is bounded: it ends with the worker that fills it, and the next one begins with those left."""
    fleet = ("w1", "w2", "w3")
    rows = {f"t{number}": TenantRank(base=9.0) for number in range(RANK_ROWS_PER_STEP * 6 // 10)}
    driver = Driver(Fixed(ranks=dict.fromkeys(fleet, rows)))
    first = driver.sends(0.0, *map(frame, fleet))
    second = driver.sends(
        0.1, *(frame(worker, seq=2) for worker in fleet), answers=[Answer(send, ok=True) for send in first]
    )
    assert [len(first), len(second)] == [2, 1]
    assert {send.worker for send in (*first, *second)} == set(fleet)


def test_ranks_keep_to_their_cadence() -> None:
    """However often the core steps, ranks are at least `cadence_s` apart."""
    driver = Driver(Fixed(ranks={}))
    times, answers = [], []
    for tick in range(100):
        now = tick * 0.01
        driver.core.policy.directives = Directives(ranks={"w1": {"a": TenantRank(base=float(tick * 10))}})
        sends = driver.sends(now, frame(seq=tick), answers=answers)
        times += [now for _ in sends]
        answers = [Answer(send, ok=True) for send in sends]
    assert len(times) > 10
    assert min(b - a for a, b in pairwise(times)) >= 0.05 - 1e-9


def test_a_stale_worker_is_left_alone_and_told_everything_on_return() -> None:
    """Nothing is sent to a worker that fell silent; when it is back, what it lacks goes out."""
    driver = Driver(Fixed())
    driver.tenants = TENANTS
    driver.step(0.0, frame())
    driver.step(5.0)
    driver.tenants = {}
    assert driver.sends(6.0) == []
    driver.tenants = TENANTS
    assert [send.verb for send in driver.sends(7.0, frame(seq=2))] == ["configure"]


def test_workers_that_obey_a_later_epoch_are_named_and_all_are_led_on() -> None:
    """Many of them are no proof either: somebody who broke into one may speak for its data-parallel ranks too."""
    driver = Driver(Fcfs(Fcfs.Params()))
    later, liars = (1e9, 2**60), ("w1-dp0", "w1-dp1")
    theirs = [frame(worker, leader=Leader(epoch=later)) for worker in liars]
    ours = [
        frame("w2", leader=Leader(epoch=EPOCH)),
        frame("w3", leader=Leader(epoch=(100.0, 6))),
        frame("w4"),
    ]
    beat, *sends = driver.step(0.0, *theirs, *ours)
    assert isinstance(beat, Beat)
    assert {send.worker for send in sends if isinstance(send, Send)} >= {"w2", "w3", "w4"}
    assert driver.core.disowned_by == dict.fromkeys(liars, later)


def test_who_does_not_lead_is_disowned_by_nobody() -> None:
    """A standby has no epoch that another could be later than."""
    driver = Driver(Fcfs(Fcfs.Params()))
    driver.epoch = None
    driver.step(0.0, frame(leader=Leader(epoch=(1e9, 2**60))))
    assert driver.core.disowned_by == {}
