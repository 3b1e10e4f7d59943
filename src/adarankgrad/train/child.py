"""Training runs in processes of their own, so that each one's peak memory is its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from adarankgrad.train.errors import Interrupted
from adarankgrad.train.leash import leashed

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""What ends a process on request, and is passed on to children."""
_SIGNALS_TO_KILL = 3
_SECONDS_BETWEEN_LOOKS = 0.05

# glibc hands large blocks back to the kernel and faults them in again at every training step;
# with these, they stay in the process. On a CPU that is a large part of the step.
# OpenMP threads that wait spin by default: where another program uses the cores as well, a step
# was seen to take 15 times longer for it.
_LINUX_SETTINGS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


def training_environment() -> dict[str, str]:
    """Return the environment for a training process: ours, tuned where the user did not."""
    tuned = {"HF_HUB_OFFLINE": "1"}
    if sys.platform == "linux":
        tuned |= _LINUX_SETTINGS
    return tuned | os.environ


@dataclass(frozen=True)
class Job:
    """A command to run.

    Attributes:
        command: Program and arguments.
        stdout: Where its standard output goes; by default to ours.
        log: File for its standard error, written anew; by default it goes to ours.
        environment: Variables to set unless the user has set them.
    """

    command: list[str]
    stdout: IO[Any] | int | None = None
    log: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


class ChildPool:
    """Runs commands, some at a time, and passes Ctrl-C, SIGTERM and SIGHUP on, once per signal.

    Each child has a session of its own, because a terminal sends Ctrl-C to every process of a
    session, and a training process takes the second signal as a wish to stop without saving. On
    Linux, a child is killed where this process is: no run goes on alone.

    Args:
        workers: How many run at a time.
    """

    def __init__(self, workers: int = 1) -> None:
        self._workers = workers
        self._running: dict[subprocess.Popen[bytes], Job] = {}
        self._told: set[subprocess.Popen[bytes]] = set()
        self._received: list[int] = []

    @property
    def is_stopping(self) -> bool:
        """Whether a signal has asked the runs to end."""
        return bool(self._received)

    def run(self, jobs: Iterable[Job], on_end: Callable[[Job, int], None]) -> None:
        """Run every job to its end.

        Args:
            jobs: Started in this order.
            on_end: Told each job that ended and its exit code.

        Raises:
            Interrupted: A signal stopped the runs; all children have ended.
        """
        waiting = deque(jobs)
        previous = self._handle_signals()
        try:
            while self._running or (waiting and not self._received):
                while waiting and len(self._running) < self._workers and not self._received:
                    self._start(waiting.popleft())
                self._collect(on_end)
        finally:
            self._end()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self._received:
            raise Interrupted("stopped by a signal.", exit_code=128 + self._received[0])

    def _start(self, job: Job) -> None:
        log = job.log.open("wb") if job.log is not None else None
        try:
            process = subprocess.Popen(
                leashed(job.command),
                env=job.environment | training_environment(),
                stdout=job.stdout,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            if log is not None:
                log.close()
        self._running[process] = job
        if self._received and process not in self._told:
            process.terminate()

    def _collect(self, on_end: Callable[[Job, int], None]) -> None:
        ended = [process for process in self._running if process.poll() is not None]
        for process in ended:
            on_end(self._running.pop(process), process.returncode)
        if not ended:
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _handle_signals(self) -> dict[int, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}
        # A signal that is ignored (nohup, background jobs) stays ignored.
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        return {number: signal.signal(number, self._pass_on) for number in heard}

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
        for process in list(self._running):
            self._told.add(process)
            if len(self._received) >= _SIGNALS_TO_KILL:
                process.kill()
            else:
                is_interrupt = number == signal.SIGINT
                process.send_signal(signal.SIGINT if is_interrupt else signal.SIGTERM)

    def _end(self) -> None:
        """See that no child outlives us, whatever went wrong."""
        for process in self._running:
            process.kill()
            process.wait()
        self._running.clear()


class ChildProcess:
    """Runs one command as `ChildPool` does.

    Args:
        command: Program and arguments.
        stdout: Where its standard output goes; by default to ours.
    """

    def __init__(self, command: list[str], stdout: IO[Any] | None = None) -> None:
        self._command = command
        self._stdout = stdout

    def run(self) -> int:
        """Run to the end and return the exit code.

        Raises:
            Interrupted: A signal stopped the run; the child has ended.
        """
        exit_codes: list[int] = []
        job = Job(self._command, self._stdout)
        ChildPool().run([job], lambda job, exit_code: exit_codes.append(exit_code))
        return exit_codes[0]
