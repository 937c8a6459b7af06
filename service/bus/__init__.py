"""The bus: the engine's side of NATS, in a thread of its own.

`thread.py` is the shell that owns the thread and its loop; `connect.py` opens and closes a client;
`session.py` is one connection, from subscribing to its loss; `eventlog.py` gets events into JetStream. What
can be decided without I/O is decided in pure modules: `intake.py` (what may come in) and `frames.py` (how
status goes out). All of it meets the scheduler only at `service/port.py`. Called by `service/scheduler`.
"""

from coxswain.service.bus.thread import Bus

__all__ = ["Bus"]
