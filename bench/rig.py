"""The real scheduler without a model: what tests and benchmarks drive.

vLLM's own configuration, KV manager and scheduler (stock or ours); the device is replaced by a function from
position to token, so that every request's tokens are known beforehand. Not a model runner: what the
runner would refuse is not checked here.
"""

import queue
import threading
import time
from collections import deque
from typing import Any

from coxswain.lab.modelless import VOCABULARY, make_scheduler, vllm_config

__all__ = ["Rig", "token_at", "vllm_config"]


def token_at(seed: int, position: int) -> int:
    """The token that a request with this seed has at this position (from 0 in its output)."""
    return 10 + (seed * 7_919 + position * 104_729) % (VOCABULARY - 10)


class Rig:
    """An engine around one scheduler: `step()` it by hand, or `start()` a thread that does as EngineCore does.

    Args:
        scheduler_cls: the scheduler under test.
        config: from `vllm_config`.
        depth: steps in flight before the first output is processed; 1 is synchronous, 2 is async scheduling.
        step_s: how long the device takes for a step.
    """

    def __init__(self, scheduler_cls: type, config: Any, *, depth: int = 1, step_s: float = 0.0) -> None:
        self.input_queue: queue.Queue[Any] = queue.Queue()
        self.output_queue: queue.Queue[Any] = queue.Queue()
        self.config = config
        self.depth = depth
        self.step_s = step_s
        self._hasher = _block_hasher(config)
        self.scheduler = make_scheduler(scheduler_cls, config)
        self.flying: deque[tuple[Any, Any]] = deque()
        self.seeds: dict[str, int] = {}
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.aborts_sent: list[str] = []
        self.computed: dict[str, int] = {}
        """Positions that the device computed, per request."""
        self.last_scheduled: dict[str, int] = {}
        self._thread: threading.Thread | None = None
        self._stop = False
        self.error: BaseException | None = None

    def request(
        self, name: str, *, prompt: int = 16, tokens: int = 8, seed: int | None = None, **fields: Any
    ) -> Any:
        """Make a request; its prompt is filled from the seed, its output will be `expected(seed, tokens)`."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        seed = abs(hash(name)) % 10_000 if seed is None else seed
        self.seeds[name] = seed
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        request = Request(
            request_id=name, prompt_token_ids=[token_at(seed + 1, i) for i in range(prompt)], sampling_params=params,
            pooling_params=None, block_hasher=self._hasher, **fields,
        )  # fmt: skip
        return self.preprocess_add_request(request)[0]

    def preprocess_add_request(self, request: Any) -> tuple[Any, int]:
        """As EngineCore's, which makes the request: a scheduler may have itself told of each (`compat.meet`)."""
        return request, 0

    def add(self, name: str, **fields: Any) -> Any:
        """Add a request to the scheduler, now."""
        request = self.request(name, **fields)
        self.scheduler.add_request(request)
        return request

    def expected(self, name: str, tokens: int) -> list[int]:
        """What an undisturbed run of the request gives."""
        return [token_at(self.seeds[name], i) for i in range(tokens)]

    def step(self) -> dict[str, int]:
        """Schedule one step and, when the pipeline is full, process the oldest output."""
        output = self.scheduler.schedule()
        self.last_scheduled = dict(output.num_scheduled_tokens)
        for request_id, count in output.num_scheduled_tokens.items():
            self.computed[request_id] = self.computed.get(request_id, 0) + count
        self.flying.append((output, self._run(output)))
        if len(self.flying) >= self.depth or not output.total_num_scheduled_tokens:
            self.land()
        return self.last_scheduled

    def land(self) -> None:
        """Process the oldest step in flight."""
        output, result = self.flying.popleft()
        if self.step_s and output.total_num_scheduled_tokens:
            time.sleep(self.step_s)
        for part in self.scheduler.update_from_output(output, result).values():
            for item in part.outputs:
                self.outputs.setdefault(item.request_id, []).extend(item.new_token_ids)
                if item.finish_reason is not None:
                    self.finished[item.request_id] = str(item.finish_reason)

    def run(self, most: int = 10_000) -> None:
        """Step until nothing is left to do without a command."""
        for _ in range(most):
            if not self.scheduler.has_requests():
                if not self.flying:
                    return
                self.land()
                continue
            self.step()
        raise AssertionError(f"still busy after {most} steps")

    def _run(self, output: Any) -> Any:
        """What the device would return: a token for every request whose last known position was computed."""
        from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

        ids = list(output.num_scheduled_tokens)
        if not ids:
            return EMPTY_MODEL_RUNNER_OUTPUT
        sampled = []
        for request_id in ids:
            request = self.scheduler.requests[request_id]
            # num_computed_tokens counts this step already; the token follows the last computed position.
            place = request.num_computed_tokens - request.num_prompt_tokens
            sampled.append([] if request.is_prefill_chunk else [token_at(self.seeds[request_id], place)])
        return ModelRunnerOutput(
            req_ids=ids, req_id_to_index={name: i for i, name in enumerate(ids)}, sampled_token_ids=sampled,
        )  # fmt: skip

    # As a thread: EngineCore's busy loop, without its sockets

    def start(self) -> "Rig":
        """Run the engine loop in a thread until `stop()`."""
        self._thread = threading.Thread(target=self._loop, name="rig-engine", daemon=True)
        self._thread.start()
        return self

    def submit(self, name: str, **fields: Any) -> None:
        """Add a request from another thread."""
        self.input_queue.put(("add", self.request(name, **fields)))

    def call(self, function: Any) -> None:
        """Run a function on the engine thread."""
        self.input_queue.put(("call", function))

    def stop(self) -> None:
        """End the loop and the scheduler; raises what the engine died of."""
        self._stop = True
        self.input_queue.put(("call", lambda: None))
        if self._thread is not None:
            self._thread.join(10)
        self.scheduler.shutdown()
        if self.error is not None:
            raise self.error

    def _loop(self) -> None:
        try:
            while not self._stop:
                while not self._stop and not self.scheduler.has_requests() and not self.flying:
                    self._handle(*self.input_queue.get())
                while not self.input_queue.empty():
                    self._handle(*self.input_queue.get_nowait())
                if self.scheduler.has_requests():
                    self.step()
                elif self.flying:
                    self.land()
        except BaseException as error:  # noqa: BLE001 - reported by stop()
            self.error = error

    def _handle(self, kind: Any, item: Any) -> None:
        if kind == "add":
            self.scheduler.add_request(item)
        elif kind == "call":
            item()

    def _send_abort_outputs(self, requests: list[Any]) -> None:
        for request in requests:
            self.aborts_sent.append(request.request_id)
            self.finished[request.request_id] = "abort"


def _block_hasher(config: Any) -> Any:
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    if not config.cache_config.enable_prefix_caching:
        return None
    function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
    init_none_hash(function)
    return get_request_block_hasher(config.cache_config.block_size, function)
