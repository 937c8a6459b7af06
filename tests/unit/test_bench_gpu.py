"""The GPU benchmark's own arithmetic: what is run when time is short, what the table says, what sabotage does."""

import random
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from bench.gpu import command
from bench.gpu.blocks import swap_tables
from bench.gpu.modes import MODES, EngineMode, Part, complaints, row
from bench.gpu.plan import DRY, FULL, STEERED, STOCK, choose, share, units
from bench.gpu.summary import bootstrap, percentile, summary
from bench.gpu.trials import tail
from coxswain.schemas.names import Token

GIB = 2**30


def test_names_are_unique_and_a_dry_run_covers_every_kind() -> None:
    """A unit's name is its key in the JSON, and the rehearsal leaves nothing out on either engine."""
    full, dry = units(FULL), units(DRY)
    assert len({unit.name for unit in full}) == len(full)
    assert {(unit.kind, unit.side, *unit.fields) for unit in full} == {
        (unit.kind, unit.side, *unit.fields) for unit in dry
    }


def test_the_most_important_unit_that_fits_goes_next() -> None:
    """Short of time, a long unit is passed over for a shorter one; an engine that is not there gets nothing."""
    todo = units(FULL)
    assert choose(todo, {STOCK, STEERED}, 1e9) is todo[0]
    shortest = min(todo, key=lambda unit: unit.seconds)
    chosen = choose(todo, {STOCK, STEERED}, shortest.seconds)
    assert chosen is not None
    assert chosen.seconds == shortest.seconds
    assert choose(todo, {STOCK, STEERED}, shortest.seconds - 0.1) is None
    ours = choose(todo, {STEERED}, 1e9)
    assert ours is not None
    assert ours.side == STEERED
    assert choose(todo, set(), 1e9) is None


def test_engines_share_a_gpu_only_where_both_have_room() -> None:
    """On 141 GB both live at once; on 80 GB one follows the other, with more KV cache than a share would be."""
    both, kv = share(140 * GIB, FULL)
    assert both == ((STOCK, STEERED),)
    assert 2 * kv + 2 * 16 * GIB < 140 * GIB
    one_by_one, alone = share(80 * GIB, FULL)
    assert one_by_one == ((STOCK,), (STEERED,))
    assert 16 * GIB < alone < 60 * GIB


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of bootstrap intervals of the median of a known distribution, about 95 % hold the true one."""
    source = random.Random(1)
    held = 0
    for _ in range(60):
        samples = [source.expovariate(1.0) for _ in range(80)]
        estimate = bootstrap(samples, statistics.median)
        held += estimate.low <= 0.6931 <= estimate.high
    assert held >= 51


@pytest.mark.parametrize("share_", [0.0, 0.5, 0.99, 1.0])
def test_percentiles_are_numpys(share_: float) -> None:
    """The same interpolation as everybody's."""
    samples = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    assert percentile(samples, share_) == pytest.approx(np.quantile(samples, share_))


def test_the_table_pairs_rounds_and_says_what_was_not_acted_on(tmp_path: Path) -> None:
    """A round that only one side ran is left out of the ratio; fields a worker ignored are named under the table."""
    overhead = {
        f"128-{turn}-{side}": {"slots": 128, "output_tokens_per_s": rate, "inter_token_ms": 9.0}
        for turn, side, rate in ((1, STOCK, 1_000.0), (1, STEERED, 990.0), (2, STEERED, 500.0))
    }
    mixed = {
        "hold": {
            "ttft_s": [0.020, 0.030, 0.040], "unanswered": 0, "batch_tokens_per_s": 900.0, "steps": {"step_ms": 9.0},
            "batch_tokens_by_block": [440, 460], "recomputed_tokens": 0, "ignored": ["classes.interactive.cut_in"],
            "stages_s": {"to the engine": [0.004, 0.006, 0.005], "in the step": [0.008]},
        }
    }  # fmt: skip
    decoding = {
        f"decoding-128-{turn}-{side}": {
            "slots": 128, "output_tokens_per_s": 1_000.0, "inter_token_ms": gap, "steps": {"decode_step_ms": 8.0},
        }
        for turn, side, gap in ((1, STOCK, 10), (1, STEERED, 10.1), (2, STEERED, 9.9), (2, STOCK, 10), (3, STOCK, 1))
    }  # fmt: skip
    (tmp_path / "overhead.json").write_bytes(msgspec.json.encode(overhead))
    (tmp_path / "decoding.json").write_bytes(msgspec.json.encode(decoding))
    (tmp_path / "colocation.json").write_bytes(msgspec.json.encode(mixed))
    text = summary(tmp_path)
    assert "| 990 " in text
    assert "| 0.990 | 0.990 " in text
    assert "| 30 [20 40]" in text
    assert "| 900 [880 920]" in text
    assert "| 1.000 [0.990 1.010] | 1.010, 0.990 " in text
    assert "| hold                   | 5.0           | 8.0 " in text
    assert "prove nothing: classes.interactive.cut_in" in text


def v2_runner() -> Any:
    """As vLLM's V2 runner: one table for all slots."""
    rows = np.array([[11, 12, 13, 0], [0, 0, 0, 0], [21, 22, 0, 0]])
    return SimpleNamespace(
        req_states=SimpleNamespace(req_id_to_index={"a-12345678": 0, "b-12345678": 2}),
        block_tables=SimpleNamespace(
            block_tables=[SimpleNamespace(gpu=rows)], num_blocks=SimpleNamespace(np=np.array([[3, 0, 2]]))
        ),
    )


def test_sabotage_swaps_the_blocks_that_both_have() -> None:
    """The control must change both requests and nobody else, and leave every write a block to go to."""
    runner = v2_runner()
    assert swap_tables(SimpleNamespace(model_runner=runner), ["a", "b"]) == 2
    assert runner.block_tables.block_tables[0].gpu.tolist() == [[21, 22, 13, 0], [0, 0, 0, 0], [11, 12, 0, 0]]
    with pytest.raises(LookupError, match="0 such requests"):
        swap_tables(SimpleNamespace(model_runner=runner), ["a", "c"])


MODE = EngineMode(name="plain", parts=(Part.HELD,))
SHORT = EngineMode(name="short of blocks", parts=(Part.SCARCE, Part.CONTROL))
RELOADING = EngineMode(name="offloading", parts=(Part.HELD,), parks=False, reloads=True)


def tried(where: dict[str, int], kv: str, **fields: Any) -> dict[str, Any]:
    """What a trial found that held 4 of 6 requests once."""
    lost = {f"{kind}_tokens": 0 for kind in ("recomputed", "restored", "reloaded")}
    case = {
        "part": "held", "kv": kv, "after_tokens": 9, "kv_while_held": where, "equal": 6, "of": 6, "others_equal": 0,
        "others": 0, "moved_while_held": 0, **lost, **fields,
    }  # fmt: skip
    return {"cases": [case], "requests": 6, "undisturbed_equal": 6, "simulated": False, "discarded_tokens": 0}


def short(*, preempted: int = 3, equal: int = 6, changed: tuple[int, ...] = (0, 2, 4)) -> dict[str, Any]:
    """What a trial found in which three pairs fought for blocks, then with what victims leave left in the cache."""
    cases = [
        {"part": "scarce", "equal": equal, "of": 6, "preempted": preempted},
        {"part": "control", "requests": 6, "swapped": [0, 2, 4], "changed": [*changed]},
    ]
    return {"cases": cases, "requests": 6, "undisturbed_equal": 6, "simulated": False, "discarded_tokens": 0}


@pytest.mark.parametrize(
    ("mode", "found", "complaint"),
    [
        (SHORT, short(), None),
        (SHORT, short(equal=5), "1 of 6"),
        (SHORT, short(preempted=2), "2 preempted, 3 were to be"),
        (SHORT, short(changed=(0, 2)), "changed [0, 2]"),
        (MODE, tried({"kept": 4}, "keep"), None),
        (MODE, tried({"kept": 1, "parked": 3}, "park"), None),
        (MODE, tried({"dropped": 4}, "drop", recomputed_tokens=9, restored_tokens=40), None),
        (RELOADING, tried({"dropped": 4}, "park", reloaded_tokens=64), None),
        (MODE, tried({"kept": 4}, "keep", equal=5), "1 of 6"),
        (MODE, tried({"kept": 4}, "keep", others=6, others_equal=4), "2 of 6"),
        (MODE, tried({"kept": 4}, "keep", moved_while_held=1), "spoke while held"),
        (MODE, tried({"kept": 4}, "keep", recomputed_tokens=3), "3 recomputed though KV was kept"),
        (MODE, tried({"dropped": 4}, "keep"), "nothing was kept"),
        (MODE, tried({"kept": 4}, "park"), "nothing was parked"),
        (MODE, tried({"kept": 4}, "drop"), "nothing was dropped"),
        (MODE, tried({"dropped": 4}, "drop"), "nothing came back"),
        (RELOADING, tried({"dropped": 4}, "drop", recomputed_tokens=64), "nothing was reloaded"),
        (RELOADING, tried({"parked": 4}, "park", reloaded_tokens=64), "parked, with a connector"),
        (MODE, tried({"kept": 4}, "keep") | {"undisturbed_equal": 5}, "undisturbed twice: 5 of 6"),
        (MODE, tried({}, "keep") | {"cases": []}, "not done: held"),
        (MODE, {"cases": [], "error": "died"}, "died"),
        (MODE, {"not_run": "needs a GPU"}, "not run: needs a GPU"),
    ],
)  # fmt: skip
def test_a_mode_passes_only_if_all_is_as_it_must_be(
    mode: EngineMode, found: dict[str, Any], complaint: str | None
) -> None:
    """Other tokens, words while held, KV that is not where it was said to be: each is a complaint, and in the table."""
    remarks = complaints(mode, found)
    assert bool(remarks) == bool(complaint), remarks
    assert (complaint or "passed") in row(mode, found | {"remarks": remarks})[-1]


def test_a_command_is_measured_against_the_longest_step_that_it_met() -> None:
    """Steps of 10, 20 and 10 ms; sent in the second and answered in the third, or all within the first."""
    ends = [0.0, 0.010, 0.030, 0.040]
    beyond = command.beyond_a_step(ends, [(0.012, 0.031), (0.001, 0.004), (0.035, 0.052)])
    assert beyond == pytest.approx([0.019 - 0.020, 0.003 - 0.010, 0.017 - 0.010])


def test_modes_have_names_of_their_own() -> None:
    """A mode is named on the command line, between commas, in the JSON and, as a worker, on the bus."""
    names = [way.name for way in MODES]
    assert len({way.worker for way in MODES}) == len(names)
    assert not any("," in name for name in names)
    for way in MODES:
        assert msgspec.convert(way.worker, Token) == way.worker


def test_the_tail_of_a_log_is_what_went_wrong() -> None:
    """Of a process that died: the lines with an error in them, not what was said after them."""
    died = "Traceback (most recent call last):\n  raise ValueError(text)\n  ValueError: no such kernel\n"
    again = "(EngineCore pid=7) ERROR [core.py:1] ValueError: no such kernel\n"
    assert tail(f"starting\n{died}\nshutting down\n{again}") == "ValueError: no such kernel"
    assert tail("one\n\ntwo\n") == "one | two"
