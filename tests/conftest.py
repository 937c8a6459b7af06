"""For all tests: signals as a terminal gives them, property tests that are the same in every run, and second chances.

Whoever starts the suite in the background leaves SIGINT ignored, and every process inherits that: tests that
interrupt a program would wait for ever. A handler of our own is reset to the default in our children.

Hypothesis draws the same examples in every run, so that a change that passes once passes again. To look for what
nobody has seen yet: `make test TESTS=tests/unit ARGS=--hypothesis-profile=explore`.

A test with real processes is tried once more when it fails, for a machine that many share may stall in the middle
of it. Such a test is named at the end of the run as RERUN, with what failed: whoever sees one mends it. Unit tests
have no excuse.

Files run side by side, but those with a real model one after the other: two models would have the cores to themselves.
"""

import signal

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

MODELS = "tests/acceptance/"

signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False, print_blob=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Second chances for what starts a server or a model; a third, later, for what shares the cores with a model."""
    for item in items:
        if item.get_closest_marker("vllm") and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.flaky(reruns=2, reruns_delay=5))
        elif item.get_closest_marker("nats") or item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.flaky(reruns=1))


class OneModelAtOnce(LoadFileScheduling):
    """By file, with all files that run a real model as if they were one."""

    def _split_scope(self, nodeid: str) -> str:
        return MODELS if nodeid.startswith(MODELS) else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    """What takes the place of `--dist loadfile`."""
    return OneModelAtOnce(config, log) if config.getvalue("dist") == "loadfile" else None
