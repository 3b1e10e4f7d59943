"""What two runs of the same settings must share, however often one of them was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from adarankgrad.train.checkpoints import list_checkpoints
from adarankgrad.train.files import read_jsonl
from same_values import assert_same_values

TIMES = ("elapsed_s", "tokens_per_second")


def rows(run_dir: Path | str, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Lines without the times, which no two runs share."""
    return [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in read_jsonl(Path(run_dir) / name)
    ]


def assert_same_run(first: Path | str, second: Path | str) -> None:
    """Compare metrics, weights and the optimizer's state of two finished runs."""
    first, second = Path(first), Path(second)
    assert rows(first) == rows(second)
    assert_same_values(*(load_file(run / "model" / "model.safetensors") for run in (first, second)))
    if (first / "ranks.jsonl").exists():
        assert rows(first, "ranks.jsonl") == rows(second, "ranks.jsonl")
    newest = [list_checkpoints(run)[0].path for run in (first, second)]
    for name in ("optimizer.pt", "scheduler.pt"):
        assert_same_values(*(torch.load(path / name, weights_only=True) for path in newest))
