"""One engine in one mode of vLLM: its requests are disturbed in every way of the mode, and compared.

    python -m bench.gpu trial NAME --models DIR --json PATH [--mode gpu|dry]

Started by `trials`, which ends it when it takes too long. The JSON is there when the engine is up, and written
again after every case. What must come of it is in `modes`.
"""

import asyncio
import os
import random
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from bench.gpu import wire
from bench.gpu.engine import ask, simulated, steered
from bench.gpu.identity import REST_S, Bench, Lines
from bench.gpu.load import Request
from bench.gpu.modes import MODES, EngineMode, Kind, Part, complaints
from bench.gpu.plan import Mode
from coxswain.schemas.commands import Targets
from coxswain.service.tiny_words import WORDS

TURN_TOKENS = 12
"""Of each turn of a streaming session."""
ADAPTERS, RANK = (1, 2), 8
END_S = 5.0
"""How long blocks may be in use when nobody is there any more."""
FEW_TOKENS = list(range(300, 308))
"""All that requests with drafts may say."""
CHOICE = [f" {word}" for word in WORDS[::40]]
"""What structured output chooses from: tokens of the tokenizer, which every model here rates by all of its KV."""
REGEX = f"({'|'.join(CHOICE)}){{100}}"
SCHEMA = {"type": "array", "minItems": 50, "items": {"enum": CHOICE}}

PAIRS, PAIR_TOKENS = 6, 8
"""Where blocks are short: requests that fight for them, and what each of the two says."""
CHUNK, ROOM = 4, 13
"""In blocks: of the long prompt of a pair in each step, and all that there is. In the third step the long one has
twelve, and the short one, behind it, needs a second."""
BLOCK, BLOCK_ON_CPU = 16, 32

Found = dict[str, Any]


class Trial(Bench):
    """A bench whose requests are those of a mode, and what only some modes are put through."""

    def __init__(self, llm: Any, send: wire.Wire, way: EngineMode, mode: Mode, models: Path) -> None:
        super().__init__(llm, send, way.sizes(mode), 31_000 if mode is Mode.GPU else 700)
        self.way = way
        self.models = models
        tokens = self.sizes.identity_tokens
        # vLLM's CPU kernels give the last adapter to whoever asks for none (lora_ops.py: an index of -1).
        self.adapters = (0, *ADAPTERS) if mode is Mode.GPU else ADAPTERS
        self.points = (1, tokens // 2) if mode is Mode.GPU else (tokens // 3,)
        if Part.SCARCE in way.parts:
            source, block = random.Random(5), _block(way, mode)
            lengths = [ROOM * block - PAIR_TOKENS - 1, block - 1] * PAIRS
            self.prompts = [source.choices(range(10, 700), k=length) for length in lengths]

    async def undisturbed(self) -> list[Lines]:
        """What every prompt says; where blocks are short, each on its own."""
        if Part.SCARCE not in self.way.parts:
            return await self.end(self.all())
        alone = []
        for index in range(len(self.prompts)):
            await self.llm.reset_prefix_cache()
            alone += await self.end(self.begin([index], PAIR_TOKENS))
        return alone

    def ask(self, index: int) -> dict[str, Any]:
        """What sets a request of this mode apart."""
        match self.way.kind:
            case Kind.CHILDREN:
                return {"params": {"n": 4, "temperature": 0.8, "seed": index + 1}}
            case Kind.STRUCTURED:
                from vllm.sampling_params import StructuredOutputsParams

                form = {"json": SCHEMA} if index % 2 else {"regex": REGEX}
                return {
                    "params": {"structured_outputs": StructuredOutputsParams(**form), "ignore_eos": False}
                }
            case Kind.LORA if number := index % len(self.adapters) + self.adapters[0]:
                from vllm.lora.request import LoRARequest

                path = str(self.models / f"adapter-{number}")
                return {"options": {"lora_request": LoRARequest(f"adapter-{number}", number, path)}}
            case Kind.DRAFTED:
                return {"params": {"allowed_token_ids": FEW_TOKENS}}
        return {}

    async def part(self, part: Part) -> AsyncIterator[Found]:
        """Do one part of the mode; every case as it is done."""
        victims = self.sizes.identity_victims
        match part:
            case Part.HELD | Part.PROMPT:
                for point in self.points if part is Part.HELD else (0,):
                    for kv in ("keep", "park", "drop"):
                        if (
                            part is Part.PROMPT
                        ):  # else there is nothing to compute in a prompt that was said before
                            await self.llm.reset_prefix_cache()
                        yield await self.held(kv, victims, point)
            case Part.CUT_IN:
                for how in ("slots", "kv"):
                    yield await self.cut_in(how)
            case Part.RESET:
                yield await self.during(part, self._reset, _nothing)
            case Part.PAUSE:
                yield await self.during(part, self._pause, self.llm.resume_generation)
            case Part.SLEEP:
                yield await self.during(part, self._sleep, self.llm.wake_up)
            case Part.SESSION:
                yield await self.session()
            case Part.SCARCE:
                yield await self.scarce()
            case Part.CONTROL if Part.SCARCE in self.way.parts:
                await ask(self.llm, "leave")
                case = await self.scarce()
                yield {
                    "requests": case["of"],
                    "swapped": list(range(0, case["of"], 2)),
                    "changed": case["changed"],
                }
            case Part.CONTROL:
                yield await self.swapped()

    async def _reset(self) -> None:
        assert await self.llm.reset_prefix_cache(reset_running_requests=True), "the cache was not reset"

    async def _pause(self) -> None:
        await self.llm.pause_generation(mode="keep", clear_cache=False)

    async def _sleep(self) -> None:
        await self.llm.sleep(level=1, mode="keep")
        assert await self.llm.is_sleeping(), "the engine does not sleep"

    async def during(
        self, part: Part, begin: Callable[[], Awaitable[Any]], end: Callable[[], Awaitable[Any]]
    ) -> Found:
        """Some are held before, some while, the whole engine is reset, paused or asleep; some not at all."""
        before = await self.lost()
        third = self.sizes.identity_victims // 2
        runs = self.all()
        first, second = runs[:third], runs[third : 2 * third]
        await asyncio.gather(*(run.until(self.sizes.identity_tokens // 3) for run in runs))
        await self.send("preempt", [run.name for run in first])
        said = await self.at_rest(first)
        await begin()
        reply = await self.send("preempt", [run.name for run in second])
        where = await self.kv_of([*first, *second] if part is Part.PAUSE else first)
        await asyncio.sleep(REST_S)
        await end()
        await self.end(runs[-1:])
        moved = sum(run.said != old for run, old in zip(first, said, strict=True))
        await self.send("continue", [run.name for run in (*first, *second)])
        outputs = await self.end(runs)
        lost = await self.lost()
        lost.subtract(before)
        return {
            "held": 2 * third, "counts": reply.counts, "kv_while_held": where, "equal": self.equal(outputs),
            "of": len(runs), "moved_while_held": moved, **lost,
        }  # fmt: skip

    async def scarce(self) -> Found:
        """Pairs: a tenant's long prompt takes all blocks in chunks, another's request behind it needs one more."""
        before = await self.send.status()
        outputs: list[Lines] = []
        for index in range(0, len(self.prompts), 2):
            await self.llm.reset_prefix_cache()
            await self._pause()  # so that both begin in one step
            runs = self.begin([index], PAIR_TOKENS, "heavy") + self.begin([index + 1], PAIR_TOKENS, "light")
            until = time.monotonic() + END_S
            while (await self.send.status()).queued < len(runs) and time.monotonic() < until:  # noqa: ASYNC110
                await asyncio.sleep(REST_S)
            await self.llm.resume_generation()
            outputs += await self.end(runs)
        after = await self.send.status()
        changed = [index for index, mine in enumerate(outputs) if mine != self.reference[index]]
        return {
            "equal": len(outputs) - len(changed), "of": len(outputs), "changed": changed,
            "preempted": after.preempted_total - before.preempted_total,
        }  # fmt: skip

    async def session(self) -> Found:
        """A session of two turns, beside others: told to hold it refuses, in a turn and between two."""
        expected = await self._session(lambda _: asyncio.sleep(0))
        codes: list[int | None] = []

        async def refused(session: Request) -> None:
            reply = await self.send.told("preempt", [session.name])
            codes.append(reply.code)

        runs = self.begin(range(2), self.sizes.identity_tokens)
        said = await self._session(refused)
        return {
            "equal": self.equal(await self.end(runs)) + (said == expected), "of": len(runs) + 1,
            "code": codes[0] if len(set(codes)) == 1 else codes,
        }  # fmt: skip

    async def _session(self, do: Callable[[Request], Awaitable[Any]]) -> list[int]:
        from vllm.engine.protocol import StreamingInput
        from vllm.inputs import TokensPrompt

        turn = asyncio.Event()

        # Copies: vLLM's front end makes what is said, and the next turn, part of the prompt that it was given.
        async def inputs() -> AsyncIterator[StreamingInput]:
            yield StreamingInput(prompt=TokensPrompt(prompt_token_ids=list(self.prompts[0])))
            await turn.wait()
            yield StreamingInput(prompt=TokensPrompt(prompt_token_ids=list(self.prompts[1])))

        session = Request(self.llm, wire.name(wire.BATCH), inputs(), TURN_TOKENS).start()
        await session.until(TURN_TOKENS // 3)
        await do(session)
        await session.until(TURN_TOKENS)
        await do(session)
        turn.set()
        await self.end([session])
        return session.tokens


def _block(way: EngineMode, mode: Mode) -> int:
    """Tokens in a KV block, where that matters."""
    return BLOCK_ON_CPU if mode is not Mode.GPU and way.dry == "cpu" else BLOCK


async def _nothing() -> None:
    pass


async def trial(name: str, models: Path, out: Path, mode: Mode) -> int:
    """Load the engine, do all parts, write the JSON; 0 if nothing is to be complained of."""
    way = next(way for way in MODES if way.name == name)
    found: Found = {
        "cases": [], "error": "it did not come to its end", "simulated": mode is not Mode.GPU and way.dry == "simulated"
    }  # fmt: skip
    began = time.monotonic()

    def save() -> None:
        found["seconds"] = round(time.monotonic() - began, 1)
        found["remarks"] = complaints(way, found)
        out.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))

    try:
        options = _options(way, mode)
        async with steered(way.worker, models / "model", mode, ranks=way.ranks, **options) as (llm, send):
            found["scheduler"] = await send.settings()
            found["load_s"] = round(time.monotonic() - began, 1)
            save()
            await _measure(Trial(llm, send, way, mode, models), found, save)
            found.pop("error")
    except Exception:  # noqa: BLE001 - whatever it is, it is this mode's row
        traceback.print_exc()
        found["error"] = traceback.format_exc(limit=-2)[-600:]
    save()
    return int(bool(found["remarks"]))


def _options(way: EngineMode, mode: Mode) -> dict[str, Any]:
    """The engine's, and this process's environment for it."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # the control sends a function to the worker
    sizes = way.sizes(mode)
    active = sizes.identity_requests * (4 if way.kind is Kind.CHILDREN else 1) // way.ranks
    options: dict[str, Any] = {
        "enforce_eager": True, "async_scheduling": way.asynchronous, "max_num_active_seqs": active,
        "max_num_seqs": active + sizes.identity_spare, "skip_tokenizer_init": way.kind is not Kind.STRUCTURED,
    }  # fmt: skip
    if mode is Mode.GPU:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
        # Little, and given, not measured: several engines load and run side by side.
        options |= {
            "max_model_len": 1_024, "max_num_batched_tokens": 128, "kv_cache_memory_bytes": 2**30,
            "gpu_memory_utilization": 0.03, **way.on_gpu,
        }  # fmt: skip
    else:
        # vLLM on a CPU cannot cut the prompt of a seeded request (gpu_model_runner.py:3502 asks for an offset).
        cut = 512 if way.kind is Kind.CHILDREN else 64
        options |= {"max_model_len": 512, "max_num_batched_tokens": cut}
        if way.dry == "cpu":
            options |= {"dtype": "float32", "kv_cache_memory_bytes": 2**26}
        else:
            options |= simulated(check=True)
    if Part.SCARCE in way.parts:
        block = _block(way, mode)
        options |= {
            "scheduler": "bench.gpu.schedulers.Steered", "block_size": block, "num_gpu_blocks_override": ROOM + 1,
            "max_model_len": ROOM * block, "max_num_batched_tokens": (CHUNK + 2) * block,
            "long_prefill_token_threshold": CHUNK * block,
        }  # fmt: skip
    on_cpu = mode is not Mode.GPU and way.dry == "cpu"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(way.v2 and not on_cpu))
    if on_cpu and way.gpus > 1:  # vLLM wants a NUMA node for each
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return options | way.options


async def _measure(bench: Trial, found: Found, save: Callable[[], None]) -> None:
    first = await bench.send.status()
    bench.reference = await bench.undisturbed()
    after = await bench.send.status()
    found["requests"] = len(bench.reference)
    found["undisturbed_steps"] = after.step - first.step
    found["undisturbed_equal"] = bench.equal(await bench.undisturbed())
    for part in bench.way.parts:
        if part is Part.CONTROL and found["simulated"]:
            continue  # there is no KV to sabotage
        try:
            async for case in bench.part(part):
                found["cases"].append({"part": part, **case})
                save()
        except Exception as error:  # noqa: BLE001 - the next part may be fine
            traceback.print_exc()
            found["cases"].append({"part": part, "error": repr(error)[-300:]})
            await bench.send.told("abort", targets=Targets(all=True))
        save()
    found["discarded_tokens"] = (await bench.lost())["discarded_tokens"]
    until = time.monotonic() + END_S
    while (frame := await bench.send.status()).kv_blocks.used and time.monotonic() < until:  # noqa: ASYNC110
        await asyncio.sleep(REST_S)  # a connector may still be storing them
    found["blocks_used_at_the_end"], found["held_at_the_end"] = frame.kv_blocks.used, frame.held
