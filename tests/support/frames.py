"""Status frames for tests of the control side, and a worker small enough to reason about that makes them.

The small worker charges and lifts by protocol.md's rule for workers, written out as plainly as possible.
No model, no clock, no NATS.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from coxswain.control.core import Answer, Beat, Send
from coxswain.schemas.commands import Configure, Continue, Preempt, Rank
from coxswain.schemas.policy import Epoch, Prices, TenantPolicy, digest
from coxswain.schemas.status import CommandStats, Frame, KvBlocks, Leader, RequestStatus, Slots, TenantStatus


def row(tenant: str, **fields: Any) -> TenantStatus:
    """One tenant's row; `virtual_time` follows from its parts."""
    plain: dict[str, Any] = {
        "class_": "default", "queued": 0, "running": 0, "held": 0, "oldest_queued_s": 0.0, "base": 0.0,
        "charged": 0.0, "lift": 0.0, "weight": 1.0, "uncached_input_tokens_total": 0,
        "cached_input_tokens_total": 0, "output_tokens_total": 0, "recomputed_tokens_total": 0,
        "finished_total": 0,
    }  # fmt: skip
    merged = plain | fields
    virtual_time = merged["base"] + merged["charged"] + merged["lift"]
    return TenantStatus(tenant=tenant, virtual_time=virtual_time, **merged)


def request(name: str, tenant: str = "a", **fields: Any) -> RequestStatus:
    """A request that runs, unless `fields` say otherwise."""
    plain: dict[str, Any] = {
        "child": 0, "class_": "default", "priority": 0, "state": "running", "kv": "none", "arrived_at": 0.0,
        "prompt_tokens": 10, "cached_tokens": 0, "output_tokens": 0, "deadline_s": None,
    }  # fmt: skip
    return RequestStatus(request=name, tenant=tenant, **(plain | fields))


def frame(
    worker: str = "w1", incarnation: str = "01A", seq: int = 1, *rows: TenantStatus, **fields: Any
) -> Frame:
    """A frame; full and in one part unless `fields` say otherwise."""
    plain: dict[str, Any] = {
        "full": True, "part": 0, "parts": 1, "sent_at": 0.0, "step": 0, "model": "m", "vllm_version": "0",
        "state": "serving", "slots": Slots(active=1, total=1, running=0, held=0),
        "kv_blocks": KvBlocks(total=1, used=0, held=0), "step_s": 0.0, "queued": 0, "running": 0, "held": 0,
        "preempted_total": 0, "recomputed_tokens_total": 0, "commands": CommandStats(), "leader": Leader(),
        "config": digest({}, {}), "events_dropped_total": 0,
    }  # fmt: skip
    return Frame(worker=worker, incarnation=incarnation, seq=seq, tenants=rows, **(plain | fields))


@dataclass
class Account:
    """One tenant on the small worker; `queue` holds (input tokens, output tokens)."""

    name: str
    base: float = 0.0
    charged: float = 0.0
    expected_output: float = 0.0
    lift: float = 0.0
    weight: float = 1.0
    running: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    seen: bool = False
    queue: deque[tuple[int, int]] = field(default_factory=deque)

    @property
    def virtual_time(self) -> float:
        """What orders tenants."""
        return self.base + self.charged + self.lift


@dataclass
class Served:
    """A request that the small worker has admitted."""

    name: str
    account: Account
    input_tokens: int
    length: int
    expected: float = 0.0
    output_tokens: int = 0
    held: bool = False

    def row(self) -> RequestStatus:
        """As status shows it."""
        return request(
            self.name, self.account.name, prompt_tokens=self.input_tokens, output_tokens=self.output_tokens,
            state="held" if self.held else "running", kv="kept" if self.held else "none",
            held_by=("controller",) if self.held else (),
        )  # fmt: skip


class SmallWorker:
    """A worker with `slots` running requests; each step admits by virtual time and gives one token to each.

    Args:
        name: the worker's.
        incarnation: a later one must sort after an earlier one, as ULIDs do.
        slots: requests that run at once.
    """

    def __init__(self, name: str = "w1", incarnation: str = "01A", slots: int = 4) -> None:
        self.name = name
        self.incarnation = incarnation
        self.slots = slots
        self.accounts: dict[str, Account] = {}
        self.prices = Prices()
        self.config = digest({}, {})
        self.epoch: Epoch | None = None
        self.got: list[Send | Beat] = []
        self._seq = self._serial = 0
        self._last_left: Account | None = None
        self._running: list[Served] = []

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._running) or any(each.queue for each in self.accounts.values())

    def account(self, tenant: str) -> Account:
        """The tenant's account, made on first sight."""
        return self.accounts.setdefault(tenant, Account(tenant))

    def arrive(self, tenant: str, input_tokens: int = 10, output_tokens: int = 5, *, times: int = 1) -> None:
        """Requests of a tenant join the queue; the first of them may lift it."""
        account = self.account(tenant)
        account.seen = True
        if not account.queue:
            waiting = [each for each in self.accounts.values() if each.queue]
            floor = min(waiting, key=lambda each: each.virtual_time, default=self._last_left)
            if floor is not None:
                account.lift += max(0.0, floor.virtual_time - account.virtual_time)
        account.queue.extend([(input_tokens, output_tokens)] * times)

    def step(self, count: int = 1) -> None:
        """Admit while there is room, then one output token each."""
        for _ in range(count):
            while sum(not each.held for each in self._running) < self.slots and any(
                each.queue for each in self.accounts.values()
            ):
                self._admit()
            for served in self._running:
                if served.held:
                    continue
                account = served.account
                served.output_tokens += 1
                tokens, expected = served.output_tokens, served.expected
                news = max(expected, tokens) - max(expected, tokens - 1)
                if tokens == served.length:
                    news -= max(0.0, expected - tokens)
                    account.running -= 1
                account.charged += news * self.prices.output / account.weight
                account.output_tokens += 1
            self._running = [each for each in self._running if each.output_tokens < each.length]

    def _admit(self) -> None:
        waiting = [each for each in self.accounts.values() if each.queue]
        account = min(waiting, key=lambda each: (each.virtual_time, each.name))
        input_tokens, output_tokens = account.queue.popleft()
        if not account.queue:
            self._last_left = account
        cost = input_tokens * self.prices.input + account.expected_output * self.prices.output
        account.charged += cost / account.weight
        account.input_tokens += input_tokens
        account.running += 1
        self._serial += 1
        name = f"{account.name}-{self.name}{self.incarnation}-{self._serial}"
        self._running.append(Served(name, account, input_tokens, output_tokens, account.expected_output))

    def frame(self) -> Frame:
        """A full frame as of now."""
        self._seq += 1
        rows = [self._row(account) for account in self.accounts.values() if account.seen]
        return frame(
            self.name, self.incarnation, self._seq, *rows,
            config=self.config, leader=Leader(epoch=self.epoch), queued=sum(each.queued for each in rows),
            running=len(self._running), requests=tuple(each.row() for each in self._running),
        )  # fmt: skip

    def _row(self, account: Account) -> TenantStatus:
        return row(
            account.name, queued=len(account.queue), running=account.running, base=account.base,
            charged=account.charged, lift=account.lift, weight=account.weight,
            expected_output=account.expected_output,
            uncached_input_tokens_total=account.input_tokens, output_tokens_total=account.output_tokens,
        )  # fmt: skip

    def obey(self, outgoing: list[Send | Beat]) -> list[Answer]:
        """Apply what is meant for this worker, as a worker would."""
        answers = []
        for each in outgoing:
            if isinstance(each, Beat):
                self.got.append(each)
                self.epoch = each.lead.epoch
            elif each.worker == self.name:
                self.got.append(each)
                answers.append(Answer(each, ok=self._apply(each)))
        return answers

    def _apply(self, send: Send) -> bool:
        command = send.command
        if isinstance(command, Configure):
            self.config = digest(command.classes, command.tenants)
            for account in self.accounts.values():
                account.weight = command.tenants.get(account.name, TenantPolicy()).weight
        if isinstance(command, Rank):
            if command.incarnation != self.incarnation:
                return False
            self.prices = command.prices or self.prices
            for tenant, rank in command.tenants.items():
                account = self.account(tenant)
                account.base, account.weight = rank.base, rank.weight
                account.expected_output = rank.expected_output
        if isinstance(command, Preempt | Continue):
            for served in self._running:
                if served.name in command.targets.requests:
                    served.held = isinstance(command, Preempt)
        return True
