"""After the acts, with `--keep`: everything goes on, with something to steer, until Ctrl-C.

Three tenants ask for as long as it takes, and bear being held, aborted, capped and drained. Called by `__init__`.
"""

import asyncio
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from coxswain.control.demo.load import BUSY, FLOOD, POLITE, Ask, Closed, Sizes, asks
from coxswain.control.demo.processes import DemoError, first_error
from coxswain.control.demo.stack import Scene
from coxswain.control.demo.streams import MODEL, Endpoint, Stream

LONG: Final = Sizes((16, 48), (200, 400))
"""Some seconds each: time to find a request and to hold it by hand."""
LOADS: Final = (
    Closed(FLOOD.tenant, 6, LONG),
    Closed(BUSY.tenant, 3, LONG),
    Closed(POLITE.tenant, 1, Sizes((8, 16), (20, 40))),
)
TO_TRY: Final = (
    ("top", "h holds, c continues, ? explains"),
    (f"requests --tenant {BUSY.tenant}", "their ids: for hold, continue, prioritize, explain"),
    (f"hold --tenant {FLOOD.tenant} --lease 20s", ""),
    (f"tenants set {BUSY.tenant} --weight 3", "up to three times the share of others"),
)
AGAIN_S: Final = 1.0
"""From a refusal to the next try, and between two requests of one client."""


async def play(scene: Scene) -> None:
    """Say how to reach it all, and keep it busy, until cancelled.

    Raises:
        DemoError: one of the processes ended.
    """
    scene.screen.verbatim(_words(scene))
    with first_error():
        async with asyncio.TaskGroup() as group:
            for load in LOADS:
                stock = asks(load.tenant, load.sizes, seed=4)
                for _ in range(load.outstanding):
                    group.create_task(keep_asking(scene.endpoint, load.tenant, stock))
            while True:
                await asyncio.sleep(1)
                scene.crew.check()


async def keep_asking(endpoint: Endpoint, tenant: str, stock: Iterator[Ask]) -> None:
    """One client: it asks again whatever became of its last request, a refusal too."""
    while True:
        with suppress(
            DemoError
        ):  # capped (429) or drained (503) by whoever steers; `play` sees what has ended
            await endpoint.run(Stream(tenant, next(stock)))
        await asyncio.sleep(AGAIN_S)


def _words(scene: Scene) -> str:
    cox, env, url = _cox(), scene.env, scene.endpoint.url
    lines = "\n".join(f"  {cox} {words:<34}{f'# {why}' if why else ''}".rstrip() for words, why in TO_TRY)
    return f"""
Everything still runs, with some requests to steer, until Ctrl-C. In another terminal:

  export COX_NATS_URL={env["COX_NATS_URL"]} COX_FLEET={env["COX_FLEET"]}
{lines}

To ask for something yourself:

  curl -N {url}/v1/completions -H 'Authorization: Bearer {scene.endpoint.keys[POLITE.tenant]}' \\
    -H 'Content-Type: application/json' \\
    -d '{{"model": "{MODEL}", "prompt": "the ship", "max_tokens": 200, "stream": true}}'"""


def _cox() -> str:
    """What to type for the `cox` that runs this, as it was called where it is not the one on the PATH."""
    called = Path(sys.argv[0])
    found = shutil.which("cox")
    here = found is not None and called.exists() and Path(found).samefile(called)
    return "cox" if here or called.name != "cox" else str(called)
