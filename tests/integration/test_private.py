"""What is touched of vLLM beyond what it promises is where `compat.PRIVATE` says."""

import importlib
import inspect
import re

import pytest

from coxswain.service.scheduler import compat


@pytest.mark.parametrize("place", compat.PRIVATE)
def test_what_is_private_to_vllm_is_still_there(place: str) -> None:
    """Another vLLM that lacks a name says so here, and not in an engine that runs."""
    module, owner = place.split(":")
    found = getattr(importlib.import_module(module), owner)
    text = inspect.getsource(found)
    lacking = [
        name
        for name in compat.PRIVATE[place]
        if not hasattr(found, name) and not re.search(rf"self\.{name}(:.*)? = ", text)
    ]
    assert lacking == []
