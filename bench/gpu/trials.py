"""All modes: an engine each, some side by side, each with a deadline; a mode that fails stops no other.

Called by `run`. What a mode is, and what must come of it, is in `modes`; the engine's process is `trial`.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from bench.gpu.children import Child, cache_of
from bench.gpu.identity import make_model
from bench.gpu.modes import EngineMode, complaints
from bench.gpu.plan import Mode
from bench.gpu.trial import ADAPTERS, RANK

LOAD_S, TRIAL_S = 120.0, 180.0
"""On a GPU: an engine that is not up after the one, or whose mode is not done after the other, is ended."""
SLOWER = 4.0
"""A laptop takes so much longer."""
CPUS_EACH = 2
"""What an engine, its front end and its bus keep busy."""
LEAST_S = 20.0
"""No mode is begun with less time than this."""
TAIL = 6
"""Lines of its log by which a mode that failed is known."""

Found = dict[str, Any]


class Trials:
    """Tries modes.

    Args:
        mode: what it runs on.
        env: of the processes.
        gpus: how many there are.
        left_s: how much time is left, s.
        save: is given a mode's name and what came of it.
        log: an open binary file for everybody's output.
    """

    def __init__(
        self, mode: Mode, *, env: dict[str, str], gpus: int, left_s: Callable[[], float],
        save: Callable[[EngineMode, Found], None], log: Any,
    ) -> None:  # fmt: skip
        self._mode = mode
        self._env = env
        self._gpus = gpus
        self._left_s = left_s
        self._save = save
        self._log = log
        self._slower = 1.0 if mode is Mode.GPU else SLOWER

    async def all(self, todo: Iterable[EngineMode]) -> None:
        """Try these, as many side by side as the machine has room for."""
        gate = asyncio.Semaphore(max(1, (os.cpu_count() or 1) // CPUS_EACH))
        with tempfile.TemporaryDirectory(prefix="cox-modes-") as folder:
            models = Path(folder)
            furnish(models, self._mode)

            async def one(way: EngineMode) -> None:
                async with gate:
                    found = await self._one(way, models)
                found["remarks"] = complaints(way, found)
                self._save(way, found)

            await asyncio.gather(*map(one, todo))

    async def _one(self, way: EngineMode, models: Path) -> Found:
        if self._mode is Mode.GPU and self._gpus < way.gpus:
            return {"not_run": f"needs {way.gpus} GPUs"}
        if self._mode is not Mode.GPU and not way.dry:
            return {"not_run": "needs a GPU"}
        if self._left_s() < LEAST_S:
            return {"not_run": "no time was left"}
        out, log = models / f"{way.worker}.json", models / f"{way.worker}.log"
        with log.open("wb") as file:
            child = await Child.start(
                file, "trial", way.name, "--models", str(models), "--json", str(out), "--mode", self._mode,
                env=self._env | cache_of(way.worker),
            )  # fmt: skip
            try:
                late = await self._watch(child, out)
            finally:
                await child.end()
        text = log.read_bytes()
        self._log.write(b"\n== " + way.name.encode() + b"\n" + text)
        self._log.flush()
        found: Found = msgspec.json.decode(out.read_bytes()) if out.exists() else {"cases": [], "error": ""}
        if "error" in found:
            # What its own process saw of it is seldom where it began.
            how = late or ("failed" if "load_s" in found else "the engine did not come up")
            found["error"] = f"{how}: {tail(text.decode(errors='replace'))}"
        return found

    async def _watch(self, child: Child, out: Path) -> str:
        """Wait for its end; what it was too late with, if it was."""
        began = time.monotonic()
        while not child.ended.done():
            took = time.monotonic() - began
            if took > LOAD_S * self._slower and not out.exists():  # noqa: ASYNC240 - on a local disk
                return f"not up after {took:.0f} s"
            if took > (LOAD_S + TRIAL_S) * self._slower or self._left_s() < 0:
                return f"not done after {took:.0f} s"
            await asyncio.wait((child.ended,), timeout=0.5)
        return ""


def tail(log: str) -> str:
    """The lines of a log that say what went wrong: the last with an error in it, else the last."""
    # Each process that dies of another's error logs that as well, behind its own name and the time.
    lines = [line.rpartition("] ")[2].strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith(("raise ", "Traceback"))]
    return " | ".join([*dict.fromkeys(errors or lines)][-TAIL:])[-900:]


def furnish(models: Path, mode: Mode) -> None:
    """Make the model that all modes share, with a tokenizer for grammars, and its adapters beside it."""
    model = models / "model"
    make_model(model, mode)
    if mode is Mode.GPU:
        # Its tokens are numbers below the model's vocabulary; whoever writes within a grammar uses no others.
        word = ["coxswain.service.tiny", str(models / "tiny")]
        subprocess.run([sys.executable, "-m", *word], check=True, stdout=subprocess.DEVNULL)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(models / "tiny" / name, model / name)
    for number in ADAPTERS:
        write_adapter(models / f"adapter-{number}", json.loads((model / "config.json").read_text()), number)


def write_adapter(folder: Path, config: dict[str, Any], seed: int) -> None:
    """A seeded LoRA adapter, strong enough to be heard."""
    import numpy as np
    from safetensors.numpy import save_file

    source = np.random.default_rng(seed)
    hidden, head = config["hidden_size"], config["head_dim"]
    rows = {"q_proj": config["num_attention_heads"] * head, "v_proj": config["num_key_value_heads"] * head}
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for target, size in rows.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            for half, shape in (("A", (RANK, hidden)), ("B", (size, RANK))):
                drawn = source.standard_normal(shape, dtype=np.float32) / shape[1] ** 0.5
                tensors[f"{name}.lora_{half}.weight"] = drawn.astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    about = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0,
        "bias": "none", "target_modules": list(rows),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(about))
