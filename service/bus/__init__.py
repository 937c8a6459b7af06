"""The bus: the engine's side of NATS, in a process of its own.

`process.py` starts that process and looks after it, `child.py` is what runs there, `wire.py` and `outbox.py` are what
crosses and how. In it `loop.py` is the shell that connects for ever; `connect.py` opens and closes a client;
`session.py` is one connection, from subscribing to its loss; `eventlog.py` gets events into JetStream. What can be
decided without I/O is decided in pure modules: `intake.py` (what may come in) and `frames.py` (how status goes out).
All of it meets the scheduler only at `service/port.py`. Called by `service/scheduler`.
"""

from coxswain.service.bus.process import BusProcess
from coxswain.service.bus.thread import BusThread

BUSES = {"process": BusProcess, "thread": BusThread}
"""By `COX_BUS`."""

__all__ = ["BUSES", "BusProcess", "BusThread"]
