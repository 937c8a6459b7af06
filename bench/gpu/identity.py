"""Held, parked, dropped and cut-in requests say what they say undisturbed, token for token.

    python -m bench.gpu identity --json PATH [--deadline S] [--mode gpu|simulated|dry]

A seeded model whose tokens depend on its KV, and batch-invariant kernels, so that a request's tokens do not depend
on who else is in the batch. Negative control: two block tables swapped while their requests are held must
change both requests' tokens. The JSON is written after every case; a run that ends early keeps what it has.
Started by `run` while the large engines load, or by hand.
"""

import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from bench.gpu import wire
from bench.gpu.blocks import swap_tables
from bench.gpu.engine import simulated, steered
from bench.gpu.load import Request
from bench.gpu.plan import LLAMA_8B, Mode, Sizes

WORKER = "identity"
FILLER_TOKENS = 12
BURST_TOKENS = 24
REST_S, RESTS = 0.15, 50
"""Longer than any step: who says nothing for so long is at rest. And how often that is waited for."""
PARKED_S = 2.0
"""How long held requests are given to be parked; it happens once nothing of theirs is in flight."""


Lines = dict[int, list[int]]
"""What a request said: tokens by child."""


def write_model(folder: Path) -> None:
    """A seeded Llama whose tokens depend on its KV: head size 128, initialised wide."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=1_024, intermediate_size=2_048, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
        head_dim=128, vocab_size=32_000, max_position_embeddings=8_192, initializer_range=0.08, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


class Bench:
    """The engine, commands to it, the prompts and what they say undisturbed."""

    def __init__(self, llm: Any, send: wire.Wire, sizes: Sizes, vocabulary: int) -> None:
        source = random.Random(3)
        self.llm = llm
        self.send = send
        self.sizes = sizes
        longest = sizes.identity_prompt
        self.prompts = [
            source.choices(range(10, vocabulary), k=source.randrange(longest // 6, longest))
            for _ in range(sizes.identity_requests)
        ]
        self.reference: list[Lines] = []

    def ask(self, index: int) -> dict[str, Any]:  # noqa: ARG002 - a mode's trial asks by index
        """What sets the request with this prompt apart; see `Request`."""
        return {}

    def begin(self, indices: Iterable[int], tokens: int, tenant: str = wire.BATCH) -> list[Request]:
        """Send these prompts."""
        return [
            Request(self.llm, wire.name(tenant), self.prompts[index], tokens, **self.ask(index)).start()
            for index in indices
        ]

    def all(self) -> list[Request]:
        """Send every prompt, for all of its tokens."""
        return self.begin(range(len(self.prompts)), self.sizes.identity_tokens)

    async def end(self, runs: list[Request]) -> list[Lines]:
        """All tokens of these."""
        await asyncio.gather(*(run.task for run in runs if run.task))
        return [run.lines for run in runs]

    def equal(self, outputs: list[Lines], tokens: int | None = None) -> int:
        """How many of the first prompts' outputs are the first `tokens` tokens of the undisturbed ones."""
        return sum(
            mine == {child: line[:tokens] for child, line in whole.items()}
            for mine, whole in zip(outputs, self.reference, strict=False)
        )

    async def at_rest(self, runs: list[Request]) -> list[int]:
        """Wait until these say nothing more, what was in flight when they were held included; what they said."""
        said: list[int] = []
        for _ in range(RESTS):
            before, said = said, [run.said for run in runs]
            if said == before:
                break
            await asyncio.sleep(REST_S)
        return said

    async def lost(self) -> Counter[str]:
        """Positions that had lost their KV so far, by where it came from again."""
        rows = (await self.send.status()).tenants
        return Counter({
            kind: sum(getattr(row, f"{kind}_total") for row in rows)
            for kind in ("recomputed_tokens", "restored_tokens", "reloaded_tokens", "discarded_tokens")
        })  # fmt: skip

    async def kv_of(self, runs: list[Request]) -> Counter[str]:
        """Where the KV of these held requests is."""
        names = {run.name for run in runs}
        return Counter(
            row.kv
            for row in (await self.send.status()).requests
            if row.request in names and row.state == "held"
        )

    async def held(self, kv: str, victims: int, point: int) -> dict[str, Any]:
        """Hold `victims` requests after `point` tokens, keep, park or drop their KV, continue; compare all.

        After 0 tokens: those after the first, as soon as that says something: one is in its prompt, others wait.
        """
        before = await self.lost()
        runs = self.all()
        chosen = runs[:victims] if point else runs[1 : victims + 1]
        await asyncio.gather(*(run.until(max(1, point)) for run in (chosen if point else runs[:1])))
        reply = await self.send(
            "preempt", [run.name for run in chosen], kv="drop" if kv == "drop" else "keep"
        )
        seen = await self.at_rest(chosen)
        filled = await self._fill(chosen) if kv == "park" else []
        await asyncio.sleep(0.1)
        where = await self.kv_of(chosen)
        moved = sum(run.said != old for run, old in zip(chosen, seen, strict=True))
        await self.send("continue", [run.name for run in chosen])
        outputs = await self.end(runs)
        lost = await self.lost()
        lost.subtract(before)
        return {
            "kv": kv, "held": victims, "after_tokens": point, "counts": reply.counts, "kv_while_held": where,
            "equal": self.equal(outputs), "of": len(runs),
            "others_equal": self.equal(filled, FILLER_TOKENS), "others": len(filled),
            "moved_while_held": moved, **lost,
            "in_flight_tokens": sum(result.in_flight_tokens for result in reply.results),
        }  # fmt: skip

    async def _fill(self, held: list[Request]) -> list[Lines]:
        """Want all active slots, so that held requests must give back theirs and are parked; what the others said."""
        fillers = self.begin(range(len(self.prompts)), FILLER_TOKENS)
        until = time.monotonic() + PARKED_S
        while time.monotonic() < until and not (await self.kv_of(held))["parked"]:  # noqa: ASYNC110 - elsewhere
            await asyncio.sleep(0.02)
        return await self.end(fillers)

    async def cut_in(self, mode: str, *, aside: bool = False) -> dict[str, Any]:
        """Bursts of interactive requests cut in on a full engine, where others are held and dropped by hand.

        `aside`: the engine's own work stands aside for the step in which one of them begins.
        """
        sizes = self.sizes
        await self.send.classes(cut_in=mode, aside=aside)
        before = await self.send.status()
        runs = self.all()
        burst: list[Request] = []
        held_most = 0
        for point in (sizes.identity_tokens // 5, sizes.identity_tokens // 2):
            await runs[-1].until(point)
            burst += self.begin(
                range(sizes.identity_victims + sizes.identity_spare), BURST_TOKENS, wire.INTERACTIVE
            )
            kept, dropped = runs[: sizes.identity_victims : 2], runs[1 : sizes.identity_victims : 2]
            await self.send("preempt", [run.name for run in kept])
            await self.send("preempt", [run.name for run in dropped], kv="drop")
            for _ in range(5):
                held_most = max(held_most, (await self.send.status()).held)
                await asyncio.sleep(0.02)
            await self.send("continue", [run.name for run in (*kept, *dropped)])
        outputs, others = await self.end(runs), await self.end(burst)
        after = await self.send.status()
        half = len(burst) // 2
        await self.send.classes()
        return {
            "cut_in": f"{mode}, aside" if aside else mode, "equal": self.equal(outputs), "of": len(runs),
            "others_equal": sum(self.equal(part, BURST_TOKENS) for part in (others[:half], others[half:])),
            "others": len(burst),
            "held_most": held_most, "preempted": after.preempted_total - before.preempted_total,
            "recomputed_tokens": after.recomputed_tokens_total - before.recomputed_tokens_total,
        }  # fmt: skip

    async def swapped(self) -> dict[str, Any]:
        """Negative control: all are held, the block tables of two are swapped, all are continued."""
        runs = self.all()
        names = [run.name for run in runs]
        await asyncio.gather(*(run.until(self.sizes.identity_tokens // 4) for run in runs))
        await self.send("preempt", names)
        await asyncio.sleep(0.1)
        held = {row.request for row in (await self.send.status()).requests if row.state == "held"}
        pair = [index for index, name in enumerate(names) if name in held][:2]
        try:
            blocks, *_ = await self.llm.collective_rpc(swap_tables, args=([names[index] for index in pair],))
        finally:
            await self.send("continue", names)
            outputs = await self.end(runs)
        changed = [index for index, mine in enumerate(outputs) if mine != self.reference[index]]
        return {"blocks_swapped": blocks, "requests": len(runs), "swapped": pair, "changed": changed}


def cases(sizes: Sizes) -> list[tuple[str, int, int]]:
    """(kv, victims, after tokens): everything by everything."""
    tokens = sizes.identity_tokens
    points = (1, tokens // 8, tokens // 3, tokens // 2, tokens * 4 // 5)
    victims = (sizes.identity_victims, sizes.identity_requests)
    # By points first: a run that is cut short has seen every kind.
    return [
        (kv, count, point)
        for point, count, kv in itertools.product(points, victims, ("keep", "park", "drop"))
    ]


async def measure(bench: Bench, found: dict[str, Any], save: Any, until: float) -> None:
    """Reference, controls, cases; saved after each, until the time is up."""
    bench.reference = await bench.end(bench.all())
    again = await bench.end(bench.all())
    found["undisturbed_equal"] = bench.equal(again)
    found["distinct_tokens"] = len(
        {token for lines in bench.reference for line in lines.values() for token in line}
    )
    try:
        found["control"] = await bench.swapped()
    except Exception as error:  # noqa: BLE001 - without a control nothing passes, but the cases are worth having
        found["control"] = {"error": repr(error)}
    save()
    for mode, aside in (("slots", False), ("kv", False), ("slots", True)):
        found["cut_in"].append(await bench.cut_in(mode, aside=aside))
        print(found["cut_in"][-1], flush=True)
        save()
    todo = cases(bench.sizes)
    for kv, victims, point in todo:
        if time.monotonic() > until:
            break
        found["cases"].append(await bench.held(kv, victims, point))
        print(found["cases"][-1], flush=True)
        save()
    frame = await bench.send.status()
    found["blocks_used_at_the_end"], found["held_at_the_end"] = frame.kv_blocks.used, frame.held
    found["complete"] = len(found["cases"]) == len(todo)


def passed(found: dict[str, Any]) -> bool:
    """Whether everything that was run is as it must be."""
    cases_, cut_in, control = found["cases"], found["cut_in"], found.get("control", {})
    return bool(
        cases_
        and all(case["equal"] == case["of"] and case["others_equal"] == case["others"] for case in (*cases_, *cut_in))
        and not any(case["moved_while_held"] for case in cases_)
        and not any(case["recomputed_tokens"] for case in cases_ if case["kv"] != "drop")
        and any(case["kv_while_held"].get("parked") for case in cases_ if case["kv"] == "park")
        and found["undisturbed_equal"] == found["requests"]
        and control.get("changed")
        and control["changed"] == control["swapped"]
    )  # fmt: skip


async def identity(out: Path, mode: Mode, *, deadline_s: float) -> int:
    """Make the model and the engine, measure, write the JSON; 0 if all of it passed."""
    until = time.monotonic() + deadline_s
    sizes = mode.sizes
    # The control sends a function to the worker.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if mode is Mode.GPU:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    count = sizes.identity_requests
    found: dict[str, Any] = {"requests": count, "tokens": sizes.identity_tokens, "cases": [], "cut_in": []}

    def save() -> None:
        found["passed"] = passed(found)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))

    with tempfile.TemporaryDirectory(prefix="cox-identity-") as folder:
        model, options, vocabulary = _model(Path(folder), mode)
        slots = {"max_num_seqs": count + sizes.identity_spare, "max_num_active_seqs": count}
        async with steered(WORKER, model, mode, enforce_eager=True, **slots, **options) as (llm, send):
            found["scheduler"] = await send.settings()
            try:
                await measure(Bench(llm, send, sizes, vocabulary), found, save, until)
            finally:
                found["ignored"] = sorted(send.ignored)
                save()
    print({name: value for name, value in found.items() if name != "cases"})
    return 0 if found["passed"] else 1


def _model(folder: Path, mode: Mode) -> tuple[Path, dict[str, Any], int]:
    """The model's folder, the engine's options, and how many token ids prompts may use."""
    if mode is Mode.SIMULATED:  # no KV to sabotage: its checker, which is on, is what would see a wrong table
        (folder / "config.json").write_text(json.dumps(LLAMA_8B))
        return (
            folder,
            {"max_model_len": 2_048, "max_num_batched_tokens": 2_048, **simulated(check=True)},
            31_000,
        )
    make_model(folder / "model", mode)
    if mode is Mode.DRY:
        options = {"dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": 2**26}
        return folder / "model", options, 700
    options = {
        "max_model_len": 2_048, "max_num_batched_tokens": 2_048, "kv_cache_memory_bytes": 4 * 2**30,
        "gpu_memory_utilization": 0.04,
    }  # fmt: skip
    return folder / "model", options, 31_000


def make_model(folder: Path, mode: Mode) -> None:
    """Make the seeded model for a GPU, or the tiny one for a CPU.

    In a process of its own: an engine forked from one that has used torch hangs.
    """
    word = (
        ["bench.gpu", "model", str(folder)]
        if mode is Mode.GPU
        else ["coxswain.service.tiny", str(folder), "--hidden", "128"]
    )
    subprocess.run([sys.executable, "-m", *word], check=True, stdout=subprocess.DEVNULL)
