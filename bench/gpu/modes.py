"""Modes of vLLM that steering is proven in, what is done in each, and what must come of it. Pure.

Each mode is an engine of its own (`trial`), several of them side by side on one GPU (`trials`): only tokens are
judged, no times. docs/modes.md has the table of what was run where.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Final

import msgspec

from bench.gpu.plan import DRY, FULL, Mode, Sizes

PART: Final = "modes"
"""What this part of a run is called."""
MODES_S: Final = 240.0
"""About how long all of it takes with 16 cores."""


class Kind(StrEnum):
    """What the requests of a mode are."""

    PLAIN = "plain"
    CHILDREN = "children"
    """Four children each, sampled, so that they differ."""
    STRUCTURED = "structured"
    """A regular expression, or a JSON schema."""
    LORA = "lora"
    """No adapter, one, or another."""
    DRAFTED = "drafted"
    """Few different tokens, so that n-grams repeat and drafts are right now and then."""


class Part(StrEnum):
    """What is done in a mode, and compared with undisturbed requests."""

    HELD = "held"
    """Two thirds of the requests are kept, parked or dropped, and continued."""
    PROMPT = "prompt"
    """The same of requests that wait or are in their prompts."""
    CUT_IN = "cut-in"
    RESET = "reset"
    """The prefix cache is reset, running requests or not, while others are held."""
    PAUSE = "pause"
    SLEEP = "sleep"
    SESSION = "session"
    """A streaming session refuses to be held, and says what it would have said."""
    SCARCE = "scarce"
    """Blocks run out: vLLM preempts a request in the step of its own chunk."""
    CONTROL = "control"
    """Sabotage that must be seen; last, for it may leave wrong KV in a cache."""


class EngineMode(msgspec.Struct, frozen=True, kw_only=True):
    """One engine of the proof."""

    name: str
    v2: bool = True
    """Which model runner."""
    asynchronous: bool = True
    kind: Kind = Kind.PLAIN
    parts: tuple[Part, ...] = (Part.HELD, Part.CONTROL)
    options: dict[str, Any] = {}
    """Of the engine, wherever it runs."""
    on_gpu: dict[str, Any] = {}
    """More of them, on a GPU."""
    dry: str = "simulated"
    """What a dry run uses: `cpu` where vLLM has the mode there, `simulated`, or empty: this needs a GPU."""
    gpus: int = 1
    ranks: int = 1
    """Data parallel ones, a worker each."""
    parks: bool = True
    reloads: bool = False
    """Whether what was dropped is loaded again, not computed."""

    @property
    def worker(self) -> str:
        """Its name on the bus."""
        return "mode-" + "".join(letter if letter.isalnum() else "-" for letter in self.name.lower())

    def sizes(self, mode: Mode) -> Sizes:
        """How many requests of how many tokens."""
        count, tokens, prompt = (24, 80, 300) if mode is Mode.GPU else (6, 60, 60)
        if self.kind is Kind.CHILDREN:
            count //= 2
        return msgspec.structs.replace(
            FULL if mode is Mode.GPU else DRY, identity_requests=count, identity_victims=count * 2 // 3,
            identity_tokens=tokens, identity_spare=count // 6, identity_prompt=prompt,
        )  # fmt: skip


EVERYTHING: Final = (
    Part.HELD, Part.PROMPT, Part.CUT_IN, Part.RESET, Part.PAUSE, Part.SESSION, Part.CONTROL
)  # fmt: skip
BOTH: Final = (Part.HELD, Part.CUT_IN)
CACHING: Final = {"enable_prefix_caching": True}
LORA: Final = {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 2, "max_lora_rank": 8}
GRAPH_SIZES: Final = [1, 2, 4, 8, 16, 24, 32]
COMPILED: Final = {
    "enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": GRAPH_SIZES}
}  # fmt: skip
"""vLLM's default: compiled, whole CUDA graphs for decodes and pieces for the rest."""
GRAPHS: Final = {
    "enforce_eager": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": GRAPH_SIZES},
}
OFFLOAD: Final = {
    "kv_transfer_config": {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 2**29, "offload_prompt_only": False},
    }
}
FP8: Final = {"kv_cache_dtype": "fp8", "attention_backend": "TRITON_ATTN"}
"""FlashAttention's FP8 kernels are not batch-invariant: two undisturbed runs differ by themselves."""
TENSOR: Final = {"tensor_parallel_size": 2, "disable_custom_all_reduce": True}
PIPELINE: Final = {"pipeline_parallel_size": 2}
SLEEPER: Final = {"enable_sleep_mode": True}
ASLEEP: Final = (Part.SLEEP, Part.HELD)
SHORT: Final = (Part.SCARCE, Part.CONTROL)


def _drafts(method: str) -> dict[str, Any]:
    drafts = {"method": method, "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    return {"speculative_config": drafts}


_V1: Final[dict[str, Any]] = {"v2": False}
_V1_SYNC: Final[dict[str, Any]] = {"v2": False, "asynchronous": False, "dry": "cpu"}

MODES: Final = (
    # The one that takes longest to load goes first.
    EngineMode(name="V2 async compiled", parts=EVERYTHING, options=CACHING, on_gpu=COMPILED, dry=""),
    EngineMode(name="V2 async", parts=EVERYTHING, options=CACHING),
    EngineMode(name="V2 sync", asynchronous=False, parts=EVERYTHING),
    EngineMode(name="V1 async", parts=EVERYTHING, **_V1),
    EngineMode(name="V1 sync", parts=EVERYTHING, options=CACHING, **_V1_SYNC),
    EngineMode(name="V2 async in CUDA graphs", on_gpu=GRAPHS, dry=""),
    EngineMode(name="structured output on V2 async", kind=Kind.STRUCTURED),
    EngineMode(name="structured output on V1 sync", kind=Kind.STRUCTURED, **_V1_SYNC),
    EngineMode(name="children on V2 async", kind=Kind.CHILDREN, parts=(Part.HELD,)),
    EngineMode(name="children on V1 sync", kind=Kind.CHILDREN, parts=(Part.HELD,), **_V1_SYNC),
    # No control: what goes on through admission is told its blocks again, swapped or not.
    EngineMode(name="LoRA on V2 async", kind=Kind.LORA, parts=(Part.HELD,), options=LORA),
    EngineMode(name="LoRA on V1 sync", kind=Kind.LORA, parts=(Part.HELD,), options=LORA, **_V1_SYNC),
    EngineMode(name="ngram drafts on V2 async", kind=Kind.DRAFTED, options=_drafts("ngram_gpu")),
    EngineMode(name="ngram drafts on V1 async", kind=Kind.DRAFTED, options=_drafts("ngram_gpu"), **_V1),
    EngineMode(name="ngram drafts on V1 sync", kind=Kind.DRAFTED, options=_drafts("ngram"), **_V1_SYNC),
    EngineMode(name="KV offloading on V2 async", options=OFFLOAD, parks=False, reloads=True),
    EngineMode(
        name="KV offloading on V1 sync", v2=False, asynchronous=False, options=OFFLOAD, parks=False, reloads=True
    ),
    EngineMode(name="FP8 KV on V2 async", on_gpu=FP8, dry=""),
    EngineMode(name="sleep on V2 async", parts=ASLEEP, on_gpu=SLEEPER),
    EngineMode(name="sleep on V1 sync", v2=False, asynchronous=False, parts=ASLEEP, on_gpu=SLEEPER),
    EngineMode(name="short of blocks on V2 async", parts=SHORT, options=CACHING),
    EngineMode(name="short of blocks on V2 sync", parts=SHORT, options=CACHING, asynchronous=False),
    EngineMode(name="short of blocks on V1 async", parts=SHORT, options=CACHING, **_V1),
    EngineMode(name="short of blocks on V1 sync", parts=SHORT, options=CACHING, **_V1_SYNC),
    EngineMode(name="tensor parallel 2 on V2 async", parts=BOTH, gpus=2, dry="cpu", options=TENSOR),
    EngineMode(
        name="tensor parallel 2 on V2 async compiled", parts=BOTH, gpus=2, dry="", options=TENSOR | CACHING,
        on_gpu=COMPILED,
    ),
    # vLLM 0.32.0 on a CPU does not survive its first request with a pipeline.
    EngineMode(name="pipeline parallel 2 on V2 async", parts=BOTH, gpus=2, dry="", options=PIPELINE),
    EngineMode(name="data parallel 2 on V2 async", parts=BOTH, gpus=2, ranks=2),
)  # fmt: skip


def complaints(mode: EngineMode, found: dict[str, Any]) -> list[str]:
    """What is not as it must be, in words; nothing: the mode passed."""
    if why := found.get("not_run"):
        return [f"not run: {why}"]
    if error := found.get("error"):
        return [error]
    said = []
    if found["undisturbed_equal"] != found["requests"]:
        said.append(
            f"undisturbed twice: {found['undisturbed_equal']} of {found['requests']} equal, so nothing is shown"
        )
    said += [text for case in found["cases"] for text in _case(mode, case)]
    missing = set(mode.parts) - {case["part"] for case in found["cases"]}
    if found["simulated"]:
        missing.discard(Part.CONTROL)
    if missing:
        said.append(f"not done: {', '.join(sorted(missing))}")
    if mode.kind is Kind.DRAFTED and not found["discarded_tokens"]:
        said.append("no draft was ever rejected: nothing was drafted")
    if found.get("blocks_used_at_the_end"):
        said.append(f"{found['blocks_used_at_the_end']} blocks in use at the end")
    return list(dict.fromkeys(said))


def _case(mode: EngineMode, case: dict[str, Any]) -> list[str]:
    name = " ".join(str(case[field]) for field in ("part", "kv", "after_tokens") if field in case)
    if "error" in case:
        return [f"{name}: {case['error']}"]
    said = []
    if case.get("equal") != case.get("of") or case.get("others_equal") != case.get("others"):
        said.append(f"other tokens: {case['of'] - case['equal']} of {case['of']} and "
                    f"{case.get('others', 0) - case.get('others_equal', 0)} of {case.get('others', 0)}")  # fmt: skip
    if case.get("moved_while_held"):
        said.append(f"{case['moved_while_held']} spoke while held")
    match case["part"]:
        case Part.HELD | Part.PROMPT:
            said += _held(mode, case)
        case Part.RESET | Part.SLEEP:
            if set(case["kv_while_held"]) & {"kept", "parked"}:
                said.append("KV that is gone is said to be there")
        case Part.SCARCE:
            if case["preempted"] < case["of"] // 2:
                said.append(f"{case['preempted']} preempted, {case['of'] // 2} were to be")
        case Part.SESSION:
            if case["code"] != 422:
                said.append(f"a session was answered {case['code']}, not 422")
        case Part.CONTROL:
            if not case["changed"] or case["changed"] != case["swapped"]:
                said.append(f"swapped {case['swapped']}, changed {case['changed']}")
    return [f"{name}: {text}" for text in said]


def _held(mode: EngineMode, case: dict[str, Any]) -> list[str]:
    where, wanted = case["kv_while_held"], case["kv"]
    if wanted == "park" and not mode.parks:
        wanted = "drop"
    lost = {kind: case[f"{kind}_tokens"] for kind in ("recomputed", "restored", "reloaded")}
    if wanted != "drop":
        known = {"keep": "kept", "park": "parked"}[wanted]
        said = [] if where.get(known) or case["part"] == Part.PROMPT else [f"nothing was {known}: {where}"]
        return said + [f"{count} {kind} though KV was {known}" for kind, count in lost.items() if count]
    if not mode.parks and where.get("parked"):
        return ["parked, with a connector"]
    if case["part"] == Part.PROMPT:
        return []
    if not where.get("dropped"):
        return [f"nothing was dropped: {where}"]
    if mode.reloads and not lost["reloaded"]:
        return ["nothing was reloaded"]
    return [] if any(lost.values()) else ["nothing came back, yet KV was dropped"]


def row(mode: EngineMode, found: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table: mode, what was in force, equal, where KV was, what came back how, remarks."""
    cases: Sequence[dict[str, Any]] = found.get("cases", ())
    equal = sum(case.get("equal", 0) + case.get("others_equal", 0) for case in cases)
    count = sum(case.get("of", 0) + case.get("others", 0) for case in cases)
    where = {
        kind: sum(case.get("kv_while_held", {}).get(kind, 0) for case in cases)
        for kind in ("kept", "parked", "dropped")
    }
    lost = {
        kind: sum(case.get(f"{kind}_tokens", 0) for case in cases)
        for kind in ("recomputed", "restored", "reloaded")
    }
    settings = found.get("scheduler", {})
    how = "async" if settings.get("async_scheduling") else "sync"
    ran = f"{settings['model_runner']}, {how}" if settings else "–"
    return (
        mode.name, ran, str(len(cases)), f"{equal:,} of {count:,}",
        " / ".join(f"{number:,}" for number in where.values()),
        " / ".join(f"{number:,}" for number in lost.values()),
        "; ".join(found.get("remarks", ())) or "passed",
    )  # fmt: skip
