"""A training run in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from types import FrameType
from typing import IO, Any

from adarankgrad.train.errors import Interrupted

_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_SIGNALS_TO_KILL = 3

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


class ChildProcess:
    """Runs one command and passes Ctrl-C, SIGTERM and SIGHUP on to it, once per signal.

    The child has a session of its own, because a terminal sends Ctrl-C to every process of a
    session, and a training process takes the second signal as a wish to stop without saving.

    Args:
        command: Program and arguments.
        stdout: Where its standard output goes; by default to ours.
    """

    def __init__(self, command: list[str], stdout: IO[Any] | None = None) -> None:
        self._command = command
        self._stdout = stdout
        self._process: subprocess.Popen[bytes] | None = None
        self._received: list[int] = []

    def run(self) -> int:
        """Run to the end and return the exit code.

        Raises:
            Interrupted: A signal stopped the run; the child has ended.
        """
        previous = self._handle_signals()
        try:
            self._process = subprocess.Popen(
                self._command,
                env=training_environment(),
                stdout=self._stdout,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            if self._received:
                self._process.terminate()
            exit_code = self._process.wait()
        finally:
            self._end()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self._received:
            raise Interrupted("the demo was stopped.", exit_code=128 + self._received[0])
        return exit_code

    def _handle_signals(self) -> dict[int, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}
        # A signal that is ignored (nohup, background jobs) stays ignored.
        heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        return {number: signal.signal(number, self._pass_on) for number in heard}

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
        if self._process is None:
            return
        if len(self._received) >= _SIGNALS_TO_KILL:
            self._process.kill()
        else:
            is_interrupt = number == signal.SIGINT
            self._process.send_signal(signal.SIGINT if is_interrupt else signal.SIGTERM)

    def _end(self) -> None:
        """See that no child outlives us, whatever went wrong."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
