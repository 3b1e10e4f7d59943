"""Clocks and memory of a run: optimizer time, training time, peak memory."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adarankgrad.optim.projected_grad import ProjectedGrad


class OptimizerClock:
    """Adds up the time inside ``optimizer.step``, by hooks; on CUDA by events, without syncs."""

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._seconds = 0.0
        self._is_cuda = device.type == "cuda"
        self._started: Any = None
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def seconds(self) -> float:
        """Return the time so far."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events.clear()
        return self._seconds

    def start_from(self, seconds: float) -> None:
        """Count on from the time of an earlier session."""
        self._seconds = seconds

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()

    def _before(self, *_: Any) -> None:
        self._started = self._cuda_event() if self._is_cuda else time.perf_counter()

    def _after(self, *_: Any) -> None:
        if self._is_cuda:
            self._events.append((self._started, self._cuda_event()))
        else:
            self._seconds += time.perf_counter() - self._started

    @staticmethod
    def _cuda_event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring the peak now, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # Linux: resets the high-water mark that getrusage reports.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Return the peak in bytes, and which counter says so."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "cuda allocator"
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process resident set"


def held_gradient_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of the gradients that an optimizer's weights hold, projected or whole.

    A basis that a projected one shares with the optimizer's state is left to that.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    held: list[Tensor] = []
    for param in params:
        grad = param.grad
        if isinstance(grad, ProjectedGrad):
            in_state = {id(value) for value in optimizer.state[param].values()}
            held += [part for part in grad.parts if id(part) not in in_state]
        elif grad is not None:
            held.append(grad)
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
