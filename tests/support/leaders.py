"""Controllers as real processes, each with its log."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.support.nats import NatsServer
from tests.support.working import FLEET

COX: Final = "from coxswain.control.cli import main; main()"


class Leaders:
    """Controllers, each in a process of its own.

    Args:
        server: to which they connect.
        folder: where their logs go.
        policy: of all of them.
    """

    def __init__(self, server: NatsServer, folder: Path, policy: str = "vtc") -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._words = ["--nats", server.url, "--fleet", FLEET, "controller", "--policy", policy]

    def start(self, name: str, *settings: str, env: Mapping[str, str] | None = None) -> None:
        """Start one; `env` is added to the environment."""
        words = [*self._words, "--name", name]
        words += [word for setting in settings for word in ("--set", setting)]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-c", COX, *words], stdout=log, stderr=log, env={**os.environ, **(env or {})}
            )

    def send(self, name: str, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.processes[name].pid, number)

    def log(self, name: str) -> str:
        """What it said."""
        return (self.folder / f"{name}.log").read_text()

    def stop(self) -> None:
        """End all of them."""
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait(10)
