"""How many may run so that their KV lasts: `vtc:fill`."""

import pytest

from coxswain.control import fleet as fleet_module
from coxswain.control.estimates.crowd import CALM_S, Crowd
from coxswain.control.fleet import Fleet
from coxswain.control.policies.vtc import Vtc
from coxswain.control.policy import Tables
from coxswain.schemas.policy import ClassPolicy
from coxswain.schemas.status import ClassStatus, KvBlocks
from tests.support.frames import frame, row


class Seen:
    """A worker of 1,000 blocks, the crowd that looks at it, and a clock."""

    def __init__(self, fill: float = 0.8) -> None:
        self.fleet, self.crowd = Fleet(), Crowd(fill)
        self.now, self.lost, self.seq = 100.0, 7, 0
        self.incarnation = "01A"

    def look(
        self,
        used: int,
        *,
        running: int = 10,
        held: int = 0,
        queued: int = 1,
        lost: int = 0,
        for_s: float = 1.0,
    ) -> int | None:
        """The cap when that many blocks were in use for so long, and KV was lost so often at its beginning."""
        self.lost += lost
        end = self.now + for_s
        while self.now < end:
            self.now += 0.5
            self.seq += 1
            blocks = KvBlocks(total=1_000, used=used, held=held)
            self.fleet.merge(
                frame(
                    "w1", self.incarnation, self.seq,
                    running=running, queued=queued, kv_blocks=blocks,
                    preempted_total=self.lost,
                ),
                self.now,
            )  # fmt: skip
            self.crowd.look(self.fleet.workers["w1"], self.now)
        return self.crowd.cap(self.fleet.workers["w1"])


def test_below_the_low_mark_as_many_more_may_run_as_its_room_holds_of_their_size():
    """Ten have 100 of 1,000 blocks together: up to half of the pool takes 40 more, up to 0.9 of it 80."""
    for fill, cap in ((0.5, 50), (0.9, 90)):
        seen = Seen(fill)
        seen.look(100)
        assert seen.look(100, lost=1) == cap


def test_between_the_marks_whoever_ends_is_replaced():
    """The cap stays, so no command is sent and nobody is held, whatever those that run have meanwhile."""
    seen = Seen(0.5)
    seen.look(400, running=20, lost=1)
    first = seen.look(400, running=20, lost=1)
    assert first == 25
    assert {seen.look(used, running=running) for used, running in ((501, 24), (740, 25), (600, 22))} == {
        first
    }


def test_above_the_high_mark_no_more_may_run_than_do():
    """Those that run will have more: nobody is added, and the number falls as they end."""
    seen = Seen(0.5)
    seen.look(700, running=24)
    seen.look(700, running=24, lost=1)
    assert [seen.look(used, running=running) for used, running in ((760, 24), (800, 22), (740, 20))] == [
        24,
        22,
        22,
    ]


def test_requests_that_came_together_are_parted():
    """While they are small others come between them; a constant cap would let them end together for ever."""
    seen = Seen(0.75)
    seen.look(300, running=20)
    assert seen.look(300, running=20, lost=1) == 50


def test_a_worker_that_loses_no_kv_is_not_bounded():
    """Nor was it for what was lost before anybody looked."""
    assert Seen().look(1_000, for_s=60.0) is None


def test_a_bound_lasts_until_the_queue_has_ended():
    """That no KV is lost any more is its own doing and says nothing; that nobody waits for a while does."""
    seen = Seen()
    seen.look(1_000)
    assert seen.look(1_000, lost=1, for_s=5 * CALM_S) == 10
    assert seen.look(1_000, queued=0, for_s=CALM_S - 2) == 10
    assert seen.look(1_000, queued=1) == 10
    assert seen.look(1_000, queued=0, for_s=CALM_S - 2) == 10
    assert seen.look(1_000, queued=0, for_s=3) is None


def test_what_held_requests_keep_is_not_what_those_that_run_have():
    """Half of what is in use is kept for others."""
    seen = Seen()
    seen.look(200, held=100)
    assert seen.look(200, held=100, lost=1) == 80


def test_two_that_nearly_fit_run_together():
    """One alone would leave half of the pool unused."""
    seen = Seen(0.8)
    seen.look(390, running=1)
    assert seen.look(390, running=1, lost=1) == 2


def test_a_small_cap_climbs_again():
    """What is bounded to few shows few; when these get smaller, more may run."""
    seen = Seen(0.8)
    seen.look(900, running=1)
    assert seen.look(900, running=1, lost=1) == 1
    assert seen.look(100, running=1) == 8


def test_at_least_one_may_run():
    """A request that needs the pool twice is vLLM's to refuse."""
    seen = Seen()
    seen.look(2_000, running=1)
    assert seen.look(2_000, running=1, lost=1) == 1


def test_a_worker_that_started_again_begins_anew():
    """Its totals begin at 0, and nothing was lost by that."""
    seen = Seen()
    seen.look(100)
    assert seen.look(100, lost=1) == 80
    seen.incarnation, seen.lost, seen.seq = "01B", 0, 0
    assert seen.look(500) is None
    assert seen.look(500, lost=1) == 16


def test_a_worker_on_which_nothing_runs_keeps_its_cap():
    """It says nothing of what fits; one that was never seen to run has none."""
    seen = Seen()
    seen.look(0, running=0)
    assert seen.look(0, running=0, lost=1) is None
    assert seen.look(100) == 80
    assert seen.look(0, running=0) == 80


# Several classes


class Shared:
    """A worker whose classes share a cap of `most`, with what comes of it: frames and caps are a look late.

    Every look an eighth of what runs ends, and the best class that waits and is under its cap gets free places.
    """

    def __init__(self, most: int, **queued: int) -> None:
        self.most = most
        self.queued = queued
        self.running = dict.fromkeys(queued, 0)
        self.held = dict.fromkeys(queued, 0)
        self.seen = [self._frame()]
        self.caps: list[dict[str, int]] = [dict.fromkeys(queued, most)]
        self.table = {name: ClassPolicy(position=place) for place, name in enumerate(queued)}
        self.holds = 0
        self.crowd = Crowd(0.8)
        self.crowd.cap = lambda view: self.most  # type: ignore[method-assign]

    def _frame(self):
        return tuple(
            ClassStatus(
                class_=name,
                queued=queued,
                running=self.running[name],
                held=self.held[name],
                oldest_queued_s=0.0,
            )
            for name, queued in self.queued.items()
        )

    def look(self, times: int = 1) -> list[dict[str, int]]:
        """Let the controller look so often; the caps that it gave."""
        given = []
        for _ in range(times):
            for name, cap in self.caps[-1].items():
                self.running[name] -= -(-self.running[name] // 8)
                over = max(0, self.running[name] - cap)
                self.holds += over
                self.held[name] += over
                self.running[name] -= over
                for waiting in (self.held, self.queued):
                    enter = min(waiting[name], cap - self.running[name])
                    waiting[name] -= enter
                    self.running[name] += enter
            self.seen.append(self._frame())
            fleet = Fleet()
            fleet.merge(frame("w1", "01A", 1, classes=self.seen[-2]), 0.0)
            given.append(self.crowd.shares(fleet.workers["w1"], self.table))
            assert sum(given[-1].values()) <= self.most + len(self.queued)
            self.caps.append(given[-1])
        return given


def test_a_single_class_has_the_whole_cap():
    """Nothing is divided where there is nothing to divide, with or without the built-in class beside it."""
    assert Shared(40, chat=10**6).look(50)[-1] == {"chat": 40}
    assert Shared(40, chat=10**6, default=0).look(50)[-1] == {"chat": 40, "default": 1}


def test_shares_do_not_chatter():
    """Two classes that want all there is: after a while no cap changes, nobody is held, and every place is taken."""
    worker = Shared(40, chat=10**6, bulk=10**6)
    worker.look(100)
    held = worker.holds
    assert len({tuple(caps.items()) for caps in worker.look(200)}) == 1
    assert worker.holds == held
    assert sum(worker.running.values()) >= 40


def test_who_waits_has_what_others_leave():
    """A class that asks for little keeps a place for who comes; the other has the rest, and nobody is held for it."""
    worker = Shared(40, chat=0, bulk=10**6)
    for _ in range(200):
        worker.queued["chat"] += 1
        worker.look()
    assert worker.running["bulk"] >= 40 - 2 * worker.running["chat"] - 2
    settled = worker.holds
    for _ in range(100):
        worker.queued["chat"] += 1
        worker.look()
    assert worker.holds == settled


def test_a_better_class_that_comes_back_takes_place_after_place():
    """Otherwise it would wait for ever beside a worse one that has a queue: nothing would be left unused."""
    worker = Shared(40, chat=0, bulk=10**6)
    assert worker.look(50)[-1]["bulk"] >= 39
    worker.queued["chat"] = 10**6
    assert 8 <= worker.look(20)[-1]["chat"] <= 20
    assert worker.look(80)[-1] == {"chat": 39, "bulk": 1}
    worker.queued["chat"] = 0
    assert worker.look(60)[-1]["bulk"] >= 38


def test_a_smaller_pool_takes_what_is_unused_first():
    """Then from the worst class; a larger one gives to who waits."""
    worker = Shared(40, chat=10, bulk=10**6)
    worker.look()
    worker.most = 10
    worker.look(5)
    assert sum(worker.caps[-1].values()) == 10
    worker.most = 60
    assert worker.look(20)[-1]["bulk"] >= 50


def test_who_may_cut_in_is_not_bounded():
    """A cap is what nobody cuts in on. What they run is taken from what the others may."""
    worker = Shared(40, chat=3, bulk=10**6)
    worker.table["chat"] = ClassPolicy(position=-1, cut_in="kv")
    worker.caps = [{"chat": 40, "bulk": 40}]
    view = Fleet()
    busy = tuple(
        ClassStatus(class_=name, queued=9, running=running, held=0, oldest_queued_s=0.0)
        for name, running in (("chat", 12), ("bulk", 30))
    )
    view.merge(frame("w1", "01A", 1, classes=busy), 0.0)
    assert worker.crowd.shares(view.workers["w1"], worker.table) == {"bulk": 28}
    everybody = {name: ClassPolicy(cut_in="slots") for name in worker.table}
    assert worker.crowd.shares(view.workers["w1"], everybody) == {}


def test_who_is_at_the_operators_cap_takes_nothing_from_others():
    """More of it may not run anyway, however many wait."""
    worker = Shared(40, chat=10**6, bulk=10**6)
    worker.table["chat"] = ClassPolicy(max_running=5)
    worker.table["bulk"] = ClassPolicy(position=1)
    view = Fleet()
    busy = tuple(
        ClassStatus(class_=name, queued=9, running=running, held=0, oldest_queued_s=0.0)
        for name, running in (("chat", 5), ("bulk", 35))
    )
    view.merge(frame("w1", "01A", 1, classes=busy), 0.0)
    for _ in range(5):
        assert worker.crowd.shares(view.workers["w1"], worker.table) == {"chat": 5, "bulk": 35}


def test_vtc_caps_every_class_by_its_share():
    """30 run in one class and 20 in another, and 80 may in all: nobody waits, so the larger has room to grow."""
    policy, fleet = Vtc(Vtc.Params(fill=0.8)), Fleet()
    classes = tuple(
        ClassStatus(class_=name, queued=0, running=running, held=0, oldest_queued_s=0.0)
        for name, running in (("chat", 30), ("bulk", 20))
    )
    blocks = KvBlocks(total=1_000, used=500, held=0)
    for number in range(1, 4):
        fleet.merge(
            frame("w1", "01A", number, kv_blocks=blocks, classes=classes, running=50, preempted_total=number),
            float(number),
        )
        fleet.age(float(number))
        policy.observe(fleet, Tables(), float(number))
        fleet.settle()
    caps = policy.decide(3.0).caps["w1"]
    assert {group: cap.max_running for group, cap in caps.items()} == {
        ("class", "chat"): 60,
        ("class", "bulk"): 20,
    }
    fleet.age(4.0)
    policy.observe(fleet, Tables(), 3.0 + CALM_S + 1.0)
    assert policy.decide(3.0 + CALM_S + 1.0).caps == {}


def test_vtc_bounds_without_a_look_at_single_requests():
    """It does so only when told to, and reading every request would cost a large fleet's controller most."""
    assert Vtc(Vtc.Params())._crowd is None
    policy = Vtc(Vtc.Params(fill=0.75))
    assert policy._crowd is not None
    assert policy.sees == "tenants"


def test_workers_that_are_gone_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names may be new with every start, so what is known by name must not grow with them."""
    monkeypatch.setattr(fleet_module, "MAX_WORKERS", 1)
    policy, fleet = Vtc(Vtc.Params(fill=0.75)), Fleet()
    assert policy._crowd is not None
    blocks = KvBlocks(total=1_000, used=100, held=0)
    status = ClassStatus(class_="default", queued=0, running=10, held=0, oldest_queued_s=0.0)
    for number in range(5):
        for lost in range(2):
            now = 100.0 * number + lost
            fleet.merge(
                frame(
                    f"w{number}", "01A", 1 + lost, row("a", running=10), running=10, kv_blocks=blocks,
                    classes=(status,), preempted_total=lost,
                ),
                now,
            )  # fmt: skip
            fleet.age(now)
            policy.observe(fleet, Tables(), now)
            policy.decide(now)
            fleet.settle()
    assert policy._crowd._workers.keys() == policy._crowd._shares.keys() == {"w4"}
