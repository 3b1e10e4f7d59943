"""What every benchmark shares: timing, the environment, and one JSON line at the end."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def seconds(function: Callable[[], Any], repeats: int, warmup: int = 1) -> list[float]:
    """Wall-clock seconds of each of several calls, after some that do not count."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def median(values: Sequence[float]) -> float:
    """Median of the values."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> list[float]:
    """Smallest and largest value."""
    return [min(values), max(values)]


def environment() -> dict[str, Any]:
    """Commit, versions and machine that a result belongs to."""
    return {
        "commit": _git("rev-parse", "--short", "HEAD"),
        "has_uncommitted_changes": bool(_git("status", "--porcelain", "src", "benchmarks/*.py")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": _device_name(),
        "num_threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def finish(name: str, result: dict[str, Any]) -> None:
    """Write ``results/NAME.json`` and print the same as the last line."""
    result = {"benchmark": name, **result, "environment": environment()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns of one width."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(str(cell).rjust(width) for cell, width in zip(row, widths, strict=True)))


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
