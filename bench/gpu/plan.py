"""What is measured, in which order and for how long. Pure; called by `run`, whose clock it is given.

A unit is the smallest thing that is run, saved and resumed. Units are in order of importance: when time is
short the last ones are left out. Stock's and ours of one comparison stand next to each other.
"""

from collections.abc import Collection
from enum import StrEnum
from typing import Any, Final

import msgspec

STOCK, STEERED = "stock", "steered"

LLAMA_8B: Final = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4_096, "intermediate_size": 14_336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128_256, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 500_000.0,
}  # fmt: skip
"""The shape of Llama 3.1 8B: all that dummy weights need."""


class Shape(msgspec.Struct, frozen=True):
    """Tokens of a request: prompt and output."""

    prompt: int
    tokens: int


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that makes a run long or short."""

    slots: tuple[int, int] = (128, 512)
    """Requests that run at once: in co-location, and in the second round of overhead and command path."""
    spare: int = 32
    """Model-runner slots beyond the active ones, for holds."""
    batched_tokens: int = 2_048
    """vLLM's step budget: the same for stock and ours, alone and mixed."""
    max_model_len: int = 20_480
    least_kv_tokens: int = 280_000
    """Two engines share the GPU only if each gets this much KV cache; else they run one after the other."""
    shapes: tuple[Shape, Shape] = (Shape(512, 512), Shape(256, 256))
    """Closed-loop requests at the two numbers of slots."""
    outstanding: int = 384
    interactive: Shape = Shape(256, 48)
    rate: float = 25.0
    """Interactive requests per second, Poisson."""
    arrivals: int = 500
    sparse_rate: float = 4.0
    """Where they are few, as where a person waits for each: beside them the batch gives up less."""
    sparse_arrivals: int = 300
    ramp_s: tuple[float, float] = (4.0, 7.0)
    """From the first request to the batch in its stride, at the two numbers of slots."""
    drain_s: float = 25.0
    """How long interactive requests are waited for after the last arrival."""
    windows_s: tuple[float, float] = (10.0, 15.0)
    """Of one round of overhead, at the two numbers of slots: many times what a wave of ends and beginnings takes."""
    decoding: Shape = Shape(64, 2_000)
    """Of requests that only decode: longer than a window of them lasts."""
    decoding_s: float = 5.0
    contexts: tuple[int, ...] = (1_024, 4_096, 16_384)
    cycles: int = 8
    beside: int = 64
    commands: int = 300
    budgets: tuple[int, ...] = (256, 512, 1_024)
    identity_requests: int = 128
    identity_victims: int = 16
    identity_tokens: int = 120
    identity_spare: int = 8
    identity_prompt: int = 600
    """The longest prompt; the shortest is a sixth of it."""


FULL: Final = Sizes()
DRY: Final = Sizes(
    slots=(6, 10), spare=4, batched_tokens=512, max_model_len=4_096, least_kv_tokens=0,
    shapes=(Shape(48, 40), Shape(24, 24)), outstanding=14, interactive=Shape(24, 6), rate=6.0, arrivals=12,
    sparse_rate=3.0, sparse_arrivals=6,
    ramp_s=(1.0, 1.0), drain_s=8.0, windows_s=(1.5, 1.5), decoding=Shape(24, 1_000), decoding_s=1.5,
    contexts=(256, 1_024), cycles=2, beside=3, commands=20,
    budgets=(64, 128), identity_requests=8, identity_victims=3, identity_tokens=120, identity_spare=2,
    identity_prompt=60,
)  # fmt: skip
"""Every line of the same code on a laptop: the simulated device, and a tiny model on the CPU."""


class Mode(StrEnum):
    """What a run runs on, and how large it is."""

    GPU = "gpu"
    SIMULATED = "simulated"
    """All of it on the simulated device: what the GPU's numbers should look like."""
    DRY = "dry"
    """Small, on the simulated device: is every line of it in order?"""

    @property
    def sizes(self) -> Sizes:
        """How large."""
        return DRY if self is Mode.DRY else FULL


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement on one engine."""

    name: str
    part: str
    """Which file it is saved in."""
    side: str
    kind: str
    """Which function of the host runs it."""
    seconds: float
    """About how long it takes."""
    fields: dict[str, Any] = {}


def units(sizes: Sizes) -> list[Unit]:
    """All units, the most important first."""
    few, many = sizes.slots

    def mixed(name: str, side: str, *, extra_s: float = 2.5, **fields: Any) -> Unit:
        sparse = fields.get("sparse", False)
        window_s = sizes.sparse_arrivals / sizes.sparse_rate if sparse else sizes.arrivals / sizes.rate
        return Unit(name=name, part="colocation", side=side, kind="colocation", fields={"variant": name, **fields},
                    seconds=sizes.ramp_s[0] * fields.get("batch", True) + window_s + extra_s)  # fmt: skip

    def held(name: str, budget: int | None, **fields: Any) -> Unit:
        return mixed(name, STEERED, cut_in="slots", spare=sizes.spare, budget=budget, **fields)

    def loop(slots: int, round_: int, side: str) -> Unit:
        return Unit(
            name=f"{slots}-{round_}-{side}", part="overhead", side=side, kind="overhead", fields={"slots": slots},
            seconds=sizes.ramp_s[slots == many] + sizes.windows_s[slots == many] + 1.5,
        )  # fmt: skip

    def decodes(slots: int, round_: int, side: str) -> Unit:
        return Unit(
            name=f"decoding-{slots}-{round_}-{side}", part="decoding", side=side, kind="decoding",
            fields={"slots": slots}, seconds=sizes.decoding_s + 2.5 + slots / 200,
        )  # fmt: skip

    def path(slots: int) -> Unit:
        return Unit(
            name=f"command-{slots}", part="command", side=STEERED, kind="command", fields={"slots": slots},
            seconds=sizes.ramp_s[slots == many] + 4.5 * sizes.windows_s[slots == many] + 0.045 * sizes.commands + 24.0,
        )  # fmt: skip

    few_s, least = f"{sizes.sparse_rate:g}/s: ", sizes.budgets[0]
    middle = sizes.budgets[len(sizes.budgets) // 2]
    turns = ((1, STOCK), (1, STEERED), (2, STEERED), (2, STOCK), (3, STOCK), (3, STEERED))
    more = ((4, STEERED), (4, STOCK), (5, STOCK), (5, STEERED), (6, STEERED), (6, STOCK))
    return [
        mixed("alone", STOCK, batch=False),
        mixed("stock priority", STOCK, policy="priority", extra_s=6.0),
        held("hold", None),
        held(f"hold, budget {middle}", middle),
        held(f"hold, budget {middle}, aside", middle, aside=True),
        mixed("drop", STEERED, cut_in="kv", spare=0),
        # The frontier: batch rates can be compared only where no wave falls into one window and not the other.
        mixed("steady: stock priority", STOCK, policy="priority", steady=True),
        held("steady: hold", None, steady=True),
        held("steady: hold, aside", None, steady=True, aside=True),
        *(held(f"steady: hold, budget {budget}", budget, steady=True) for budget in sizes.budgets),
        *(held(f"steady: hold, budget {budget}, aside", budget, steady=True, aside=True) for budget in sizes.budgets),
        mixed(f"{few_s}alone", STOCK, batch=False, sparse=True),
        mixed(f"{few_s}stock priority", STOCK, policy="priority", steady=True, sparse=True),
        held(f"{few_s}hold, budget {least}, aside", least, steady=True, aside=True, sparse=True),
        held(f"{few_s}hold, budget {least}", least, steady=True, sparse=True),
        *(decodes(few, round_, side) for round_, side in (*turns, *more)),
        *(loop(few, round_, side) for round_, side in turns),
        *(
            Unit(
                name=f"continue-{context}", part="continue", side=STEERED, kind="continuing",
                fields={"context": context}, seconds=4.0 + sizes.cycles * 0.4 * (2 + context / 4_096),
            )
            for context in sizes.contexts
        ),
        path(few),
        mixed("fcfs", STOCK, extra_s=22.0),
        mixed("steady: batch alone", STEERED, interactive=False, steady=True),
        *(decodes(many, round_, side) for round_, side in (*turns, *more)),
        *(loop(many, round_, side) for round_, side in turns),
        path(many),
    ]  # fmt: skip


def choose(todo: list[Unit], sides: Collection[str], left_s: float) -> Unit | None:
    """The first unit that an engine at hand can run and that fits in the time left, or None."""
    return next((unit for unit in todo if unit.side in sides and unit.seconds <= left_s), None)


def kv_bytes(memory: float, *, engines: int) -> int:
    """KV cache of each 8B engine, if so many share a GPU with this much memory (bytes).

    Set aside: 5 % of the memory, 7 GiB for the small engine and for each 21 GiB of weights, graphs and activations.
    """
    gib = 2**30
    return int((memory * 0.95 - 7 * gib - engines * 21 * gib) / engines)


def share(memory: float, sizes: Sizes) -> tuple[tuple[tuple[str, ...], ...], int]:
    """Which engines live at the same time, and the KV cache of each in bytes."""
    per_token = 2 * LLAMA_8B["num_hidden_layers"] * LLAMA_8B["num_key_value_heads"] * LLAMA_8B["head_dim"] * 2
    together = kv_bytes(memory, engines=2)
    if together >= sizes.least_kv_tokens * per_token:
        return ((STOCK, STEERED),), together
    return ((STOCK,), (STEERED,)), kv_bytes(memory, engines=1)
