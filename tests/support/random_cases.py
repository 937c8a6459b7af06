"""The requests of random end-to-end runs, what they are and how they are sent. From a seed, and nothing else."""

import random
from typing import Any, Final, NamedTuple

from ulid import ULID
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from coxswain.service.request_id import make
from tests.support.simulated import KEY, Engine

TENANTS: Final = ("acme", "globex", "initech")


class Case(NamedTuple):
    """One request of a run."""

    id: str
    """The engine's."""
    public: str
    """What commands name: several children of one client's request have the same."""
    prompt: list[int]
    params: SamplingParams
    priority: int
    lora: int = 0
    """Its adapter, if it has one."""
    turns: tuple[list[int], ...] = ()
    """What a streaming session says to it after its prompt."""


def cases(seed: int, count: int) -> list[Case]:
    """Requests: half of them share a long prefix, a quarter stops at a token of its own, some have two children."""
    dice = random.Random(seed)
    prefixes = [[dice.randrange(4_000) for _ in range(64)] for _ in range(2)]
    made: list[Case] = []
    while len(made) < count:
        own = [dice.randrange(4_000) for _ in range(dice.randrange(1, 120))]
        prompt = dice.choice(prefixes) + own if dice.random() < 0.5 else own
        # Any of 400 tokens stops it: after some ten, or never.
        stop = dice.sample(range(2_000, 4_000), 200) if dice.random() < 0.25 else []
        params = SamplingParams(max_tokens=dice.randrange(1, 80), ignore_eos=True, stop_token_ids=stop)
        ulid = str(ULID(dice.randbytes(16)))
        public = make(bytes.fromhex(KEY), dice.choice(TENANTS), dice.choice(["", "chat", "batch"]), ulid)
        tail = f"cmpl-{public}-0-{dice.randrange(2**32):08x}"
        names = [tail] if dice.random() < 0.9 else [f"{child}_{tail}" for child in range(2)]
        priority = dice.randrange(-3, 4)
        made += [Case(name, public, prompt, params, priority) for name in names]
    return made


def kinds(seed: int, count: int, words: int = 1_100) -> list[Case]:
    """As `cases`, of so many words, but a third has an adapter, a fifth a grammar, a tenth is a session."""
    dice = random.Random(seed)
    made = []
    for case in cases(seed, count):
        kind = dice.random()
        params = case.params
        if kind < 0.2:
            grammar = StructuredOutputsParams(regex=f"[0-9]{{{dice.randrange(2, 30)}}}")
            grammar._backend = "xgrammar"  # what the front end chooses
            params = SamplingParams(max_tokens=params.max_tokens, structured_outputs=grammar)
        session = 0.2 <= kind < 0.3 and not case.id.startswith("1_")
        turns = [[dice.randrange(words) for _ in range(dice.randrange(1, 20))] for _ in range(2)]
        made.append(
            case._replace(
                # All turns of a session must fit in the context.
                prompt=[token % words for token in case.prompt][: 80 if session else None],
                params=SamplingParams(max_tokens=min(params.max_tokens, 40), ignore_eos=True)
                if session
                else params,
                lora=0 if session else dice.choice([0, 0, 0, 0, 1, 2]),
                turns=tuple(turns) if session else (),
            )
        )
    return made


def send(engine: Engine, case: Case, prompt: list[int], *, last: bool = False, **fields: Any) -> None:
    """Send a request, or a turn of a session; a session ends with one that is not resumable."""
    lora = LoRARequest(f"adapter-{case.lora}", case.lora, f"/nowhere/{case.lora}") if case.lora else None
    resumable = bool(case.turns) and not last
    engine.add(
        case.id, prompt, 0, params=case.params.clone(), lora_request=lora, resumable=resumable, **fields
    )


def undisturbed(engine: Engine, wanted: list[Case]) -> dict[str, list[int]]:
    """What every request says when nobody does anything to it."""
    for case in wanted:
        send(engine, case, case.prompt)
        for turn in case.turns:
            send(engine, case, turn)
        if case.turns:
            send(engine, case, [1], last=True)
    engine.run(50 * len(wanted))
    return engine.outputs
