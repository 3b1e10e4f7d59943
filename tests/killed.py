"""Processes that are killed by SIGKILL while they train, and take a moment to start."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from process_server import CONTEXT

_LONGEST_S = 1.0
"""Within which a training is killed that is killed by the clock."""

Moment = tuple[int, int]
"""A step, and the number of an event in it."""


class Events:
    """Counts what a training does in each of its steps, and ends the process at one moment.

    A step begins before its forward pass and ends before the next one, so that the checkpoint after
    it is part of it. What comes before the first step is of step -1.
    """

    def __init__(self, last_moment: Moment | None = None) -> None:
        self.counts: dict[int, int] = {}
        self._step = -1
        self._last_moment = last_moment

    def begin(self, step: int) -> None:
        """Note that a step is about to be taken, by its first micro-batch or a later one."""
        if step != self._step:
            self._step = step
            self.note()

    def note(self) -> None:
        """Note that something is about to be done."""
        count = self.counts[self._step] = self.counts.get(self._step, 0) + 1
        if (self._step, count) == self._last_moment:
            die()

    def follow_trainer(self, folder: Path) -> None:
        """Follow the steps of transformers' `Trainer`, and all file operations below a folder."""
        from transformers import Trainer

        training_step = Trainer.training_step

        def noted(trainer: Trainer, *arguments: Any, **options: Any) -> Any:
            self.begin(trainer.state.global_step)
            return training_step(trainer, *arguments, **options)

        Trainer.training_step = noted
        file_operations(folder, self.note)


Training = Callable[..., None]
"""Called with an output, arguments and `Events`; goes on from what is there of the output."""


def kill_again_and_again(
    training: Training, whole: Any, parts: Any, *arguments: Any, num_kills: int, seed: str
) -> None:
    """Train to the end, once left alone and once killed at drawn moments of drawn steps.

    Args:
        training: a function of a test module.
        whole: the output that is left alone.
        parts: the other one. One kill more comes by the clock, wherever that is.
        arguments: of the training, after the output.
        num_kills: at most the number of steps and one; each is in another step, so that a training
            that goes on from the checkpoint before still comes to it.
        seed: of the draws.
    """
    counts = _finish(training, whole, *arguments)
    draws = random.Random(seed)
    steps = sorted(draws.sample(sorted(counts), num_kills))
    hurried = draws.choice(steps)
    for step in steps:
        if step == hurried:
            time_s = draws.uniform(0.0, _LONGEST_S)
            _kill_at((step, 1), training, parts, *arguments, time_s=time_s)
        _kill_at((step, draws.randint(1, counts[step])), training, parts, *arguments)
    _finish(training, parts, *arguments)


def start(function: Callable[..., None], *arguments: Any) -> multiprocessing.Process:
    """Start a process that calls a function of a test module."""
    process = CONTEXT.Process(target=_call, args=(function, arguments))
    process.start()
    return process


def file_operations(folder: Path, at_each: Callable[[], None]) -> None:
    """Call a function before every file operation of this process below a folder."""

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if any(isinstance(a, (str, os.PathLike)) and _is_below(a, folder) for a in arguments):
            at_each()

    sys.addaudithook(hear)


def die() -> None:
    """End this process as the kernel or a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def was_killed(process: multiprocessing.Process) -> bool:
    """Whether a process was killed; it ended well otherwise."""
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _finish(training: Training, *arguments: Any) -> dict[int, int]:
    """Train to the end, and return how much was done in each step."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = start(_train, training, arguments, None, sender)
    process.join()
    assert process.exitcode == 0
    counts: dict[int, int] = receiver.recv()
    return counts


def _kill_at(
    moment: Moment, training: Training, *arguments: Any, time_s: float | None = None
) -> None:
    """Train until a moment, or until a time if that is earlier."""
    process = start(_train, training, arguments, moment)
    process.join(time_s)
    process.kill()
    process.join()
    assert was_killed(process), f"{moment} never came"


def _train(
    training: Training,
    arguments: tuple[Any, ...],
    last_moment: Moment | None,
    counts: Connection | None = None,
) -> None:
    events = Events(last_moment)
    training(*arguments, events)
    if counts is not None:
        counts.send(events.counts)


def _call(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what the server imported: collecting it takes a third of a second each time
    function(*arguments)


def _is_below(path: Any, folder: Path) -> bool:
    return os.fspath(path).startswith(str(folder)) if not isinstance(path, bytes) else False
