"""On a GPU: held requests say the same, steering costs nothing, commands are in force within a step.

    python -m bench.gpu identity [--json PATH]     the real V2 model runner, async scheduling, KV-sensitive weights
    python -m bench.gpu overhead --model DIR …     output tokens/s and inter-token time, steered against stock
    python -m bench.gpu command  --model DIR …     publish→in force while the engine is busy

Needs vLLM with CUDA, a nats-server binary on PATH and one GPU. `identity` makes its own small seeded model and
runs with batch-invariant kernels, so that a request's tokens do not depend on who else is in the batch; its
negative control wipes the KV cache of held requests, which must change their tokens. The others take a
folder with a `config.json` and load dummy weights: speed does not depend on them.
"""

import argparse
import asyncio
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

SCHEDULER = "coxswain.service.scheduler.SteeredScheduler"
FLEET, WORKER = "gpu", "gpu-0"
WORKER_TRIES = 300
"""Times that a worker which should be there is asked, at least 0.2 s apart."""


@asynccontextmanager
async def nats_server() -> AsyncIterator[str]:
    """A nats-server on a free loopback port; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    binary = shutil.which("nats-server") or str(Path(sys.executable).parent / "nats-server")
    with tempfile.TemporaryDirectory(prefix="cox-nats-") as folder:
        process = await asyncio.create_subprocess_exec(
            binary, "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", folder,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            await asyncio.sleep(0.5)
            yield f"nats://127.0.0.1:{port}"
        finally:
            process.terminate()
            await process.wait()


def engine(model: Path, *, steered: bool, **options: Any) -> Any:
    """An AsyncLLM, stock or steered, with prefix caching off so that every token is computed."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(model), skip_tokenizer_init=True, enable_prefix_caching=False, disable_log_stats=True,
        scheduler_cls=SCHEDULER if steered else None, **options,
    )  # fmt: skip
    return AsyncLLM.from_engine_args(arguments)


class Run:
    """One request: its tokens as they arrive and when."""

    def __init__(self, llm: Any, name: str, prompt: list[int], tokens: int) -> None:
        self.name = name
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.began = time.perf_counter()
        self.over = False
        self._news = asyncio.Event()
        self.task = asyncio.create_task(self._read(llm, prompt, tokens))

    async def _read(self, llm: Any, prompt: list[int], tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        try:
            async for output in llm.generate(TokensPrompt(prompt_token_ids=prompt), params, self.name):
                self.tokens.extend(output.outputs[0].token_ids)
                self.times.append(time.perf_counter())
                self._news.set()
        finally:
            self.over = True
            self._news.set()

    async def until(self, count: int) -> None:
        """Wait until so many tokens are here; raises what the request died of."""
        while len(self.tokens) < count and not self.over:
            self._news.clear()
            await self._news.wait()
        if self.over:
            await self.task


class Wire:
    """Commands to the one worker."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.sent = 0

    async def __call__(self, verb: str, names: list[str], **fields: Any) -> Any:
        """Send a command about these requests; its reply."""
        from coxswain.schemas.commands import COMMANDS, Targets

        self.sent += 1
        command = COMMANDS[verb](
            id=f"{os.getpid()}-{self.sent}", targets=Targets(requests=tuple(names)), **fields
        )
        (reply,) = await self.client.command(WORKER, verb, command, timeout_s=30)
        return reply

    async def status(self) -> Any:
        """The worker's full frame."""
        (frame,) = await self.client.query(WORKER, "status", timeout_s=30)
        return frame


@asynccontextmanager
async def wire(url: str) -> AsyncIterator[Wire]:
    """Connect, once the worker answers."""
    from coxswain.control.client import Client
    from coxswain.control.tables import init
    from coxswain.schemas.connection import Connection

    client = await Client.connect(Connection(urls=(url,), fleet=FLEET))
    try:
        await init(client.js, client.subjects)
        for _ in range(WORKER_TRIES):
            if await client.statuses(wait_s=1.0):
                break
            await asyncio.sleep(0.2)
        else:
            raise TimeoutError(f"worker {WORKER} did not answer")
        yield Wire(client)
    finally:
        await client.close()


def make_model(folder: Path) -> Path:
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
    return folder


def wipe(worker: Any) -> int:
    """Zero a worker's whole KV cache: the negative control."""
    caches = worker.model_runner.kv_caches
    for cache in caches:
        for tensor in cache if isinstance(cache, (list, tuple)) else (cache,):
            tensor.zero_()
    return len(caches)


async def identity(model: Path, count: int, tokens: int) -> dict[str, Any]:
    """Hold and drop running requests at five points of their life; compare every token."""
    import random

    source = random.Random(3)
    prompts = [[source.randrange(10, 31_000) for _ in range(source.randrange(60, 700))] for _ in range(count)]
    found: dict[str, Any] = {"requests": count, "tokens": tokens, "cases": []}
    async with nats_server() as url:
        os.environ.update(COX_NATS_URL=url, COX_FLEET=FLEET, COX_WORKER=WORKER)
        llm = engine(model, steered=True, max_num_seqs=count + 16, max_num_active_seqs=count, max_model_len=4_096,
                     gpu_memory_utilization=0.5, enforce_eager=True, max_num_batched_tokens=2_048)  # fmt: skip
        async with wire(url) as send:
            (config,) = await send.client.query(WORKER, "config")
            found["scheduler"] = config.scheduler
            rounds = 0

            async def batch() -> list[Run]:
                nonlocal rounds
                rounds += 1
                return [
                    Run(llm, f"r{rounds}-{index}", prompt, tokens) for index, prompt in enumerate(prompts)
                ]

            async def finish(runs: list[Run]) -> list[list[int]]:
                await asyncio.gather(*(run.task for run in runs))
                return [run.tokens for run in runs]

            reference = await finish(await batch())
            again = await finish(await batch())
            found["undisturbed_equal"] = sum(a == b for a, b in zip(reference, again, strict=True))
            found["distinct_tokens"] = len({token for line in reference for token in line})
            for kv in ("keep", "drop"):
                for victims in (16, count):
                    for point in (1, tokens // 8, tokens // 3, tokens // 2, tokens - 4):
                        before = (await send.status()).recomputed_tokens_total
                        runs = await batch()
                        chosen = runs[:victims]
                        await asyncio.gather(*(run.until(point) for run in chosen))
                        reply = await send("preempt", [run.name for run in chosen], kv=kv)
                        await asyncio.sleep(0.05)
                        seen = [len(run.tokens) for run in chosen]
                        await asyncio.sleep(0.1)
                        moved = sum(len(run.tokens) != old for run, old in zip(chosen, seen, strict=True))
                        await send("continue", [run.name for run in chosen])
                        outcome = await finish(runs)
                        equal = sum(a == b for a, b in zip(reference, outcome, strict=True))
                        after = (await send.status()).recomputed_tokens_total
                        case = {
                            "kv": kv, "held": victims, "after_tokens": point, "counts": reply.counts, "equal": equal,
                            "of": count, "moved_while_held": moved, "recomputed_tokens": after - before,
                            "in_flight_tokens": sum(result.in_flight_tokens for result in reply.results),
                        }  # fmt: skip
                        found["cases"].append(case)
                        print(case, flush=True)
            runs = await batch()
            await asyncio.gather(*(run.until(tokens // 3) for run in runs))
            await send("preempt", [run.name for run in runs])
            await asyncio.sleep(0.1)
            await llm.collective_rpc(wipe)
            await send("continue", [run.name for run in runs])
            outcome = await finish(runs)
            found["control_equal_after_wipe"] = sum(a == b for a, b in zip(reference, outcome, strict=True))
            frame = await send.status()
            found["blocks_used_at_the_end"] = frame.kv_blocks.used
            found["held_at_the_end"] = frame.held
        llm.shutdown()
    good = all(case["equal"] == count and not case["moved_while_held"] for case in found["cases"])
    kept = all(case["recomputed_tokens"] == 0 for case in found["cases"] if case["kv"] == "keep")
    found["passed"] = good and kept and found["control_equal_after_wipe"] < count // 4
    print({name: value for name, value in found.items() if name != "cases"})
    return found


async def throughput(
    model: Path, *, steered: bool, slots: int, seconds: float, commands: bool
) -> dict[str, Any]:
    """Closed loop of `slots` requests (512 in, 512 out): tokens/s, inter-token time, and commands if asked for."""
    found: dict[str, Any] = {"steered": steered, "slots": slots}
    async with nats_server() as url:
        if steered:
            os.environ.update(COX_NATS_URL=url, COX_FLEET=FLEET, COX_WORKER=WORKER)
        llm = engine(model, steered=steered, load_format="dummy", max_model_len=4_096, max_num_seqs=slots + 16,
                     max_num_active_seqs=slots, max_num_batched_tokens=8_192, gpu_memory_utilization=0.85)  # fmt: skip
        live: dict[str, Run] = {}
        ended: list[Run] = []

        async def loop(index: int) -> None:
            turn = 0
            while True:
                turn += 1
                run = Run(llm, f"s{index}-{turn}", [100 + (index * 31 + k) % 20_000 for k in range(512)], 512)
                live[run.name] = run
                await run.task
                ended.append(live.pop(run.name))

        def delivered() -> int:
            return sum(len(run.tokens) for run in (*ended, *live.values()))

        tasks = [asyncio.create_task(loop(index)) for index in range(slots)]
        # Tokens are counted where they arrive, in a window in which the loop is in its stride.
        await asyncio.sleep(12)
        if commands:
            async with wire(url) as send:
                spent = []
                for index in range(600):
                    name = next(iter(live), None)
                    if name is None:
                        continue
                    began = time.perf_counter()
                    await send("prioritize", [name], priority=index)
                    spent.append(time.perf_counter() - began)
                    await asyncio.sleep(0.01)
                spent.sort()
                frame = await send.status()
                found["command_ms"] = {"p50": spent[len(spent) // 2] * 1e3, "p99": spent[int(len(spent) * 0.99)] * 1e3,
                                       "n": len(spent)}  # fmt: skip
                found["step_ms"] = frame.step_s * 1e3
        else:
            began, first = time.perf_counter(), delivered()
            await asyncio.sleep(seconds)
            spent_s = time.perf_counter() - began
            found["output_tokens_per_s"] = (delivered() - first) / spent_s
            gaps = [
                b - a
                for run in (*ended, *live.values())
                for a, b in zip(run.times, run.times[1:], strict=False)
                if a >= began
            ]
            found["inter_token_ms"] = {"p50": statistics.median(gaps) * 1e3, "n": len(gaps)}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        llm.shutdown()
    return found


def main() -> int:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=["identity", "overhead", "command", "one", "model"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--steered", action="store_true")
    chosen = parser.parse_args()
    found: Any
    if chosen.what == "model":
        make_model(chosen.model)
        return 0
    if chosen.what == "identity":
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # the negative control sends a function
        with tempfile.TemporaryDirectory(prefix="cox-model-") as folder:
            # In a process of its own: an engine forked from one that has used torch hangs.
            subprocess.run([sys.executable, "-m", "bench.gpu", "model", "--model", folder], check=True)
            found = asyncio.run(identity(Path(folder), chosen.slots, chosen.tokens))
    elif chosen.what == "one":
        found = asyncio.run(
            throughput(
                chosen.model,
                steered=chosen.steered,
                slots=chosen.slots,
                seconds=chosen.seconds,
                commands=False,
            )
        )
    elif chosen.what == "command":
        found = asyncio.run(
            throughput(chosen.model, steered=True, slots=chosen.slots, seconds=chosen.seconds, commands=True)
        )
        print(found)
    else:
        found = []
        for index in range(2 * chosen.repeat):
            steered = bool(index % 2)
            with tempfile.TemporaryDirectory(prefix="cox-gpu-") as folder:
                out = Path(folder) / "one.json"
                subprocess.run(
                    [sys.executable, "-m", "bench.gpu", "one", "--model", str(chosen.model),
                     "--slots", str(chosen.slots), "--seconds", str(chosen.seconds), "--json", str(out),
                     *(["--steered"] if steered else [])],
                    check=True,
                )  # fmt: skip
                found.append(msgspec.json.decode(out.read_bytes()))
            print(found[-1], flush=True)
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    return 0 if not isinstance(found, dict) or found.get("passed", True) else 1


if __name__ == "__main__":
    sys.exit(main())
