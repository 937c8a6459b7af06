"""Random end-to-end runs on the real engine: whatever is done to requests, they say what they would have said.

Longer: `COX_RANDOM_REQUESTS=5000 pytest tests/integration/test_random.py`; another seed: `COX_RANDOM_SEED=7`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coxswain.schemas import events as ev
from coxswain.service.tiny import make_model
from tests.support.modes import DRAFTS, LORAS, OFFLOAD, SCARCE, taken_back
from tests.support.random_cases import Case, cases, kinds, undisturbed
from tests.support.random_run import Run
from tests.support.simulated import engine

__all__ = ["taken_back"]

pytestmark = pytest.mark.vllm

SEED = int(os.environ.get("COX_RANDOM_SEED", "1"))
REQUESTS = int(os.environ.get("COX_RANDOM_REQUESTS", "400"))


@contextmanager
def rerun() -> Iterator[None]:
    """Whatever fails says how to see it again."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"rerun with COX_RANDOM_SEED={SEED} COX_RANDOM_REQUESTS={REQUESTS}")
        raise


@pytest.mark.timeout(120 + REQUESTS)
@pytest.mark.parametrize("caching", [False, True], ids=["plain", "prefix-caching"])
@pytest.mark.parametrize(
    ("v2", "asynchronous"),
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["v1-sync", "v1-async", "v2-sync", "v2-async"],
)
def test_disturbed_requests_say_what_undisturbed_ones_say(
    tmp_path: Path, v2: bool, asynchronous: bool, caching: bool
) -> None:
    """Under KV pressure, whatever is done to them: stock vLLM's tokens, no rule broken, nothing leaked, all counted."""
    run = check(tmp_path, v2=v2, asynchronous=asynchronous, enable_prefix_caching=caching)
    assert any(kind is ev.Held and "cut-in" in fields["reason"] for _, kind, fields in run.events)


@pytest.mark.timeout(120 + REQUESTS)
@pytest.mark.parametrize(("v2", "asynchronous"), [(False, False), (True, True)], ids=["v1-sync", "v2-async"])
def test_scarce_blocks(tmp_path: Path, taken_back: list[int], v2: bool, asynchronous: bool) -> None:
    """Some lose what was scheduled for them in the very same step; their prefix is cached as far as it was computed."""
    modes: dict[str, Any] = {"v2": v2, "asynchronous": asynchronous, "enable_prefix_caching": True}
    play(tmp_path, cases(SEED, REQUESTS // 2), **modes, **SCARCE)
    assert any(taken_back)


@pytest.mark.timeout(120 + REQUESTS)
@pytest.mark.parametrize(
    ("v2", "asynchronous"),
    [(False, False), (False, True), (True, True)],
    ids=["v1-sync", "v1-async", "v2-async"],
)
def test_speculative_decoding(tmp_path: Path, v2: bool, asynchronous: bool) -> None:
    """The same with drafts, of which a quarter is wrong: what was computed for them is counted too."""
    run = check(
        tmp_path, v2=v2, asynchronous=asynchronous, enable_prefix_caching=True,
        speculative_config=DRAFTS[asynchronous],
    )  # fmt: skip
    accounts = run.engine.scheduler.core.tenants.accounts.values()
    assert sum(account.discarded_tokens for account in accounts) > REQUESTS


@pytest.mark.timeout(120 + REQUESTS)
@pytest.mark.parametrize(
    ("v2", "asynchronous", "caching"),
    [(False, False, False), (False, True, True), (True, True, False)],
    ids=["v1-sync-plain", "v1-async-prefix-caching", "v2-async-plain"],
)
def test_kv_offloading(tmp_path: Path, v2: bool, asynchronous: bool, caching: bool) -> None:
    """With KV offloading what was dropped is mostly loaded, not computed again: each is counted as what it was."""
    options = {"v2": v2, "asynchronous": asynchronous, "enable_prefix_caching": caching}
    run = check(tmp_path, kv_transfer_config=OFFLOAD, **options)
    accounts = run.engine.scheduler.core.tenants.accounts.values()
    assert sum(account.reloaded_tokens for account in accounts) > 2 * run.ledger.recomputed_total
    assert sum(account.external_input_tokens for account in accounts) > 0
    assert any(account.restored_tokens for account in accounts) == caching


@pytest.mark.timeout(120 + REQUESTS)
@pytest.mark.parametrize(("v2", "asynchronous"), [(False, False), (True, True)], ids=["v1-sync", "v2-async"])
def test_all_kinds_of_requests(tmp_path: Path, v2: bool, asynchronous: bool) -> None:
    """Adapters (two, with room for one), grammars, children and sessions together: what is refused does nothing."""
    model = str(make_model(tmp_path / "model"))
    options = {"v2": v2, "asynchronous": asynchronous, "enable_prefix_caching": True}
    run = check(tmp_path, kinds(SEED, REQUESTS // 2), model=model, **LORAS, **options)
    assert any(reply.code == 422 and "session" in (reply.error or "") for reply in run.engine.replies)


@pytest.mark.timeout(120 + REQUESTS)
def test_adapters_with_kv_offloading(tmp_path: Path) -> None:
    """Who runs with an adapter can only be dropped here, and caps are exact all the same."""
    # Without sessions, which vLLM itself does not carry with this connector.
    wanted = [case._replace(turns=()) for case in kinds(SEED, REQUESTS // 4)]
    options = {"v2": True, "asynchronous": True, "enable_prefix_caching": True, "kv_transfer_config": OFFLOAD}
    run = check(tmp_path, wanted, model=str(make_model(tmp_path / "model")), **LORAS, **options)
    assert any(reply.code == 422 and "only `kv: drop`" in (reply.error or "") for reply in run.engine.replies)


def check(tmp_path: Path, wanted: list[Case] | None = None, **options: Any) -> Run:
    """Run everything on both; all that can happen did."""
    wanted = cases(SEED, REQUESTS) if wanted is None else wanted
    run = play(tmp_path, wanted, **options)
    assert run.engine.steps > 2 * len(wanted)
    assert run.engine.cut_short > 4 * len(wanted)
    assert run.ledger.preempted_total > len(wanted) / 4
    assert run.ledger.recomputed_total > 5 * len(wanted)
    assert min(run.done.values()) > 0
    kinds = {kind for _, kind, _ in run.events}
    assert ev.Dropped in kinds
    assert (ev.Parked in kinds) == run.engine.scheduler.mechanism.parks
    assert 0 < len(run.gone) < len(wanted) / 3
    return run


def play(tmp_path: Path, wanted: list[Case], **options: Any) -> Run:
    """Run everything undisturbed on stock vLLM and disturbed on ours: they say the same."""
    plain = {name: value for name, value in options.items() if name != "kv_transfer_config"}
    with engine(tmp_path, scheduler=None, **{**plain, "num_gpu_blocks_override": 400}) as stock:
        expected = undisturbed(stock, wanted)
    with engine(tmp_path, **options) as steered, rerun():
        run = Run(steered, wanted, SEED)
        run.play()
        run.check(expected)
    return run
