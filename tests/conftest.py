"""For all tests: signals as a terminal gives them.

Whoever starts the suite in the background leaves SIGINT ignored, and every process inherits that: tests that
interrupt a program would wait for ever. A handler of our own is reset to the default in our children.
"""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
