"""Who gets room: cut-in and its victims, their return, and what held requests give up."""

from typing import Any

import pytest

from coxswain.schemas import events as ev
from coxswain.schemas.policy import ClassPolicy
from coxswain.schemas.subjects import ENGINE, OPERATOR
from coxswain.service.scheduler.record import Record
from coxswain.service.scheduler.states import State
from tests.support.fake_engine import FakeEngine


def engine_with(
    cut_in: str = "slots",
    *,
    batch: ClassPolicy | None = None,
    urgent: dict[str, Any] | None = None,
    **options: Any,
) -> FakeEngine:
    """Two slots, full of batch requests `r1` and `r2`; what is submitted as `urgent` may cut in."""
    engine = FakeEngine(**{"slots": 2, "chunk": 4, **options})
    classes = {
        "urgent": ClassPolicy(position=-1, **{"cut_in": cut_in, **(urgent or {})}),
        "default": batch or ClassPolicy(),
    }
    engine.core.configure(classes, {})
    for _ in range(2):
        engine.submit("a", tokens=50)
        engine.now += 0.001
    engine.step()
    return engine


def urgent(engine: FakeEngine, **fields: Any) -> Record:
    """An urgent request arrives."""
    record = engine.submit("b", **fields)
    engine.core.reprioritize(engine.now, record, None, "urgent", "operator")
    return record


def states(engine: FakeEngine) -> str:
    """`r1` and `r2`, a word each."""
    words = {State.HELD_KEPT: "kept", State.HELD_PARKED: "parked", State.HELD_DROPPED: "dropped"}
    return " ".join(
        words.get(record.state, record.state.value)
        for record in list(engine.core.roster.records.values())[:2]
    )


class TestCutIn:
    """A head that outranks what runs gets room in the very next step."""

    def test_the_head_runs_in_the_next_step_and_the_latest_victim_keeps_its_kv(self) -> None:
        """One victim, the one admitted last; nothing of it is computed again when it goes on by itself."""
        engine = engine_with()
        head = urgent(engine, prompt=4, tokens=2)
        engine.step()
        engine.check()
        assert head in engine.running
        assert states(engine) == "running kept"
        (held,) = engine.seen(ev.Held)
        assert (held["by"], held["kv"], held["reason"]) == (ENGINE, "kept", f"cut-in for {head.request}")
        for _ in range(3):
            engine.step()
        assert head.state is State.FINISHED
        assert states(engine) == "running running"
        (continued,) = engine.seen(ev.Continued)
        assert (continued["by"], continued["reason"]) == (ENGINE, "room")
        assert not sum(engine.recomputed.values())

    @pytest.mark.parametrize("cut_in", ["off", "queue"])
    def test_a_class_that_may_not_cut_in_waits(self, cut_in: str) -> None:
        """`off` and `queue` take nobody's room."""
        engine = engine_with(cut_in)
        head = urgent(engine)
        engine.step()
        assert head.state is State.QUEUED
        assert not engine.seen(ev.Held)

    def test_no_more_victims_than_heads(self) -> None:
        """Two heads take two slots; a third finds only its equals and waits."""
        engine = engine_with()
        heads = [urgent(engine, tokens=9) for _ in range(3)]
        engine.step()
        assert [head.state for head in heads] == [State.RUNNING, State.RUNNING, State.QUEUED]
        assert states(engine) == "kept kept"
        engine.step()
        assert len(engine.seen(ev.Held)) == 2

    def test_no_victim_for_a_head_that_the_step_has_no_tokens_for(self) -> None:
        """The first head's prompt fills the step: the second could not begin, and nobody makes room for it yet."""
        engine = engine_with()
        engine.budget = 8
        for _ in range(2):
            urgent(engine, prompt=8)
        engine.core.room.plan(engine.now)
        assert states(engine) == "running kept"

    def test_a_free_slot_is_taken_before_anybody_else_s(self) -> None:
        """Cut-in is for what does not fit."""
        engine = engine_with(slots=3)
        engine.core.configure({"urgent": ClassPolicy(position=-1, cut_in="slots")}, {})
        urgent(engine)
        engine.step()
        assert not engine.seen(ev.Held)

    def test_never_inside_a_fair_class(self) -> None:
        """A tenant with a lower virtual time and a better priority waits for its turn all the same."""
        engine = engine_with(batch=ClassPolicy(cut_in="kv"))
        engine.submit("z", priority=-5)
        engine.step()
        assert not engine.seen(ev.Held)

    def test_in_a_priority_class_only_over_a_strictly_worse_priority(self) -> None:
        """Equal priorities do not displace each other, whoever came first."""
        engine = engine_with(batch=ClassPolicy(order="priority", cut_in="slots"))
        engine.submit("z")
        engine.step()
        assert not engine.seen(ev.Held)
        better = engine.submit("z", priority=-1, tokens=40)
        engine.step()
        assert better.state is State.RUNNING
        engine.submit("z", priority=-1)
        engine.step()
        engine.step()
        assert states(engine) == "kept kept"  # the second at -1 displaced the other 0, neither each other
        assert len(engine.seen(ev.Held)) == 2

    def test_a_head_that_could_not_run_yet_displaces_nobody(self) -> None:
        """While its grammar compiles, its predecessor's output is stale or its LoRA has no place, others run."""
        engine = engine_with()
        head = urgent(engine)
        head.payload.obstacle = "grammar"
        engine.core.room.plan(engine.now)
        assert not engine.seen(ev.Held)

    def test_what_cannot_be_held_is_no_victim(self) -> None:
        """A streaming session keeps its slot; the next one gives its own."""
        engine = engine_with()
        list(engine.running)[1].payload.obstacle = "a streaming session"
        urgent(engine)
        engine.step()
        assert states(engine) == "kept running"

    def test_an_aged_request_is_spared(self) -> None:
        """What ageing let in is not thrown out again by those who passed it over."""
        engine = engine_with()
        for record in engine.running:
            record.aged = True
        urgent(engine)
        engine.step()
        assert not engine.seen(ev.Held)


class TestBlocks:
    """KV blocks that are short are taken from held requests, then, by a class that is `kv`, from running ones."""

    def test_slots_preempts_nobody(self) -> None:
        """`slots` takes slots: with too few blocks it takes nothing at all."""
        engine = engine_with("slots", blocks=40)
        head = urgent(engine, prompt=33)
        engine.step()
        assert head.state is State.QUEUED
        assert not engine.seen(ev.Held)

    def test_kv_preempts_the_worst_and_no_more(self) -> None:
        """The latest admitted is preempted; its slot serves, so nobody is held."""
        engine = engine_with("kv", blocks=40)
        head = urgent(engine, prompt=33)
        engine.step()
        engine.check()
        assert head.state is State.RUNNING
        assert [fields["reason"] for fields in engine.seen(ev.Preempted)] == [f"cut-in for {head.request}"]
        assert states(engine) == "running queued"
        assert not engine.seen(ev.Held)

    def test_none_if_all_together_would_not_do(self) -> None:
        """A head that fits only into an empty cache of twice the size displaces nobody."""
        engine = engine_with("kv", blocks=40)
        urgent(engine, prompt=41)
        engine.step()
        assert not engine.seen(ev.Preempted)
        assert states(engine) == "running running"

    def test_a_small_victim_is_spared_when_the_next_one_is_enough_alone(self) -> None:
        """The worst has one block, the next has just what it takes: only the second goes."""
        engine = engine_with("kv", blocks=60, chunk=20)
        first, second = engine.running
        engine.compute(first, 20)
        engine.kv[second] = second.payload.num_computed_tokens = 1
        urgent(engine, prompt=59)
        engine.core.room.plan(engine.now)
        assert (first.state, second.state) == (State.QUEUED, State.RUNNING)

    @pytest.mark.parametrize(
        ("cut_in", "slots", "left"), [("kv", 4, "queued queued"), ("slots", 2, "running kept")]
    )
    def test_blocks_that_do_for_one_head_are_not_given_to_two(
        self, cut_in: str, slots: int, left: str
    ) -> None:
        """The second head of a step takes blocks of its own, if it may, and else nobody's slot for nothing."""
        engine = engine_with(cut_in, slots=slots, blocks=20)
        assert engine.free_blocks() == 12
        for _ in range(2):
            urgent(engine, prompt=10)
        engine.core.room.plan(engine.now)
        assert states(engine) == left

    def test_held_kv_goes_first(self) -> None:
        """What an operator holds loses its KV before anything that runs loses anything."""
        engine = engine_with("slots", blocks=40, slots=3)
        first, _ = engine.running
        engine.core.holds.hold(engine.now, first, OPERATOR, "keep", None, "")
        head = urgent(engine, prompt=33)
        engine.step()
        engine.check()
        assert head.state is State.RUNNING
        assert states(engine) == "dropped running"


class TestProtection:
    """A quantum and a cool-down keep victims from being thrown about."""

    def test_quantum(self) -> None:
        """Nobody cuts in on a request in its first `quantum_s`."""
        engine = engine_with(batch=ClassPolicy(quantum_s=0.35))
        head = urgent(engine)
        for _ in range(3):
            engine.step()
        assert not engine.seen(ev.Held)
        engine.step()
        assert head.state is State.RUNNING

    def test_cool_down(self) -> None:
        """A victim that goes on is safe for `cooldown_s`; one that never was a victim is not."""
        engine = engine_with(batch=ClassPolicy(cooldown_s=100.0), slots=2)
        urgent(engine, prompt=4, tokens=1)
        engine.step()
        engine.step()
        assert states(engine) == "running running"
        first, second = list(engine.core.roster.records.values())[:2]
        assert second.protected_until == pytest.approx(engine.now + 100.0)
        urgent(engine, prompt=4, tokens=30)
        urgent(engine, prompt=4, tokens=30)
        engine.step()
        assert (first.state, second.state) == (State.HELD_KEPT, State.RUNNING)


class TestSlots:
    """Holds use spare slots; when they run out, held requests are parked."""

    def test_without_spare_slots_the_victim_is_parked_at_once(self) -> None:
        """With nothing in flight its own slot is free in the same step; KV stays."""
        engine = engine_with(spare=0)
        head = urgent(engine, prompt=4, tokens=1)
        engine.step()
        engine.check()
        assert head.state is State.FINISHED
        engine.step()
        assert states(engine) == "running running"
        assert len(engine.seen(ev.Parked)) == 1
        assert not sum(engine.recomputed.values())

    def test_in_flight_the_slot_comes_a_step_later(self) -> None:
        """One victim is held, no second one while its tokens are in flight; then it is parked and the head runs."""
        engine = engine_with(spare=0)
        engine.flying.update(dict.fromkeys(engine.running, 1))
        head = urgent(engine)
        for _ in range(3):
            engine.step()
        assert head.state is State.QUEUED
        assert states(engine) == "running kept"
        engine.flying.clear()
        engine.step()
        assert head.state is State.RUNNING
        assert states(engine) == "running parked"

    def test_in_flight_a_class_that_is_kv_does_not_wait(self) -> None:
        """Where no slot can be had by holding, `kv` preempts."""
        engine = engine_with("kv", spare=0)
        engine.flying.update(dict.fromkeys(engine.running, 1))
        head = urgent(engine)
        engine.step()
        assert head.state is State.RUNNING
        assert states(engine) == "running queued"

    def test_a_hold_beyond_the_spare_slots_costs_others_theirs_only_until_it_can_be_parked(self) -> None:
        """Held KV never starves the engine: a kept request gives up its slot as soon as somebody waits for it."""
        engine = engine_with(spare=0)
        first, second = engine.running
        for record in (first, second):
            engine.core.holds.hold(engine.now, record, OPERATOR, "keep", None, "")
        engine.step()
        assert states(engine) == "kept kept"  # nobody waits
        waiting = engine.submit("z")
        engine.step()
        assert states(engine) == "kept parked"
        assert waiting.state is State.RUNNING

    def test_the_last_spare_slot_costs_nobody_anything(self) -> None:
        """Holds that take all spare slots and no other are not parked, however many wait."""
        engine = engine_with(spare=1)
        engine.core.holds.hold(engine.now, next(iter(engine.running)), OPERATOR, "keep", None, "")
        for _ in range(2):
            engine.submit("z")
        engine.step()
        assert states(engine) == "kept running"

    def test_where_nobody_parks_it_is_dropped(self) -> None:
        """With a KV connector a hold cannot be parked: its KV goes (and is loaded again)."""
        engine = engine_with(spare=0)
        engine.parks = False
        engine.core.holds.hold(engine.now, next(iter(engine.running)), OPERATOR, "keep", None, "")
        waiting = engine.submit("z")
        engine.step()
        assert states(engine) == "dropped running"
        assert waiting.state is State.RUNNING


class TestReturn:
    """Victims, and released requests without room, go on by themselves in rank order."""

    def test_a_released_parked_request_waits_for_a_slot_in_its_rank(self) -> None:
        """An operator's continue takes nobody's slot; the reply says that it waits."""
        engine = engine_with(spare=0)
        first = next(iter(engine.running))
        engine.core.holds.hold(engine.now, first, OPERATOR, "keep", None, "")
        engine.submit("z", tokens=3)
        engine.submit("z", tokens=3)
        engine.step()
        engine.core.holds.release(engine.now, first, list(first.holds), OPERATOR, "command")
        engine.check()
        assert (first.state, list(first.holds)) == (State.HELD_PARKED, [ENGINE])
        while first.state is not State.RUNNING:
            engine.step()
            engine.check()
        assert not engine.recomputed[first]
        assert len(engine.waiting) == 1  # it had begun: it went before the other that waited

    def test_a_better_head_goes_first(self) -> None:
        """A victim does not return into a slot that a better class waits for, even if that may not cut in."""
        engine = engine_with()
        urgent(engine, prompt=4, tokens=3)
        engine.step()
        engine.core.configure({"urgent": ClassPolicy(position=-1)}, {})
        later = urgent(engine, prompt=4, tokens=3)
        while engine.core.roster.held:
            engine.step()
        assert later.state is State.FINISHED

    def test_a_victim_is_passed_over_no_longer_than_its_class_s_ageing_bound(self) -> None:
        """Past `ageing_s` it takes the next slot, before any better head, and keeps it."""
        engine = engine_with(batch=ClassPolicy(ageing_s=0.45))
        for _ in range(20):
            urgent(engine, prompt=2, tokens=2)
        engine.step()
        assert states(engine) == "kept kept"
        began = engine.now
        while states(engine) != "running running":
            engine.step()
        assert engine.now - began == pytest.approx(0.5, abs=0.15)
        for _ in range(5):
            engine.step()
        assert states(engine) == "running running"
        assert len(engine.core.queue) > 2

    def test_two_holders(self) -> None:
        """A victim that an operator holds too waits for both."""
        engine = engine_with()
        urgent(engine, prompt=4, tokens=1)
        engine.step()
        victim = engine.core.roster.records["r2"]
        assert victim.state is State.HELD_KEPT
        engine.core.holds.hold(engine.now, victim, OPERATOR, "keep", None, "")
        for _ in range(3):
            engine.step()
        assert victim.state is State.HELD_KEPT
        engine.core.holds.release(engine.now, victim, [OPERATOR], OPERATOR, "command")
        engine.step()
        assert victim.state is State.RUNNING

    def test_what_must_pass_admission_is_parked_first(self) -> None:
        """With LoRA a kept request goes on through vLLM's own admission, which counts LoRAs."""
        engine = engine_with()
        first = next(iter(engine.running))
        engine.by_admission.add(first)
        engine.core.holds.hold(engine.now, first, OPERATOR, "keep", None, "")
        engine.step()
        engine.core.holds.release(engine.now, first, list(first.holds), OPERATOR, "command")
        assert first.state is State.HELD_KEPT
        engine.step()
        assert first.state is State.RUNNING
        assert len(engine.seen(ev.Parked)) == 1
        assert not engine.recomputed[first]


class TestReclaim:
    """Held KV never starves the engine."""

    def test_running_requests_grow_into_what_is_held(self) -> None:
        """A running request that needs a block gets it from the least urgent held one; nobody is preempted."""
        engine = engine_with(blocks=40)
        first, second = engine.running
        engine.core.holds.hold(engine.now, second, OPERATOR, "keep", None, "")
        while len(first.outputs) < 23:
            engine.step()
            engine.check()
        assert second.state is State.HELD_DROPPED
        assert not engine.seen(ev.Preempted)

    def test_a_victim_s_kv_goes_before_anything_that_runs(self) -> None:
        """A running request of the victim's own rank grows into its KV; nobody is preempted."""
        engine = engine_with()
        urgent(engine, prompt=4, tokens=50)
        engine.step()
        assert states(engine) == "running kept"
        engine.blocks -= engine.free_blocks() - 1  # enough for the urgent one's next token
        engine.step()
        assert states(engine) == "running dropped"
        assert not engine.seen(ev.Preempted)

    def test_a_victim_that_lost_its_kv_waits_in_the_queue(self) -> None:
        """It cannot be queued inside the step that takes its KV; before the next one it is."""
        engine = engine_with(blocks=40)
        urgent(engine, prompt=4, tokens=30)
        engine.step()
        victim = engine.core.roster.records["r2"]
        engine.core.holds.drop_kv(engine.now, victim, "blocks are needed")
        engine.check()
        engine.step()
        assert victim.state is State.QUEUED

    def test_a_victim_s_kv_is_not_for_its_equals(self) -> None:
        """A head of the victim's own class waits: the victim goes on before it and would only be computed twice."""
        engine = engine_with(blocks=44, slots=2)
        urgent(engine, prompt=2, tokens=20)
        engine.step()
        engine.submit("z", prompt=20)
        victim = engine.core.roster.records["r2"]
        engine.slots = 3
        engine.core.room.plan(engine.now)
        assert victim.state is State.RUNNING

    def test_nothing_is_dropped_for_a_head_that_would_not_fit_anyway(self) -> None:
        """All held KV together is too little: it stays."""
        engine = engine_with(blocks=40, slots=3)
        first = next(iter(engine.running))
        engine.core.holds.hold(engine.now, first, OPERATOR, "keep", None, "")
        engine.submit("z", prompt=41)
        engine.step()
        assert first.state is State.HELD_KEPT

    def test_everything_that_does_not_run_can_be_made_to_lose_its_kv(self) -> None:
        """For a reset of the prefix cache: held, and released from a park but not yet scheduled."""
        engine = engine_with(spare=0)
        first, second = engine.running
        for record in (first, second):
            engine.core.holds.hold(engine.now, record, OPERATOR, "keep", None, "")
        engine.core.holds.park(engine.now, first, "test")
        engine.core.holds.release(engine.now, first, [OPERATOR], OPERATOR, "command")
        engine.core.room.plan(engine.now)
        assert engine.again.keys() == {first}
        engine.core.lose_all_kv(engine.now, "reset")
        engine.check()
        assert (first.state, second.state) == (State.QUEUED, State.HELD_DROPPED)
        assert not engine.kv
