"""What vLLM is told to use: `--middleware coxswain.service.identity.Identity`.

Importing this module reads the environment and hooks vLLM, on purpose: vLLM imports it before the server
listens, so a wrong setting stops the start with its reason instead of failing every request. Nothing else
imports it; the parts are `edge/core.py` (decisions), `edge/asgi.py` (ASGI) and `edge/hook.py` (vLLM).
"""

import os
from typing import Final

from prometheus_client import Counter

from coxswain.schemas.metrics import EDGE_REFUSALS
from coxswain.service.config import Settings
from coxswain.service.edge import hook as edge_hook
from coxswain.service.edge.asgi import EdgeMiddleware
from coxswain.service.edge.core import FORWARDED, Edge, EdgeSettings
from coxswain.service.edge.page import App
from coxswain.service.edge.status import listener
from coxswain.service.keys import Keyring

_SETTINGS: Final = EdgeSettings.from_env(os.environ)
_KEYRING: Final = Keyring(_SETTINGS.keys) if _SETTINGS.keys else None
_WORKER: Final = Settings.from_env(os.environ)
_LISTEN: Final = listener(_WORKER, os.environ)
# On vLLM's own page by itself, summed over API server processes by prometheus_client.
_REFUSALS: Final = Counter(EDGE_REFUSALS.name, EDGE_REFUSALS.help, EDGE_REFUSALS.labels)

if _SETTINGS.tenant_header:
    # Who connects decides who is believed: uvicorn, which reads this later, must not take a header's word for it.
    os.environ[FORWARDED] = ""
edge_hook.install()


class Identity(EdgeMiddleware):
    """The middleware as vLLM constructs it: settings from the environment.

    Args:
        app: what comes next.
    """

    def __init__(self, app: App) -> None:
        super().__init__(app, Edge(_SETTINGS, _KEYRING), _KEYRING, _LISTEN, _refused, edge_hook.ends)


def _refused(status: int) -> None:
    _REFUSALS.labels(_WORKER.connection.fleet, _WORKER.worker, str(status)).inc()
