"""For all tests: signals as a terminal gives them, and property tests that are the same in every run.

Whoever starts the suite in the background leaves SIGINT ignored, and every process inherits that: tests that
interrupt a program would wait for ever. A handler of our own is reset to the default in our children.

Hypothesis draws the same examples in every run, so that a change that passes once passes again. To look for what
nobody has seen yet: `make test TESTS=tests/unit ARGS=--hypothesis-profile=explore`.
"""

import signal

from hypothesis import settings

signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False, print_blob=True)
settings.load_profile("repeatable")
