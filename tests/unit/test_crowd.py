"""How many may run so that their KV lasts: `vtc:fill`."""

import pytest

from coxswain.control import fleet as fleet_module
from coxswain.control.estimates.crowd import ENOUGH, Crowd
from coxswain.control.fleet import Fleet
from coxswain.control.policies.vtc import Vtc
from coxswain.control.policy import Tables
from coxswain.schemas.status import ClassStatus, Gone, KvBlocks
from tests.support.frames import frame, request, row


def view(used: int, *, total: int = 1_000, running: int = 10, prompt: int = 100, output: int = 60):
    """A worker where equal requests run and have `used` blocks together."""
    fleet = Fleet()
    rows = tuple(
        request(f"r{n}", "a", state="running", prompt_tokens=prompt, output_tokens=output)
        for n in range(running)
    )
    blocks = KvBlocks(total=total, used=used, held=0)
    fleet.merge(frame("w1", "01A", 1, requests=rows, running=running, kv_blocks=blocks), 0.0)
    return fleet.workers["w1"]


def crowd(fill: float = 1.0, *, ended: int = ENOUGH, prompt: int = 150, output: int = 100) -> Crowd:
    """One that has seen so many requests of that length end."""
    made = Crowd(fill)
    for number in range(ended):
        made.learn(request(f"e{number}", "a", prompt_tokens=prompt, output_tokens=output))
    return made


@pytest.mark.parametrize(("fill", "cap"), [(1.0, 80), (0.5, 40), (2.0, 160)])
def test_as_many_run_as_fit_with_what_they_have_on_average(fill, cap):
    """1,600 tokens take 100 of 1,000 blocks, and a request has 150 + 100/2 = 200 of them: 80, or a part of that."""
    assert crowd(fill).cap(view(100)) == cap


def test_who_says_much_counts_for_as_long_as_it_is_there():
    """Half say 10 tokens and half 190: of those that run at any moment 95 % are of the second kind."""
    made = Crowd(1.0)
    for number in range(200):
        made.learn(request(f"e{number}", "a", prompt_tokens=0, output_tokens=(10, 190)[number % 2]))
    mean = (10 * 5 + 190 * 95) / 200
    assert made.cap(view(100)) == pytest.approx(1_000 * 16 / mean, abs=2)


def test_there_is_no_cap_before_enough_have_ended():
    """Nor while nothing runs that shows what a token takes."""
    assert crowd(ended=ENOUGH - 1).cap(view(100)) is None
    assert crowd().cap(view(0, running=0)) is None


def test_the_cap_keeps_while_little_changes():
    """A request more or less is no news: a cap that follows every end would hold and continue what runs."""
    made = crowd()
    assert made.cap(view(100)) == 80
    assert made.cap(view(101)) == 80
    assert made.cap(view(120)) == 66


def test_at_least_one_may_run():
    """Requests longer than the pool are vLLM's to refuse."""
    assert crowd(output=10**6).cap(view(100)) == 1


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
        self.holds = 0
        self.crowd = crowd()
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
            given.append(self.crowd.shares(fleet.workers["w1"], list(self.queued)))
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


def test_vtc_caps_every_class_by_its_share():
    """30 run in one class and 20 in another, and 80 may in all: nobody waits, so the larger has room to grow."""
    policy, fleet = Vtc(Vtc.Params(fill=1.0)), Fleet()
    assert policy.sees == "requests"
    classes = tuple(
        ClassStatus(class_=name, queued=0, running=running, held=0, oldest_queued_s=0.0)
        for name, running in (("chat", 30), ("bulk", 20))
    )
    rows = tuple(
        request(f"r{n}", "a", state="running", prompt_tokens=100, output_tokens=60) for n in range(50)
    )
    ended = tuple(
        request(f"e{n}", "a", state="running", prompt_tokens=150, output_tokens=100) for n in range(ENOUGH)
    )
    blocks = KvBlocks(total=1_000, used=500, held=0)
    shared = {"kv_blocks": blocks, "classes": classes, "running": 50}
    gone = tuple(Gone(request=row.request, child=0) for row in ended)
    for each in (
        frame("w1", "01A", 1, requests=(*rows, *ended), **shared),
        frame("w1", "01A", 2, full=False, gone=gone, **shared),
    ):
        fleet.merge(each, 0.0)
        fleet.age(0.0)
        policy.observe(fleet, Tables(), 0.0)
        fleet.settle()
    caps = policy.decide(0.0).caps["w1"]
    assert {group: cap.max_running for group, cap in caps.items()} == {
        ("class", "chat"): 60,
        ("class", "bulk"): 20,
    }


def test_workers_that_are_gone_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names may be new with every start, so what is known by name must not grow with them."""
    monkeypatch.setattr(fleet_module, "MAX_WORKERS", 1)
    policy, fleet = Vtc(Vtc.Params(fill=0.85)), Fleet()
    assert policy._crowd is not None
    policy._crowd = crowd(0.85)
    blocks = KvBlocks(total=1_000, used=100, held=0)
    rows = tuple(request(f"r{n}", prompt_tokens=100, output_tokens=60) for n in range(10))
    status = ClassStatus(class_="default", queued=0, running=10, held=0, oldest_queued_s=0.0)
    for number in range(5):
        now = 100.0 * number
        fleet.merge(
            frame(
                f"w{number}", "01A", 1, row("a", running=10), requests=rows, running=10, kv_blocks=blocks,
                classes=(status,),
            ),
            now,
        )  # fmt: skip
        fleet.age(now)
        policy.observe(fleet, Tables(), now)
        policy.decide(now)
        fleet.settle()
    assert policy._crowd._caps.keys() == policy._crowd._shares.keys() == {"w4"}
