"""The short form of the fault suite: one fleet, one fault after the other, everything checked after each.

The long form, with more faults and in rounds: `make soak`. Results of a run: docs/reliability.md.
"""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.faults.faults import FAULTS
from tests.faults.hands import Fault
from tests.faults.rounds import Rig, rigged

pytestmark = [
    pytest.mark.nats, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400),
    pytest.mark.asyncio(loop_scope="module"),
]  # fmt: skip


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """One fleet under load for all faults."""
    async with rigged(tmp_path_factory.mktemp("faults")) as rig:
        yield rig


@pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS.values() if fault.short], ids=lambda fault: fault.name
)
async def test_fault(rig: Rig, fault: Fault) -> None:
    """Every accepted request ends once with the tokens of an undisturbed run; nothing is left, lost or miscounted."""
    verdict = await rig.play(fault)
    assert not verdict.problems
    assert verdict.ended > 10
    assert verdict.commands > 3
