"""The pure parts of the simulated device: time, tokens, steps, settings and flags."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coxswain.service import worker
from coxswain.service.config import SettingRefusedError
from coxswain.service.simulated.flags import FlagRefusedError
from coxswain.service.simulated.roofline import PRESETS, Preset, Work
from coxswain.service.simulated.runner import Runner
from coxswain.service.simulated.settings import SimSettings
from coxswain.service.simulated.tokens import Vocabulary, seed_of
from tests.support.steps import cached, new, step


def closed_loop(preset: Preset, requests: int, length: int, budget: int) -> tuple[float, float]:
    """Output tokens/s and median step (s) of requests that begin together, `length` in and out."""
    computed, steps = [0] * requests, []
    while min(computed) < 2 * length:
        work, left = Work(), budget
        for index, done in enumerate(computed):
            decode = done >= length
            count = min(left, 1 if decode else length - done) if done < 2 * length else 0
            if count:
                work = work.plus(count, done, decode=decode)
                computed[index] += count
                left -= count
        steps.append(preset.step_s(work))
    return requests * length / sum(steps), statistics.median(steps)


def test_h200_preset_is_what_was_measured() -> None:
    """128 requests of 512 in and 512 out, as in docs/results/2026-11-22-h200: tokens/s and step within 3 %."""
    tokens_per_s, step_s = closed_loop(PRESETS["h200-8b"], 128, 512, 8_192)
    assert tokens_per_s == pytest.approx(10_500, rel=0.03)
    assert step_s == pytest.approx(9.16e-3, rel=0.03)


def test_a_step_is_bound_by_memory_or_by_compute() -> None:
    """Decoding pays for bytes, a long prefill for FLOPs; both grow with what they pay for."""
    preset = PRESETS["h200-8b"]
    one = preset.step_s(Work().plus(1, 512, decode=True))
    assert one == pytest.approx(preset.overhead_s + preset.weight_bytes / preset.bandwidth, rel=0.01)
    many = Work()
    for _ in range(128):
        many = many.plus(1, 4_096, decode=True)
    assert preset.step_s(many) > 3 * one
    prefill = preset.step_s(Work().plus(8_192, 0, decode=False))
    assert prefill > preset.overhead_s + 2 * preset.weights * 8_192 / preset.flops


@given(scheduled=st.integers(1, 300), computed=st.integers(0, 300))
def test_work_counts_every_pair(scheduled: int, computed: int) -> None:
    """Each new token attends to all before it and to itself."""
    work = Work().plus(scheduled, computed, decode=False)
    assert work.pairs == sum(computed + place + 1 for place in range(scheduled))
    assert work.context_tokens == computed + scheduled


def test_tokens_follow_from_prompt_and_position() -> None:
    """The same everywhere and always (two values are pinned), different for another prompt or position."""
    vocabulary = Vocabulary(1_000)
    seed = seed_of([1, 2, 3])
    said = [vocabulary.token(seed, position) for position in range(3, 23)]
    assert said[:2] == [820, 581]
    assert len(set(said)) > 15
    assert said != [vocabulary.token(seed_of([1, 2, 4]), position) for position in range(3, 23)]


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**31), size=st.integers(4, 50))
def test_tokens_are_never_those_that_end(seed: int, position: int, size: int) -> None:
    """Every token is in the vocabulary's upper half and is not an end of sequence."""
    never = frozenset({size - 1})
    token = Vocabulary(size, never).token(seed, position)
    assert size // 2 <= token < size
    assert token not in never


def test_a_vocabulary_of_ends_is_refused() -> None:
    """There must be something to say."""
    with pytest.raises(ValueError, match="leaves none"):
        Vocabulary(4, frozenset({2, 3}))


@pytest.mark.parametrize("v2", [True, False], ids=["v2", "v1"])
def test_samples_when_the_last_known_token_was_computed(v2: bool) -> None:
    """A chunk of a prompt samples nothing; its end and every decode sample the next position."""
    runner = Runner(v2=v2)
    seed = seed_of([1, 2, 3, 4])
    assert runner.step(step({"a": 3}, new("a", [1, 2, 3, 4], [1]))).samples == {"a": None}
    runner.sampled({"a": []})
    assert runner.step(step({"a": 1}, cached("a", 3, 0))).samples == {"a": (seed, 4, ())}
    runner.sampled({"a": [9]})
    assert runner.step(step({"a": 1}, cached("a", 4, 1))).samples == {"a": (seed, 5, ())}


@pytest.mark.parametrize("v2", [True, False], ids=["v2", "v1"])
def test_recomputing_samples_nothing_old(v2: bool) -> None:
    """A preempted request computes its own output again and goes on with the next position."""
    runner = Runner(v2=v2)
    runner.step(step({"a": 4}, new("a", [1, 2, 3, 4], [1])))
    runner.sampled({"a": [70]})
    runner.step(step({"a": 1}, cached("a", 4, 1)))
    runner.sampled({"a": [71]})
    tokens = [1, 2, 3, 4, 70, 71]
    back = new("a", tokens[:4], [2], prefill=tokens) if v2 else cached("a", 0, 2, [2], resumed=True)
    chunk = runner.step(step({"a": 5}, back, preempted=("a",)))
    assert chunk.samples == {"a": None}
    assert chunk.work.prefill_tokens == 5
    last = runner.step(step({"a": 1}, cached("a", 5, 2)))
    assert last.samples == {"a": (seed_of(tokens[:4]), 6, ())}
    assert last.work.decode_tokens == 1


@pytest.mark.parametrize("v2", [True, False], ids=["v2", "v1"])
@pytest.mark.parametrize("told", [6, 8], ids=["sync", "async"])
def test_rejected_drafts_are_run_again(v2: bool, told: int) -> None:
    """After drafts the device goes on behind what it accepted, also if the scheduler counts them all still."""
    runner = Runner(v2=v2)
    seed = seed_of([1, 2, 3, 4])
    runner.step(step({"a": 4}, new("a", [1, 2, 3, 4], [1])))
    runner.sampled({"a": [70]})
    tried = runner.step(step({"a": 4}, cached("a", 4, 1)), {"a": [71, 90, 91]})
    assert tried.samples == {"a": (seed, 5, (71, 90, 91))}
    assert tried.work.decode_tokens == 4
    runner.sampled({"a": [71, 72]})
    assert runner.step(step({"a": 1}, cached("a", told, told - 3))).samples == {"a": (seed, 7, ())}


def test_three_drafts_of_four_are_right() -> None:
    """A drafter guesses well, not always."""
    vocabulary = Vocabulary(1_000)
    right = sum(vocabulary.draft(5, place) == vocabulary.token(5, place) for place in range(1_000))
    assert 700 < right < 800


def test_settings_are_refused_in_words() -> None:
    """A preset that does not exist and a check that is neither on nor off are named with what is allowed."""
    assert not SimSettings.from_env({}).check
    assert SimSettings.from_env({"COX_SIM_PRESET": "cpu", "COX_SIM_CHECK": "1"}).preset is PRESETS["cpu"]
    with pytest.raises(SettingRefusedError, match=r"COX_SIM_PRESET is 'h300'.*a10g-7b"):
        SimSettings.from_env({"COX_SIM_PRESET": "h300"})
    with pytest.raises(SettingRefusedError, match="COX_SIM_CHECK is 'yes'"):
        SimSettings.from_env({"COX_SIM_CHECK": "yes"})


def plan(*argv: str, env: dict[str, str] | None = None) -> worker.Launch:
    """A launch on a small machine with vLLM's CPU build."""
    return worker.plan(["m", *argv], env or {}, cpu=True, cores=2, default_slots=lambda: 99)


def test_launcher_keeps_its_flags_from_vllm() -> None:
    """`--device simulated` becomes an executor, the preset's sizes and variables; nothing of it reaches vLLM."""
    launch = plan("--device", "simulated", "--sim-preset", "a10g-7b", "--sim-check", "--seed", "1")
    text = " ".join(launch.argv)
    assert "--distributed-executor-backend coxswain.service.simulated.SimulatedExecutor" in text
    assert "--block-size 16 --max-num-batched-tokens 2048" in text
    assert "--max-num-active-seqs 256" in text
    assert "--seed 1" in text
    assert "--sim" not in text
    assert "--device" not in text
    assert launch.env["COX_SIM_PRESET"] == "a10g-7b"
    assert launch.env["COX_SIM_CHECK"] == "1"
    assert launch.env["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in launch.env


def test_launcher_leaves_the_users_sizes_alone() -> None:
    """What the user said of blocks, batches and slots stands; V1 is there for who asks."""
    sizes = ("--block-size", "32", "--max-num-batched-tokens=512", "--max-num-seqs", "4")
    launch = plan("--device=simulated", "--sim-runner", "v1", *sizes)
    assert [launch.argv.count(flag) for flag in ("--block-size", "--max-num-batched-tokens")] == [1, 0]
    assert launch.argv[launch.argv.index("--max-num-active-seqs") + 1] == "4"
    assert launch.env["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_launcher_takes_what_no_flag_says_from_the_environment() -> None:
    """The variables are the flags' equals: they stand where the flag is absent, and the flag wins where it is not."""
    env = {
        "COX_SIM_PRESET": "a10g-7b", "COX_SIM_CHECK": "1", "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }  # fmt: skip
    launch = plan("--device", "simulated", env=env)
    assert env | launch.env == launch.env | env, "none of them is another"
    assert "--max-num-batched-tokens 2048" in " ".join(launch.argv), "the preset's"
    launch = plan("--device", "simulated", "--sim-preset", "cpu", "--sim-runner", "v2", env=env)
    assert launch.env["COX_SIM_PRESET"] == "cpu"
    assert launch.env["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    with pytest.raises(SettingRefusedError, match=r"COX_SIM_PRESET is 'h300'.*a10g-7b"):
        plan("--device", "simulated", env={"COX_SIM_PRESET": "h300"})


def test_launcher_passes_other_devices_on() -> None:
    """Any other device is vLLM's business, and changes nothing else."""
    assert plan("--device", "tpu").argv[2:4] == ["--device", "tpu"]
    assert "COX_SIM_PRESET" not in plan().env


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--sim-check",), "need --device simulated"),
        (("--device", "simulated", "--sim-preset", "h300"), "one of h200-8b"),
        (("--device", "simulated", "--sim-runner", "v3"), "v1 or v2"),
        (("--device", "simulated", "--distributed-executor-backend", "mp"), "leave out"),
    ],
)
def test_launcher_refuses_in_words(argv: tuple[str, ...], says: str) -> None:
    """Flags that cannot work together are refused before anything starts."""
    with pytest.raises(FlagRefusedError, match=says):
        plan(*argv)
