"""One real worker for all tests of a file: it takes half a minute to start."""

from collections.abc import AsyncIterator, Iterator

import pytest

from coxswain.control.client import Client
from tests.support.serving import WORKER, Api, Served, serving
from tests.support.steered import Steer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A worker with four slots and the keys of three tenants."""
    folder = tmp_path_factory.mktemp("served")
    with serving(
        folder, "--max-num-seqs", "4", "--max-model-len", "2048", "--no-enable-prefix-caching",
        tenants=("acme", "globex", "initech"),
    ) as served:  # fmt: skip
        yield served


@pytest.fixture
async def api(served: Served) -> AsyncIterator[Api]:
    """An HTTP client of the worker."""
    api = Api(served)
    yield api
    await api.close()


@pytest.fixture
async def cox(served: Served) -> AsyncIterator[Steer]:
    """A NATS client of the fleet."""
    client = await Client.connect(served.connection())
    yield Steer(client, WORKER)
    await client.close()
