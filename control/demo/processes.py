"""Processes that the demo starts, and stops again whatever happens: each in a group of its own, with a log.

Knows nothing of what they are. Called by `stack` and `__init__`.
"""

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

PATIENCE_S: Final = 15.0
"""How long a process may take to end by itself after SIGTERM."""
TAIL_LINES: Final = 15


class DemoError(Exception):
    """The demo cannot go on; the text says why and what to do, `log` where to look."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


@contextmanager
def first_error() -> Iterator[None]:
    """Let the first error of a task group out of its wrapping: what failed, not that something did."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


class Process:
    """One process and whatever it starts itself.

    Args:
        name: for messages and the log's name.
        argv: what to run.
        env: its whole environment.
        log: where its output goes.
    """

    def __init__(self, name: str, argv: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as out:
            # A session of its own: Ctrl-C in the terminal reaches us alone, and we stop the others in order.
            self._popen = subprocess.Popen(  # noqa: S603
                argv, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    @property
    def pid(self) -> int:
        """Its process id, which is its group's too."""
        return self._popen.pid

    def check(self) -> None:
        """Raise DemoError if it has ended."""
        code = self._popen.poll()
        if code is not None:
            raise DemoError(f"{self.name} ended with exit code {code}", self.log)

    def stop(self) -> None:
        """End it and everything that it started; SIGTERM first, SIGKILL to what is left. Safe to repeat."""
        if self._popen.poll() is None:
            self._popen.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(PATIENCE_S)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()


class Crew:
    """All processes of one demo. `close` ends them, the last started first.

    Args:
        logs: folder for their logs; made here.
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self._aboard: list[Process] = []
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, argv: Sequence[str], env: Mapping[str, str]) -> Process:
        """Start a process.

        Raises:
            DemoError: if there is no such program.
        """
        try:
            process = Process(name, argv, env, self.logs / f"{name}.log")
        except OSError as error:
            raise DemoError(f"{name} cannot be started: {error}") from error
        self._aboard.append(process)
        return process

    def stop(self, process: Process) -> None:
        """End one process before the others."""
        process.stop()
        self._aboard.remove(process)

    def check(self) -> None:
        """Raise DemoError if any process has ended."""
        for process in self._aboard:
            process.check()

    def close(self) -> None:
        """End all of them, in order, undisturbed by further signals."""
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self._aboard:
                self._aboard.pop().stop()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


async def run_once(name: str, argv: Sequence[str], env: Mapping[str, str], *, timeout_s: float = 60.0) -> str:
    """Run a short program to its end and return what it printed; if we are cancelled, it ends too.

    Raises:
        DemoError: if it fails or takes too long, with what it said.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise DemoError(f"{name} cannot be started: {error}") from error
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate()
    except TimeoutError as error:
        raise DemoError(f"{name} did not end within {timeout_s:g} s") from error
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode:
        said = (err or out).decode(errors="replace").strip()
        raise DemoError(f"{name} failed with exit code {process.returncode}: {said}")
    return out.decode(errors="replace")


def tail(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log; none if there is none."""
    try:
        return log.read_text(errors="replace").splitlines()[-lines:]
    except OSError:
        return []
