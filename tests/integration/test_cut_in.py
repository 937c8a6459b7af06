"""Cut-in, reclaim and the step budget on vLLM's real scheduler and KV manager, step by step, without a model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest

from bench.rig import Rig, vllm_config
from coxswain.schemas.commands import Drain
from coxswain.schemas.policy import ClassPolicy, TenantPolicy
from coxswain.schemas.status import QueueQuery
from coxswain.schemas.subjects import OPERATOR
from coxswain.service.port import AnswerOut, CommandIn, QueryIn, ReplyOut
from coxswain.service.scheduler.groups import Caps
from coxswain.service.scheduler.limits import Target
from coxswain.service.scheduler.states import State
from tests.support.steered import KEY, engine_id, public_id

pytestmark = pytest.mark.vllm

URGENT = {"chat": TenantPolicy(class_="urgent")}


@contextmanager
def rig(classes: dict[str, ClassPolicy], *, depth: int = 1, **options: Any) -> Iterator[Rig]:
    """A steered scheduler with two active slots of three, not joined to NATS; tenant `chat` is in class `urgent`."""
    from coxswain.service.scheduler import SteeredScheduler

    options = {"max_num_seqs": 3, "max_num_active_seqs": 2, **options}
    with patch.dict(os.environ, {"COX_IDENTITY_KEY": KEY}):
        os.environ.pop("COX_NATS_URL", None)
        made = Rig(SteeredScheduler, vllm_config(async_scheduling=depth > 1, **options), depth=depth)
    made.scheduler.core.configure(classes, URGENT)
    try:
        yield made
    finally:
        made.scheduler.shutdown()


def add(rig: Rig, tenant: str, **fields: Any) -> str:
    """A request of a tenant arrives; its engine's id."""
    name = engine_id(public_id(tenant))
    rig.add(name, **fields)
    return name


def state(rig: Rig, name: str) -> State:
    """Where a request is."""
    found: State = rig.scheduler.core.roster.records[name].state
    return found


def ended_well(rig: Rig, **tokens: int) -> None:
    """Run to the end: every request said exactly what it would have said alone, and nothing is left."""
    rig.run()
    for name, count in tokens.items():
        assert rig.outputs[name] == rig.expected(name, count)
    assert rig.scheduler.kv_cache_manager.usage == 0
    assert not rig.scheduler.core.roster.records
    rig.scheduler.core.validate()


DEPTHS = pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])


@DEPTHS
def test_an_urgent_request_runs_in_the_next_step_and_nothing_is_computed_twice(depth: int) -> None:
    """Its prompt is scheduled in the very step after its arrival; the victim's KV is kept, its tokens are the same."""
    with rig({"urgent": ClassPolicy(position=-1, cut_in="slots")}, depth=depth) as made:
        batch = [add(made, "bulk", prompt=40, tokens=30) for _ in range(2)]
        for _ in range(5):
            made.step()
        urgent = add(made, "chat", prompt=24, tokens=3)
        assert made.step()[urgent] == 24
        assert [state(made, name) for name in batch] == [State.RUNNING, State.HELD_KEPT]
        ended_well(made, **dict.fromkeys(batch, 30), **{urgent: 3})
        assert [made.computed[name] for name in (*batch, urgent)] == [69, 69, 26]


@DEPTHS
def test_without_a_spare_slot_the_victim_is_parked_as_soon_as_nothing_of_it_is_in_flight(depth: int) -> None:
    """The head waits for no more than the steps under way, and nothing is computed twice."""
    with rig({"urgent": ClassPolicy(position=-1, cut_in="slots")}, depth=depth, max_num_seqs=2) as made:
        batch = [add(made, "bulk", prompt=40, tokens=30) for _ in range(2)]
        for _ in range(5):
            made.step()
        urgent = add(made, "chat", prompt=24, tokens=3)
        steps = next(count for count in range(1, 9) if urgent in made.step())
        assert steps <= depth
        assert state(made, batch[1]) is State.HELD_PARKED
        ended_well(made, **dict.fromkeys(batch, 30), **{urgent: 3})
        assert [made.computed[name] for name in batch] == [69, 69]


@DEPTHS
def test_blocks_that_are_short_come_from_the_fewest_victims(depth: int) -> None:
    """A class that is `kv` preempts one of two; with `slots` it waits until blocks are free."""
    for cut_in, states in (("kv", [State.RUNNING, State.QUEUED]), ("slots", [State.RUNNING, State.RUNNING])):
        options: dict[str, Any] = {"num_blocks": 9, "max_num_seqs": 4, "max_num_active_seqs": 3}
        with rig({"urgent": ClassPolicy(position=-1, cut_in=cut_in)}, depth=depth, **options) as made:
            batch = [add(made, "bulk", prompt=70, tokens=20) for _ in range(2)]  # 3 blocks each of 8
            for _ in range(5):
                made.step()
            urgent = add(made, "chat", prompt=100, tokens=3)  # 4 blocks
            scheduled = made.step()
            assert (urgent in scheduled) == (cut_in == "kv")
            assert [state(made, name) for name in batch] == states
            ended_well(made, **dict.fromkeys(batch, 20), **{urgent: 3})


@DEPTHS
def test_held_kv_gives_way_to_what_runs(depth: int) -> None:
    """An engine full of held KV serves on: blocks come from the held, nobody that runs is preempted."""
    with rig({}, depth=depth, num_blocks=9) as made:
        held = add(made, "bulk", prompt=100, tokens=20)
        for _ in range(3):
            made.step()
        core = made.scheduler.core
        core.holds.hold(0.0, core.roster.records[held], "operator", "keep", None, "test")
        other = add(made, "bulk", prompt=150, tokens=90)  # 8 blocks in the end: all there are
        while other not in made.finished:
            made.step()
        assert state(made, held) is State.HELD_DROPPED
        assert made.computed[other] == 150 + 89
        core.holds.release(0.0, core.roster.records[held], ["operator"], "operator", "command")
        ended_well(made, **{held: 20, other: 90})


@DEPTHS
@pytest.mark.parametrize(
    "policy", [ClassPolicy(order="priority"), ClassPolicy(order="priority", cut_in="slots")]
)
def test_a_lowered_cap_stops_the_worst(policy: ClassPolicy, depth: int) -> None:
    """Not the latest, whether anybody may cut in or not."""
    with rig({"default": policy}, depth=depth, max_num_seqs=6, max_num_active_seqs=3) as made:
        names = [add(made, "bulk", tokens=30, priority=priority) for priority in (9, 5, -10)]
        made.step()
        target = Target("class", "default")
        made.scheduler.core.limits.limit(made.scheduler.now(), OPERATOR, target, Caps(max_running=1))
        made.step()
        states = [state(made, name) for name in names]
        assert states == [State.HELD_KEPT, State.HELD_KEPT, State.RUNNING]
        ended_well(made, **dict.fromkeys(names, 30))


@DEPTHS
def test_what_borrows_is_stopped_worst_first(depth: int) -> None:
    """In a class where priority counts, though nobody may cut in."""
    classes = {"batch": ClassPolicy(order="priority", borrow=True, max_running=1)}
    tables = {"bulk": TenantPolicy(class_="batch"), "chat": TenantPolicy()}
    with rig(classes, depth=depth, max_num_seqs=6, max_num_active_seqs=3) as made:
        made.scheduler.core.configure(classes, tables)
        names = [add(made, "bulk", tokens=30, priority=priority) for priority in (9, 5, -10)]
        made.step()
        other = add(made, "chat", tokens=5)
        made.step()
        states = [state(made, name) for name in names]
        assert states == [State.HELD_KEPT, State.RUNNING, State.RUNNING]
        ended_well(made, **dict.fromkeys(names, 30), **{other: 5})


class TestStepBudget:
    """Prompt tokens per step of a class while a better one is present."""

    CLASSES = {  # noqa: RUF012
        "urgent": ClassPolicy(position=-1),
        "default": ClassPolicy(max_prefill_tokens_per_step=48),
    }

    @pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
    def test_batch_prefills_are_cut_while_something_urgent_runs(self, depth: int) -> None:
        """48 tokens in all per step for prompts that run and prompts that wait; decodes and urgent prompts are free."""
        with rig(self.CLASSES, depth=depth, max_num_seqs=6, max_num_active_seqs=5) as made:
            decoding = add(made, "bulk", prompt=10, tokens=60)
            made.step()
            urgent = add(made, "chat", prompt=200, tokens=12)
            bulk = [add(made, "bulk", prompt=700, tokens=5) for _ in range(2)]
            while urgent not in made.finished:
                scheduled = made.step()
                if urgent in scheduled:
                    assert sum(scheduled.get(name, 0) for name in bulk) <= 48
                    assert scheduled.get(decoding, 1) == 1
                    assert scheduled[urgent] in (200, 1)
            assert sum(made.step().get(name, 0) for name in bulk) > 48
            ended_well(made, **{decoding: 60, urgent: 12}, **dict.fromkeys(bulk, 5))

    def test_a_budget_of_zero_stops_prefills_and_lets_decodes_go_on(self) -> None:
        """What decodes goes on; what has a prompt to compute waits until the urgent one is done."""
        classes = {**self.CLASSES, "default": ClassPolicy(max_prefill_tokens_per_step=0)}
        with rig(classes) as made:
            urgent = add(made, "chat", prompt=20, tokens=5)
            bulk = add(made, "bulk", prompt=30, tokens=5)
            while urgent not in made.finished:
                assert bulk not in made.step() or urgent in made.finished
            ended_well(made, **{urgent: 5, bulk: 5})

    @pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
    def test_a_spent_budget_of_a_better_class_lets_others_in(self, depth: int) -> None:
        """What is admitted in a step spends its class's budget too; then the class waits, and nobody behind it."""
        classes = {"urgent": ClassPolicy(position=-1), "default": ClassPolicy()}
        with rig(classes, depth=depth, max_num_seqs=12, max_num_active_seqs=10) as made:
            caps = Caps(max_prefill_tokens_per_step=40)
            made.scheduler.core.limits.limit(0.0, OPERATOR, Target("class", "urgent"), caps)
            urgent = [add(made, "chat", prompt=40, tokens=2) for _ in range(20)]
            bulk = [add(made, "bulk", prompt=20, tokens=3) for _ in range(3)]
            first = made.step()
            assert sum(name in first for name in urgent) == 1
            assert all(name in first for name in bulk)
            ended_well(made, **dict.fromkeys(urgent, 2), **dict.fromkeys(bulk, 3))

    @pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
    def test_what_stands_aside_waits_for_the_first_token_of_what_begins(self, depth: int) -> None:
        """Its decodes and prompts are in no step before that token is out: two with asynchronous scheduling."""
        classes = {**self.CLASSES, "default": ClassPolicy(stand_aside=True)}
        with rig(classes, depth=depth, max_num_seqs=6, max_num_active_seqs=5) as made:
            decoding = [add(made, "bulk", prompt=10, tokens=60) for _ in range(2)]
            while not all(made.computed.get(name, 0) > 12 for name in decoding):
                made.step()
            urgent = [add(made, "chat", prompt=200, tokens=12), add(made, "chat", prompt=100, tokens=12)]
            prompt = add(made, "bulk", prompt=700, tokens=5)
            assert dict(made.step()) == {urgent[0]: 200, urgent[1]: 100}
            if depth > 1:
                assert dict(made.step()) == {urgent[0]: 1, urgent[1]: 1}
            after = dict(made.step())
            assert all(after[name] == 1 for name in decoding)
            assert after[prompt] > 1
            ended_well(made, **dict.fromkeys(decoding, 60), **dict.fromkeys(urgent, 12), **{prompt: 5})

    @pytest.mark.parametrize("aside", [True, False], ids=["aside", "not aside"])
    def test_the_output_thread_goes_first_with_a_token_for_which_others_stood_aside(
        self, aside: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The engine's thread sleeps before the next step: once per first token of a better class, for no other."""
        from coxswain.service.scheduler import steered

        slept: list[float] = []
        monkeypatch.setattr(steered.time, "sleep", slept.append)
        with rig({"urgent": ClassPolicy(position=-1), "default": ClassPolicy(stand_aside=aside)}) as made:
            bulk = add(made, "bulk", prompt=10, tokens=9)
            made.step()
            chat = add(made, "chat", prompt=10, tokens=3)
            made.step()
            assert not slept
            made.step()
            assert slept == [steered.HANDOVER_S] * aside
            ended_well(made, **{bulk: 9, chat: 3})
            assert len(slept) == aside

    def test_a_budget_that_leaves_the_table_stops_bounding_at_once(self) -> None:
        """The table without its last budget comes while the budget is spent: prompts go on in the next step."""
        with rig({**self.CLASSES, "default": ClassPolicy(max_prefill_tokens_per_step=0)}) as made:
            urgent = add(made, "chat", prompt=20, tokens=50)
            bulk = add(made, "bulk", prompt=30, tokens=5)
            assert bulk not in made.step()
            made.scheduler.core.configure(
                {"urgent": ClassPolicy(position=-1), "default": ClassPolicy()}, URGENT
            )
            assert bulk in made.step()
            ended_well(made, **{urgent: 50, bulk: 5})


def test_a_fault_of_ours_ends_nobodys_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command or a query on which this worker breaks is refused; the engine goes on."""

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    with rig({"default": ClassPolicy()}) as made:
        name = add(made, "bulk", prompt=20, tokens=5)
        scheduler = made.scheduler
        monkeypatch.setattr(scheduler.core.drain, "begin", broken)
        monkeypatch.setattr(scheduler.reporter, "page", broken)
        assert scheduler.port.offer(CommandIn(OPERATOR, "drain", Drain(id="c1", on=True), (), "a"))
        assert scheduler.port.offer(QueryIn("queue", QueueQuery(), "b"))
        said = []
        while (
            len(said) < 2 and made.step()
        ):  # logging a fault may take all the time that a step has for commands
            said += scheduler.port.collect()
        assert [item.reply.code for item in said if isinstance(item, ReplyOut)] == [422]
        assert [item.answer.code for item in said if isinstance(item, AnswerOut)] == [422]
        ended_well(made, **{name: 5})


def test_the_token_budget_follows_priority_as_it_changes() -> None:
    """Of two prompts under way the one that is made more urgent gets the step's tokens first, whoever came first."""
    classes = {"default": ClassPolicy(order="priority", cut_in="queue")}
    with rig(classes, max_num_batched_tokens=64) as made:
        first, second = (add(made, "bulk", prompt=300, tokens=5) for _ in range(2))
        while second not in made.step():
            pass
        core = made.scheduler.core
        third = add(made, "bulk", prompt=10, tokens=60)
        made.step()
        for name, priority in ((second, -1), (first, 1)):
            core.reprioritize(0.0, core.roster.records[name], priority, None, "operator")
        made.step()
        assert [request.request_id for request in made.scheduler.running] == [second, first]
        ended_well(made, **{first: 5, second: 5, third: 60})
