"""Processes that are killed by SIGKILL while they train, and take a moment to start.

A server imports torch and transformers once; every process here is forked from it.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_PRELOADED = [
    "pytest",
    "torch.utils.tensorboard",
    "torch.distributed.checkpoint",
    "transformers.models.llama.modeling_llama",
    "transformers.integrations.integration_utils",
    "adarankgrad.train.run",
    "adarankgrad.integrations.transformers",
]


def start(function: Callable[..., None], *arguments: Any) -> multiprocessing.Process:
    """Start a process that calls a function of a test module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=_call, args=(function, arguments))
    process.start()
    return process


def finish(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a process of its own, and see that it ends well."""
    process = start(function, *arguments)
    process.join()
    assert process.exitcode == 0


def _call(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    function(*arguments)


def file_operations(folder: Path, at_each: Callable[[int], None]) -> None:
    """Call ``at_each(number)`` before every file operation of this process below a folder."""
    numbers: Iterator[int] = itertools.count(1)

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if any(isinstance(a, (str, os.PathLike)) and _is_below(a, folder) for a in arguments):
            at_each(next(numbers))

    sys.addaudithook(hear)


def _is_below(path: Any, folder: Path) -> bool:
    return os.fspath(path).startswith(str(folder)) if not isinstance(path, bytes) else False


def die() -> None:
    """End this process as the kernel or a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def was_killed(process: multiprocessing.Process) -> bool:
    """Whether a process was killed; it ended well otherwise."""
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0
