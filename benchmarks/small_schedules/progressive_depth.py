"""Progressive depth: operations to the last loss of training at full depth.

Runs are long enough for a stage of few layers to learn more than how frequent words are: with a
fifth of these tokens it had not, and growing was 0.6 nats behind.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from adarankgrad.schedules.depth import DepthConfig, ProgressiveDepth
from adarankgrad.train.record import count_to_loss
from harness import print_table
from small_schedules.language_model import Blocks, Plain, train
from small_schedules.study import (
    Result,
    Run,
    Store,
    Study,
    as_text,
    over_seeds,
    rate_text,
)

NAME = "progressive_depth"
FULL = "full depth"
LAYERS = (1, 2, 4, 8)
STARTS = (0.0, 0.05, 0.1, 0.25)  # shares of the steps, as published
RATES = (2e-3, 4e-3, 8e-3)
SAMPLES, BATCH_SIZE, EVALUATIONS = 9600, 16, 24
RUNS: dict[str, Run] = {
    FULL: {},
    "growing": {"sampling": "constant_low"},
    "growing, depth drawn": {"sampling": "low_value"},
}


class Deepening(Plain):
    """Lets the model grow; optimizer state is copied with the layers."""

    def __init__(self, run: Run, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(run, model, optimizer)
        steps = run["samples"] // run["micro_batch"]
        config = DepthConfig(
            layers=LAYERS,
            starts=[round(share * steps) for share in STARTS],
            sampling=run["sampling"],
        )
        self.depth = ProgressiveDepth(model, config, seed=run["seed"], optimizers=optimizer)

    def begin_step(self, step: int) -> None:
        """Grow where a stage begins, and set the depth."""
        self.depth.begin_step(step)


def work(run: Run, blocks: Blocks) -> Result:
    """Train once."""
    return train(run, blocks, Deepening if "sampling" in run else Plain)


def measure(blocks: Blocks, store: Store, seeds: list[int], scale: float) -> dict[str, Any]:
    """Train at full and at growing depth; return operations as shares of full depth's."""
    study = Study(NAME, store, seeds, partial(work, blocks=blocks))
    shared = {
        "samples": max(40, round(SAMPLES * scale / BATCH_SIZE)) * BATCH_SIZE,
        "micro_batch": BATCH_SIZE,
        "num_micro_batches": 1,
        "layers": LAYERS[-1],
        "evaluations": EVALUATIONS,
    }
    found = {
        label: study.search({"label": label, **shared, **run}, RATES) for label, run in RUNS.items()
    }
    full = [run["rows"][-1] for run in found[FULL]["runs"]]
    methods = {label: _figures(each, full) for label, each in found.items()}
    return {"settings": {**shared, "stages": LAYERS, "starts": STARTS}, "methods": methods}


def _figures(found: dict[str, Any], full: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of a method, given the last evaluation at full depth of every seed."""
    runs = found.pop("runs")
    pairs = list(zip(runs, full, strict=True))
    return {
        **found,
        "val_loss": over_seeds([run["score"] for run in runs]),
        "ahead_of_full": over_seeds([end["val_loss"] - run["score"] for run, end in pairs]),
        "flops_share": over_seeds([r["rows"][-1]["flops"] / end["flops"] for r, end in pairs]),
        "flops_share_to_loss": over_seeds([_share_to_loss(run, end) for run, end in pairs]),
        "curves": [run["rows"] for run in runs],
    }


def _share_to_loss(run: Result, full: dict[str, Any]) -> float | None:
    flops = count_to_loss(run["rows"], full["val_loss"], "flops")
    return None if flops is None else flops / full["flops"]


def show(result: dict[str, Any]) -> None:
    """Print a row a way to train."""
    keys = ("val_loss", "ahead_of_full", "flops_share", "flops_share_to_loss")
    rows = [
        [label, rate_text(m), *(as_text(m[key]) for key in keys)]
        for label, m in result["methods"].items()
    ]
    header = ["depth", "lr", "val loss", "ahead of full", "operations", "to full's loss"]
    print_table(header, rows)
