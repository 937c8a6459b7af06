"""Random end-to-end runs on the real engine: whatever is done to requests, they say what they would have said.

Longer: `COX_RANDOM_REQUESTS=5000 pytest tests/integration/test_random.py`; another seed: `COX_RANDOM_SEED=7`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coxswain.schemas import events as ev
from tests.support.random_run import Run, cases, undisturbed
from tests.support.simulated import engine

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
    options = {"v2": v2, "asynchronous": asynchronous, "enable_prefix_caching": caching}
    wanted = cases(SEED, REQUESTS)
    with engine(tmp_path, scheduler=None, num_gpu_blocks_override=400, **options) as stock:
        expected = undisturbed(stock, wanted)
    with engine(tmp_path, **options) as steered, rerun():
        run = Run(steered, wanted, SEED)
        run.play()
        run.check(expected)
    assert steered.steps > 5 * REQUESTS
    assert run.ledger.preempted_total > REQUESTS / 2
    assert run.ledger.recomputed_total > 10 * REQUESTS
    assert min(run.done.values()) > 0
    assert {ev.Parked, ev.Dropped, ev.Preempted} <= {kind for _, kind, _ in run.events}
    assert any(kind is ev.Held and "cut-in" in fields["reason"] for _, kind, fields in run.events)
    assert 0 < len(run.gone) < REQUESTS / 3
