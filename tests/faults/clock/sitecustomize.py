"""A wall clock that others can move: `time.time` plus what the file named by `FAULTS_CLOCK` says (a double, seconds).

Python imports a module of this name at every start, so whatever a worker or a controller starts has the same clock.
`time.monotonic` is left alone: it does not jump on real machines either.
"""

import mmap
import os
import struct
import time


def install() -> None:
    """Replace this process's clock, if there is another to show."""
    path = os.environ.get("FAULTS_CLOCK")
    if not path:
        return
    with open(path, "rb") as file:  # noqa: PTH123 - no import that a start can do without
        shown = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    real = time.time
    time.time = lambda: real() + struct.unpack_from("d", shown)[0]


install()
