"""vLLM's plugin hook: make sure that one signing key exists before any process is spawned.

vLLM calls `load` in every process; the first is the main one, whose environment all others inherit. It has to
be cheap and must never raise: an exception here would stop a vLLM that does not even use Coxswain. Several
nodes need the same key: set `COX_IDENTITY_KEY` there yourself.
"""

import os
import secrets

from coxswain.service.request_id import KEY_VARIABLE


def load() -> None:
    """Put a fresh random key into the environment unless there is one."""
    if not os.environ.get(KEY_VARIABLE):
        os.environ[KEY_VARIABLE] = secrets.token_hex(32)
