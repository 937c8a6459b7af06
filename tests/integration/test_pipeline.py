"""Several steps in flight without asynchronous scheduling, as in a pipeline: vLLM's real scheduler, without a model."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest

from bench.rig import Rig
from coxswain.schemas.policy import ClassPolicy
from coxswain.service.scheduler.states import HELD, State
from tests.integration.test_cut_in import add, ended_well, rig

pytestmark = pytest.mark.vllm

OUTPUT = 30
STAGES = pytest.mark.parametrize("depth", [2, 3])


@contextmanager
def pipeline(classes: dict[str, ClassPolicy], depth: int, **options: Any) -> Iterator[Rig]:
    """A rig whose first stage computes only tokens that have come out of the last: it is told them."""
    with rig(classes, depth=depth, async_scheduling=False, **options) as made:
        run = made._run

        def first_stage(output: Any) -> Any:
            requests = [made.scheduler.requests[name] for name in output.num_scheduled_tokens]
            assert all(request.num_computed_tokens <= request.num_tokens for request in requests)
            return run(output)

        with patch.object(made, "_run", first_stage):
            yield made


@STAGES
@pytest.mark.parametrize("kv", ["keep", "drop"])
def test_held_with_a_token_in_flight(kv: str, depth: int) -> None:
    """The reply counts that token, the client gets it, and the rest is as if nobody had been held."""
    with pipeline({}, depth) as made:
        name = add(made, "acme", prompt=40, tokens=OUTPUT)
        for _ in range(9):
            made.step()
        core = made.scheduler.core
        record = core.roster.records[name]
        while not record.payload.num_in_flight_tokens:
            made.step()
        said = len(made.outputs[name])
        assert core.engine.in_flight(record) == 1
        core.holds.hold(0.0, record, "operator", kv, None, "test")
        for _ in range(depth + 1):
            made.step()
        assert len(made.outputs[name]) == said + 1
        core.holds.release(0.0, record, ["operator"], "operator", "command")
        ended_well(made, **{name: OUTPUT})


@STAGES
@pytest.mark.parametrize("seed", range(3))
def test_disturbed_at_random_everybody_says_the_same(seed: int, depth: int) -> None:
    """Held with every kind of KV, continued, cut in on, with too few blocks for all."""
    source = random.Random(seed)
    urgent = {"urgent": ClassPolicy(position=-1, cut_in="kv")}
    with pipeline(urgent, depth, num_blocks=12, max_num_seqs=6) as made:
        core = made.scheduler.core
        sizes: dict[str, int] = {}
        for _ in range(300):
            if source.random() < 0.2 and len(core.roster.records) < 8:
                tokens = source.randrange(1, OUTPUT)
                name = add(
                    made, source.choice(["chat", "acme"]), prompt=source.randrange(1, 90), tokens=tokens
                )
                sizes[name] = tokens
            records = list(core.roster.records.values())
            if records and source.random() < 0.3:
                record = source.choice(records)
                if record.state in HELD:
                    core.holds.release(0.0, record, ["operator"], "operator", "command")
                elif record.state is State.RUNNING:
                    core.holds.hold(0.0, record, "operator", source.choice(["keep", "drop"]), None, "test")
            made.step()
        for record in list(core.roster.records.values()):
            core.holds.release(0.0, record, ["operator"], "operator", "command")
        assert len(sizes) > 10
        ended_well(made, **sizes)
