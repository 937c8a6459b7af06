"""Random end-to-end runs: everything that can be done to requests, at random times, and what must hold in the end.

A run is its seed: arrivals, commands and time (a clock that each step moves) come from one pair of dice. To add
something that can be done, add a line to `ACTIONS`.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from vllm.v1.core.sched.interface import PauseState

from coxswain.schemas import events as ev
from coxswain.schemas.commands import Targets
from coxswain.schemas.policy import ClassPolicy, Lead, TenantPolicy, TenantRank
from coxswain.schemas.subjects import CONTROLLER, ENGINE, OPERATOR
from coxswain.service.port import LeadIn
from coxswain.service.scheduler.states import State
from tests.support.random_cases import TENANTS, Case, send
from tests.support.simulated import Engine

STEP_S: Final = 0.01
LIVE: Final = 14
"""Requests that are here at once: more than can run, so that some wait."""
PATIENCE: Final = 700
"""Steps that a request which nobody holds may go without running, at most: all others that are here may run to their
end before it."""
EVERY: Final = 64
"""Steps between two looks at everything."""
TABLES: Final[tuple[dict[str, Any], ...]] = (
    {},
    {
        "classes": {"chat": ClassPolicy(position=-1), "batch": ClassPolicy(position=1, order="priority")},
        "tenants": {name: TenantPolicy(classes=("chat", "batch")) for name in TENANTS},
    },
    {
        "classes": {"chat": ClassPolicy(order="priority"), "batch": ClassPolicy(position=-1)},
        "tenants": {
            "acme": TenantPolicy(weight=4, class_="batch"),
            "default": TenantPolicy(classes=("chat",)),
        },
    },
    {
        "classes": {
            "chat": ClassPolicy(position=-1, cut_in="kv", quantum_s=0.03),
            "default": ClassPolicy(order="priority", cut_in="slots", cooldown_s=0.1, ageing_s=1.0),
            "batch": ClassPolicy(
                position=1,
                cut_in="queue",
                ageing_s=0.5,
                max_prefill_tokens_per_step=24,
                linger_s=0.05,
                stand_aside=True,
                borrow=True,
                max_running=1,
            ),
        },
        "tenants": {name: TenantPolicy(classes=("chat", "batch"), max_running=4) for name in TENANTS},
    },
)


class Run:
    """One random run.

    Args:
        engine: a steered engine; its clock is replaced.
        wanted: the requests to send.
        seed: of everything that happens.
    """

    def __init__(self, engine: Engine, wanted: list[Case], seed: int) -> None:
        self.engine = engine
        self.dice = random.Random(seed)
        self.wanted = list(reversed(wanted))
        self.live: dict[str, Case] = {}
        self.gone: set[str] = set()
        """Aborted by a command, or left by their client."""
        self.now = 1_000.0
        self.epoch = (1.0, 0)
        self.turns: dict[str, list[list[int]]] = {}
        """What sessions have yet to say."""
        self.idle: dict[str, int] = {}
        self.longest_idle = 0
        self.done = dict.fromkeys(ACTIONS, 0)
        engine.scheduler.now = lambda: self.now
        engine.scheduler._tick_at = float("inf")
        self.events = engine.events()
        self.lead()

    # What happens

    def play(self) -> None:
        """Let everything arrive, be disturbed and end."""
        names, weights = list(ACTIONS), [action.weight for action in ACTIONS.values()]
        while self.wanted or self.live:
            while self.wanted and len(self.live) < LIVE and self.dice.random() < 0.5:
                self.arrive(self.wanted.pop())
            for _ in range(self.dice.randrange(3)):
                self.act(self.dice.choices(names, weights)[0])
            self.step()
            if self.engine.steps % EVERY == 0:
                self.look()
        self.engine.run()

    def arrive(self, case: Case) -> None:
        """Send a request."""
        send(self.engine, case, case.prompt, priority=case.priority, arrival_time=self.now)
        self.live[case.id] = case
        if case.turns:
            self.turns[case.id] = [*case.turns]
        self.now += 1e-6  # no two arrive at once

    def go_on_talking(self) -> None:
        """Sessions get their next turn, at some time, or their end."""
        for name in [name for name in self.turns if name not in self.gone and self.dice.random() < 0.1]:
            left = self.turns[name]
            if left:
                send(self.engine, self.live[name], left.pop(0))
            else:
                send(self.engine, self.live[name], [1], last=True)
                del self.turns[name]

    def act(self, name: str) -> None:
        """Do one of `ACTIONS` to up to three requests, if there are any."""
        some = self.dice.sample(list(self.live), min(len(self.live), self.dice.randrange(1, 4)))
        if some:
            ACTIONS[name].do(self, [self.live[name] for name in some])
            self.done[name] += 1

    def step(self) -> None:
        """Take a step, move the clock, see who ended and who ran."""
        self.now += STEP_S
        self.engine.scheduled = {}
        if not self.engine.step():
            self.now += 10 * STEP_S  # an idle engine waits for a lease to end
        self.go_on_talking()
        for name in [name for name, case in self.live.items() if self.over(name, case)]:
            del self.live[name]
            self.idle.pop(name, None)
            self.turns.pop(name, None)
        records = self.engine.scheduler.core.roster.records
        for name, case in self.live.items():
            assert not (case.turns and records[name].holds), "sessions cannot be held"
            held = bool(
                records[name].holds.keys() - {ENGINE}
            )  # what only the engine holds must go on by itself
            held |= bool(case.turns)  # it waits for its client
            self.idle[name] = 0 if held or name in self.engine.scheduled else self.idle.get(name, 0) + 1
        self.check_caps()
        self.check_order()
        self.engine.check_prefix_cache()
        self.longest_idle = max(self.longest_idle, *self.idle.values(), 0)

    def over(self, name: str, case: Case) -> bool:
        """Whether it has ended. Each turn of a session is finished, and the end of one that waits is not told."""
        if case.turns:
            return name not in self.engine.scheduler.requests
        return name in self.gone or name in self.engine.finished

    def check_caps(self) -> None:
        """In every step: of what may not borrow no more runs than may, but for sessions, which nobody stops.

        Not while vLLM is paused: a lowered cap is enforced when scheduling goes on.
        """
        if self.engine.scheduler.pause_state != PauseState.UNPAUSED:
            return
        core = self.engine.scheduler.core
        groups = (*core.roster.classes.values(), *core.tenants.accounts.values())
        over = [group for group in groups if group.excess > group.borrowing]
        for name in self.live if over else ():
            record = core.roster.records[name]
            if self.live[name].turns and record.state is State.RUNNING:
                over = [group for group in over if group not in (record.account, record.group)]
        assert not over, over

    def check_order(self) -> None:
        """Before every step: where classes say so, the step's tokens are given by class and priority."""
        scheduler = self.engine.scheduler
        scheduler.mechanism.sort()
        if scheduler.core.room.orders_running:
            order = [request.priority for request in scheduler.running]
            assert order == sorted(order)

    def command(self, verb: str, some: list[Case], **fields: Any) -> None:
        """An operator's command, or with `role` a controller's."""
        if fields.get("role") == CONTROLLER:
            fields["epoch"] = self.epoch
        self.engine.command(verb, *(case.public for case in some), **fields)

    def lead(self) -> None:
        """A controller leads, sometimes a new one."""
        self.epoch = (1.0, self.epoch[1] + (self.dice.random() < 0.2))
        lead = Lead(epoch=self.epoch, controller="c", policy="random", at=self.now)
        self.engine.scheduler.port.offer(LeadIn(lead))

    @property
    def drafts_in_flight_on_v1(self) -> bool:
        """Whether drafts are made while steps are in flight, on the V1 runner."""
        config = self.engine.scheduler.vllm_config
        asynchronous = config.scheduler_config.async_scheduling and not config.use_v2_model_runner
        return bool(asynchronous and self.engine.scheduler.num_spec_tokens)

    @property
    def ledger(self) -> Any:
        """The scheduler's own count."""
        return self.engine.scheduler.core.ledger

    # What must hold

    def look(self) -> None:
        """At intervals: all invariants of the core, and every block accounted for."""
        self.engine.scheduler.core.validate()
        self.engine.check_blocks()
        assert self.longest_idle < PATIENCE, "a request that nobody held did not run"

    def check(self, expected: dict[str, list[int]]) -> None:
        """In the end: the same tokens, nobody lost, nothing leaked, no command failed, every position counted."""
        engine = self.engine
        engine.check_empty()
        self.look()
        failed = [reply for reply in engine.replies if reply.error and "failed" in reply.error]
        assert not failed, failed[0].error
        for name, tokens in expected.items():
            said = engine.outputs.get(name, [])
            assert said == (tokens[: len(said)] if name in self.gone else tokens), name
            assert name in self.gone or name in engine.finished
        self.check_accounts(expected)

    def check_accounts(self, expected: dict[str, list[int]]) -> None:
        """What `finished` says of every request is what the device did for it, and tenants' totals are the sum."""
        ended = {record: fields for record, kind, fields in self.events if kind is ev.Finished}
        assert {record.id for record in ended} == expected.keys()
        for record, fields in ended.items():
            assert positions(fields) == self.engine.computed[record.id], (record, fields)
            assert min(fields[name] for name in COUNTED) >= 0, (record, fields)
            if record.id not in self.gone and not record.earlier_turns:
                assert fields["output_tokens"] == len(expected[record.id])
                assert fields["discarded_tokens"] <= self.may_discard(fields["reason"]), (record, fields)
        core = self.engine.scheduler.core
        core.ledger.settle_all()
        for account in core.tenants.accounts.values():
            mine = [fields for record, fields in ended.items() if record.account is account]
            for name in COUNTED:
                assert getattr(account, name) == sum(fields[name] for fields in mine), (account, name)

    def may_discard(self, reason: str) -> float:
        """Steps under way when a stop token comes: their work is lost. One that ends by length has none."""
        if self.engine.scheduler.num_spec_tokens:
            return float("inf")  # drafts
        return self.engine.core.batch_queue_size - 1 if reason == "stop" else 0


COUNTED: Final = (
    "uncached_input_tokens", "cached_input_tokens", "external_input_tokens", "uncomputed_input_tokens",
    "output_tokens", "recomputed_tokens", "restored_tokens", "reloaded_tokens", "discarded_tokens",
)  # fmt: skip


def positions(fields: dict[str, Any]) -> int:
    """What the device computed for a request, by what its `finished` event says."""
    return int(
        fields["uncached_input_tokens"] - fields["uncomputed_input_tokens"] + fields["recomputed_tokens"]
        + fields["output_tokens"] - fields["generations"] + fields["discarded_tokens"]
    )  # fmt: skip


# What can be done


class Action(NamedTuple):
    """One thing that can be done to requests, and how often it is, relative to the others."""

    weight: float
    do: Callable[[Run, list[Case]], None]


def hold(run: Run, some: list[Case]) -> None:
    """Held by one of two roles, with its KV or without, with a lease or (an operator) without."""
    role = run.dice.choice([OPERATOR, CONTROLLER])
    lease_s = run.dice.choice([0.02, 0.05, 0.5, None if role == OPERATOR else 1.0])
    kv = run.dice.choice(["keep", "keep", "drop"])
    run.command("preempt", some, role=role, kv=kv, lease_s=lease_s)


def hold_for_nothing(run: Run, some: list[Case]) -> None:
    """Held and continued before any step."""
    hold(run, some)
    run.command("continue", some)


def go_on(run: Run, some: list[Case]) -> None:
    """Continued by one of two roles."""
    run.command("continue", some, role=run.dice.choice([OPERATOR, OPERATOR, CONTROLLER]))


def prioritize(run: Run, some: list[Case]) -> None:
    """Another priority or class, which the tables in force may lack."""
    if run.dice.random() < 0.6:
        run.command("prioritize", some, priority=run.dice.randrange(-5, 5))
    else:
        run.command("prioritize", some, class_=run.dice.choice(["chat", "batch", "default"]))


def abort(run: Run, some: list[Case]) -> None:
    """Ended by a command, with all its children."""
    run.command("abort", some[:1])
    run.gone |= {case.id for case in run.live.values() if case.public == some[0].public}


def disconnect(run: Run, some: list[Case]) -> None:
    """The client of one child leaves."""
    run.engine.core.abort_requests([some[0].id])
    run.gone.add(some[0].id)


def rank(run: Run, _some: list[Case]) -> None:
    """A controller sends other virtual times and weights."""
    ranks = {
        name: TenantRank(base=run.dice.randrange(-500, 500), weight=run.dice.choice([0.5, 1, 4]))
        for name in TENANTS
    }
    incarnation = run.engine.scheduler.incarnation
    run.command("rank", [], role=CONTROLLER, incarnation=incarnation, tenants=ranks)


def limit(run: Run, _some: list[Case]) -> None:
    """A role sets or lifts caps of a tenant or class."""
    role = run.dice.choice([OPERATOR, CONTROLLER])
    named = {"tenants": (run.dice.choice(TENANTS),)} if run.dice.random() < 0.6 else {"classes": ("default",)}
    caps = {
        "max_running": run.dice.choice([None, None, 1, 2, 3]),
        "max_prefill_tokens_per_step": run.dice.choice([None, None, 16, 40]),
    }
    run.command("limit", [], role=role, targets=Targets(**named), **caps)


def drain(run: Run, _some: list[Case]) -> None:
    """Drained: every hold ends and none begins; then not drained."""
    run.command("drain", [], on=True)
    for _ in range(run.dice.randrange(3)):
        run.step()
    run.command("drain", [], on=False)


def reset(run: Run, _some: list[Case]) -> None:
    """The prefix cache is reset, mostly with what runs."""
    with may_keep_blocks(run):
        run.engine.core.reset_prefix_cache(reset_running_requests=run.dice.random() < 0.7)


def pause(run: Run, _some: list[Case]) -> None:
    """vLLM itself is paused: what runs stands still, or runs on and nothing new begins. Caches may be cleared.

    Not those of a connector: from it, what was dropped is to come back.
    """
    scheduler, core = run.engine.scheduler, run.engine.core
    # With drafts on the GPU's protocol V1 cannot stand still (docs/modes.md).
    still = not (run.drafts_in_flight_on_v1 or run.dice.random() < 0.4)
    scheduler.set_pause_state(PauseState.PAUSED_ALL if still else PauseState.PAUSED_NEW)
    clear = run.dice.random() < 0.5 and scheduler.connector is None
    for _ in range(run.dice.randrange(6)):
        run.act(run.dice.choice([name for name in ACTIONS if name != "pause"]))
        run.step()
        if clear and not scheduler.has_requests() and not core.batch_queue:
            clear = False
            with may_keep_blocks(run):
                core._finish_pause(clear_cache=True)
    core.resume_scheduler()


@contextmanager
def may_keep_blocks(run: Run) -> Iterator[None]:
    """vLLM cannot reset its cache while a session between two turns has blocks, or a connector is at work on some."""
    try:
        yield
    except RuntimeError as error:
        if "Failed to reset KV cache" not in str(error):
            raise
        scheduler = run.engine.scheduler
        keep = [r for r in scheduler.requests.values() if scheduler.mechanism.blocks(r.steering)]
        assert keep or scheduler.deferred_frees
        assert scheduler.connector is not None or all(request.resumable for request in keep), keep


def configure(run: Run, _some: list[Case]) -> None:
    """Other tables of classes and tenants."""
    run.command("configure", [], **run.dice.choice(TABLES))


ACTIONS: Final[dict[str, Action]] = {
    "hold": Action(5, hold),
    "hold for nothing": Action(1, hold_for_nothing),
    "continue": Action(8, go_on),
    "prioritize": Action(3, prioritize),
    "abort": Action(0.1, abort),
    "disconnect": Action(0.1, disconnect),
    "rank": Action(0.5, rank),
    "configure": Action(0.2, configure),
    "limit": Action(0.7, limit),
    "drain": Action(0.1, drain),
    "reset": Action(0.3, reset),
    "pause": Action(0.3, pause),
    "lead": Action(1, lambda run, _some: run.lead()),
}
