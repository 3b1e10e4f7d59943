"""Runs a command that the kernel kills when its parent ends, however that ends. Linux only.

A program of its own rather than a ``preexec_fn``, which is not safe in a process with threads. It
imports nothing of this package, to start in milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def leashed(command: list[str]) -> list[str]:
    """Return the command that runs another one on the leash of this process."""
    if sys.platform != "linux":
        return command
    return [sys.executable, "-IS", __file__, str(os.getpid()), *command]


def main(parent: str, *command: str) -> None:
    """Become the command, unless the parent has ended already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() == int(parent):
        os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
