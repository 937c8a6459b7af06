"""Whether a scheduler obeys the model runner's protocol: a strict reading of every SchedulerOutput.

Pure: fed with each SchedulerOutput in the order of execution (`observe`) and with the tokens that the device then
samples (`sampled`). Called by `device` when checking is on. A real runner that gets a wrong output mostly computes
something wrong without a word; here it is a named error that says which rule was broken, which kills the
engine. That is the purpose.

Rules, and where vLLM 0.32.0 relies on them (paths below vllm/v1):

* `counts`: every scheduled id is introduced once, has at least one token, the sums fit the budget.
* `slots`: V2: the known requests fit in max_num_seqs, and only finishing and preemption make room
  (worker/gpu/states.py:99). V1: the batch fits.
* `known`: only known requests are scheduled; only unknown ones, or a session's next turn, are new
  (worker/gpu/model_runner.py:1189).
* `resumed`: a preempted request comes back on V1 in resumed_req_ids with its whole table
  (worker/gpu_model_runner.py:1380), on V2 as a new one.
* `tokens`: tokens that are sent are those that the device sampled. V2: a new request brings prefill_token_ids.
  V1 with async scheduling: one that was not in the last step comes with all_token_ids
  (worker/gpu_model_runner.py:1392).
* `computed`: num_computed_tokens continues where the request's last step ended. With drafts: where the accepted
  ones end; an async scheduler that does not know yet may count those that its last step rejects, and V1 relies
  on that (worker/gpu_model_runner.py:1341).
* `future`: no position is computed whose token is not known yet.
* `blocks`: tables are long enough and name existing blocks, each once; block 0 is the null block.
* `writer`: no block is written by two live requests.
* `kv`: every position that a step attends to holds the KV of this request's own tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from coxswain.service.simulated.kv import KvContent, extend


class Rule(StrEnum):
    """What can be broken; the module's docstring says how."""

    COUNTS = "counts"
    SLOTS = "slots"
    KNOWN = "known"
    RESUMED = "resumed"
    TOKENS = "tokens"
    COMPUTED = "computed"
    FUTURE = "future"
    BLOCKS = "blocks"
    WRITER = "writer"
    KV = "kv"


class ProtocolViolationError(RuntimeError):
    """A SchedulerOutput broke a rule of the model runner's protocol: a bug of the scheduler."""

    def __init__(self, rule: Rule, step: int, request: str | None, text: str) -> None:
        who = f"request {request}: " if request is not None else ""
        super().__init__(
            f"step {step} breaks rule `{rule}` of the model runner's protocol: {who}{text}. "
            "The scheduler has a bug; the rules are listed in coxswain.service.simulated.checker.",
        )
        self.rule = rule
        self.step = step
        self.request = request


class Limits(NamedTuple):
    """The sizes that the model runner was built with."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int


@dataclass(slots=True)
class _Request:
    """What a model runner knows of a request, and what the checker knows beside."""

    tokens: list[int]
    """Prompt and sampled tokens."""
    prompt: int
    computed: int
    blocks: list[int]
    salt: int
    chain: list[int] = field(default_factory=list)
    live: bool = True
    """False once preempted (V1): its blocks are no longer its own."""
    rejected: int = 0
    """Drafts that its last step rejected."""

    def cut(self, length: int) -> None:
        """Forget tokens from `length` on."""
        del self.tokens[length:]
        del self.chain[length:]


class Checker:
    """The checker of one model runner.

    Args:
        limits: sizes.
        v2: whether the scheduler speaks to model runner V2 or V1.
        asynchronous: whether scheduling is async.

    Raises (from `observe` and `sampled`):
        ProtocolViolationError: for the first rule that is broken.
    """

    def __init__(self, limits: Limits, *, v2: bool, asynchronous: bool) -> None:
        self.limits = limits
        self.v2 = v2
        self.asynchronous = asynchronous
        self.step = 0
        self._known: dict[str, _Request] = {}
        self._preempted: dict[str, _Request] = {}
        """V2: forgotten by the runner, not by us: they must come back with the tokens that were sampled."""
        self._batch: set[str] = set()
        """V1: requests of the previous step."""
        self._writer: dict[int, tuple[str, _Request]] = {}
        """Who wrote a block last. A name may come again for another request."""
        self.kv = KvContent(limits.block_size)

    @property
    def slots(self) -> int:
        """Slots in use on V2: requests that the runner knows."""
        return len(self._known)

    def observe(self, output: Any, drafts: Mapping[str, Sequence[int]] = MappingProxyType({})) -> None:
        """Check one step before it runs, and run its KV writes; `drafts` is what it tries beside known tokens."""
        self.step += 1
        self._release(output)
        self.kv.zero(output.new_block_ids_to_zero or ())
        for source, target in output.kv_cache_block_copies or ():
            self.kv.copy(source, target)
        self._check_counts(output)
        for new in output.scheduled_new_reqs:
            self._add(new)
        self._update(output.scheduled_cached_reqs)
        self._check_slots(output)
        self._compute(output.num_scheduled_tokens, drafts)
        self._batch = set(output.num_scheduled_tokens)

    def sampled(self, tokens: Mapping[str, Sequence[int]]) -> None:
        """Learn what the device sampled in the step last observed."""
        for name, new in tokens.items():
            request = self._known.get(name)
            if request is not None:
                request.tokens.extend(new)
                request.rejected = max(0, request.computed - len(request.tokens) + 1)
                request.computed -= request.rejected
                del request.chain[request.computed :]

    def forget_kv(self) -> None:
        """The device slept: nothing is in its KV cache any more."""
        self.kv.clear()

    # Who is known

    def _release(self, output: Any) -> None:
        for name in output.finished_req_ids:
            self._known.pop(name, None)
            self._preempted.pop(name, None)
            self._batch.discard(name)
        for name in output.preempted_req_ids or ():
            request = self._known.get(name)
            if request is None:
                continue
            request.live = False
            if self.v2:
                self._preempted[name] = self._known.pop(name)

    def _add(self, new: Any) -> None:
        name, prompt = new.req_id, list(new.prompt_token_ids)
        tokens = prompt
        if self.v2:
            if new.prefill_token_ids is None:
                self._fail(Rule.TOKENS, name, "is new without prefill_token_ids, which V2 reads")
            tokens = list(new.prefill_token_ids)
        old = self._known.get(name)
        if old is not None and not _is_next_turn(old, prompt):
            self._fail(
                Rule.KNOWN,
                name,
                "is introduced as new while the runner has it: it was neither finished nor preempted",
            )
        before = self._preempted.pop(name, None)
        if (
            before is not None
            and tokens != before.tokens[: len(tokens)]
            and not _is_next_turn(before, prompt)
        ):
            self._fail(Rule.TOKENS, name, "comes back with tokens that the device did not sample")
        if tokens[: len(prompt)] != prompt:
            self._fail(Rule.TOKENS, name, "prefill_token_ids do not begin with the prompt")
        if new.num_computed_tokens >= len(tokens):
            self._fail(
                Rule.COMPUTED,
                name,
                f"{new.num_computed_tokens} of {len(tokens)} tokens are computed: none is left to run",
            )
        salt = hash(("lora", new.lora_request.lora_int_id)) if new.lora_request else 0
        request = _Request(tokens, len(prompt), new.num_computed_tokens, [], salt)
        self._known[name] = request
        self._batch.discard(name)
        self._append(name, request, new.block_ids)

    def _update(self, cached: Any) -> None:
        for index, name in enumerate(cached.req_ids):
            request = self._known.get(name)
            if request is None:
                self._fail(Rule.KNOWN, name, "is scheduled as cached, but the runner does not know it")
            resumed = name in cached.resumed_req_ids
            blocks, computed = cached.new_block_ids[index], cached.num_computed_tokens[index]
            ahead = request.rejected if self.asynchronous and (self.v2 or name in self._batch) else 0
            if self.v2:
                if resumed:
                    self._fail(
                        Rule.RESUMED,
                        name,
                        "is in resumed_req_ids, which V2 does not read: it appends the blocks",
                    )
            else:
                self._return_v1(name, request, cached, index, ahead, resumed=resumed)
            if resumed:
                request.computed = computed
            elif computed != request.computed + ahead and not (self.v2 and computed == request.computed):
                self._fail(
                    Rule.COMPUTED,
                    name,
                    f"num_computed_tokens is {computed}, the device has computed {request.computed}",
                )
            if blocks is not None:
                self._append(name, request, blocks)

    def _return_v1(
        self, name: str, request: _Request, cached: Any, index: int, ahead: int, *, resumed: bool
    ) -> None:
        """What V1 takes from the scheduler when a request's state is not that of the last step."""
        outputs = cached.num_output_tokens[index]
        have = len(request.tokens) - request.prompt
        if resumed:
            if cached.new_block_ids[index] is None:
                self._fail(Rule.RESUMED, name, "is resumed without a block table")
            self._disown(request)
            request.live = True
            self._batch.discard(name)
            if outputs < have:  # vLLM dropped output in flight at the preemption; it is sampled again
                request.cut(request.prompt + outputs)
                have = outputs
        elif not request.live:
            self._fail(Rule.RESUMED, name, "was preempted and is scheduled without being in resumed_req_ids")
        if outputs != have + ahead * (not resumed):
            left_out = f"; {ahead} drafts that its last step rejected are to be counted" if ahead else ""
            self._fail(
                Rule.TOKENS, name, f"num_output_tokens is {outputs}, the device has sampled {have}{left_out}"
            )
        if name in self._batch or not outputs:
            return
        sent = cached.all_token_ids.get(name)
        if sent is None:
            if self.asynchronous:
                self._fail(
                    Rule.TOKENS, name, "was not in the last step's batch and is sent without all_token_ids"
                )
        elif list(sent) != request.tokens:
            self._fail(
                Rule.TOKENS,
                name,
                f"all_token_ids ({len(sent)}) are not the {len(request.tokens)} tokens that the device has",
            )

    # Sums and slots

    def _check_counts(self, output: Any) -> None:
        introduced = [new.req_id for new in output.scheduled_new_reqs] + list(
            output.scheduled_cached_reqs.req_ids
        )
        scheduled = output.num_scheduled_tokens
        known: set[str] = set()
        for name in introduced:
            if name in known:
                self._fail(Rule.COUNTS, name, "is introduced twice in one step")
            if name not in scheduled:
                self._fail(Rule.COUNTS, name, "is introduced, but no tokens are scheduled for it")
            known.add(name)
        for name, count in scheduled.items():
            if name not in known:
                self._fail(Rule.COUNTS, name, "has scheduled tokens, but is neither new nor cached")
            if count < 1:
                self._fail(Rule.COUNTS, name, f"{count} tokens are scheduled")
        total = sum(scheduled.values())
        if total != output.total_num_scheduled_tokens or total > self.limits.max_num_batched_tokens:
            self._fail(
                Rule.COUNTS, None,
                f"{total} tokens are scheduled, the total says {output.total_num_scheduled_tokens}, "
                f"the budget is {self.limits.max_num_batched_tokens}",
            )  # fmt: skip

    def _check_slots(self, output: Any) -> None:
        used = len(self._known) if self.v2 else len(output.num_scheduled_tokens)
        if used > self.limits.max_num_seqs:
            what = "requests have a slot" if self.v2 else "requests are in the batch"
            self._fail(
                Rule.SLOTS, None, f"{used} {what}, there are {self.limits.max_num_seqs} (max_num_seqs)"
            )

    # Blocks and KV

    def _append(self, name: str, request: _Request, groups: Sequence[Sequence[int]]) -> None:
        if len(groups) != 1:
            self._fail(
                Rule.BLOCKS, name, f"has {len(groups)} block tables, the device has one KV cache group"
            )
        for block in groups[0]:
            if not 0 < block < self.limits.num_blocks:
                self._fail(Rule.BLOCKS, name, f"block {block} is none of 1 to {self.limits.num_blocks - 1}")
            if block in request.blocks:
                self._fail(Rule.BLOCKS, name, f"block {block} is in its table already")
            request.blocks.append(block)

    def _disown(self, request: _Request) -> None:
        """Its table is no longer its own: blocks that it gets back are as good as another's until it writes them."""
        for block in request.blocks:
            if block in self._writer and self._writer[block][1] is request:
                del self._writer[block]
        request.blocks = []

    def _compute(self, scheduled: Mapping[str, int], drafts: Mapping[str, Sequence[int]]) -> None:
        """Write the KV of all scheduled positions, then read every context: as a layer does for a batch."""
        size = self.limits.block_size
        for name, count in scheduled.items():
            request = self._known[name]
            start, end = request.computed, request.computed + count
            tokens = [*request.tokens, *drafts[name]] if name in drafts else request.tokens
            if end > len(tokens):
                self._fail(
                    Rule.FUTURE,
                    name,
                    f"position {end - 1} is to run, but only {len(tokens)} tokens are known",
                )
            if end > len(request.blocks) * size:
                self._fail(
                    Rule.BLOCKS,
                    name,
                    f"position {end - 1} is beyond its table of {len(request.blocks)} blocks of {size}",
                )
            extend(request.chain, tokens, end, request.salt)
            for block in self.kv.write(request.blocks, start, request.chain, end):
                self._check_writer(name, request, block)
        for name, count in scheduled.items():
            request = self._known[name]
            request.computed += count
            bad = self.kv.read(request.blocks, request.chain, request.computed)
            if bad is not None:
                held = (
                    "nothing"
                    if bad.empty
                    else f"the KV of other tokens (last written by {self._writer.get(bad.block, ('nobody',))[0]})"
                )
                self._fail(Rule.KV, name, f"position {bad.position} in block {bad.block} holds {held}")

    def _check_writer(self, name: str, request: _Request, block: int) -> None:
        other, owner = self._writer.get(block, (name, request))
        if other != name and owner is self._known.get(other) and owner.live and block in owner.blocks:
            self._fail(
                Rule.WRITER,
                name,
                f"writes block {block}, which {other} has written and still has in its table",
            )
        self._writer[block] = name, request

    def _fail(self, rule: Rule, request: str | None, text: str) -> NoReturn:
        raise ProtocolViolationError(rule, self.step, request, text)


def _is_next_turn(old: _Request, prompt: list[int]) -> bool:
    """Whether a known request comes again as a streaming session's next turn: its prompt has grown."""
    return len(prompt) > old.prompt and prompt[: old.prompt] == old.tokens[: old.prompt]
