"""Processes that train together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from process_server import CONTEXT

LONGEST_S = 120


def run_workers(worker: Callable[..., None], *arguments: Any, num_workers: int = 2) -> None:
    """Call ``worker(rank, *arguments)`` in each process, and raise what one of them raises."""
    context = torch.multiprocessing.start_processes(
        worker, arguments, nprocs=num_workers, join=False, start_method=CONTEXT.get_start_method()
    )
    if not _end(context):
        for process in context.processes:
            process.kill()
        raise TimeoutError(f"workers did not end within {LONGEST_S} s")


def _end(context: Any) -> bool:
    """Wait for processes one after the other; an error of one ends the others."""
    return any(context.join(timeout=LONGEST_S) for _ in context.processes)
