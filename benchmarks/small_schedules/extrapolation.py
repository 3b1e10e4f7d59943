"""Extrapolation: the loss with 8 and 32 times the small batch, at equal samples.

The past local gradient is that of one micro-batch, of the small batch's size. Without
extrapolation a batch is one pass, which is the same but for rounding.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from adarankgrad.schedules.extrapolation import Extrapolation, ExtrapolationConfig
from harness import print_table
from small_schedules.language_model import Blocks, Plain, train
from small_schedules.study import Result, Run, Store, Study, as_text, over_seeds, rate_text

NAME = "extrapolation"
SMALL_BATCH, FACTORS, STEP_LENGTHS = 4, (8, 32), (0.1, 0.5)
SAMPLES, LAYERS, EVALUATIONS = 6144, 2, 8
RATES = {1: (2e-3, 4e-3, 8e-3), 8: (4e-3, 8e-3, 16e-3), 32: (8e-3, 16e-3, 32e-3)}


class Ahead(Plain):
    """Takes gradients ahead of the weights, by the past local gradient."""

    def __init__(self, run: Run, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(run, model, optimizer)
        self._extrapolation = Extrapolation(
            optimizer,
            model,
            ExtrapolationConfig(step=run["step"]),
            num_micro_batches=self.num_micro_batches,
        )

    def passes(self) -> AbstractContextManager[Any]:
        """Move the weights ahead, and back."""
        return self._extrapolation.extrapolate()


def work(run: Run, blocks: Blocks) -> Result:
    """Train once."""
    return train(run, blocks, Ahead if "step" in run else Plain)


def measure(blocks: Blocks, store: Store, seeds: list[int], scale: float) -> dict[str, Any]:
    """Train with each batch, with and without; return last losses at the weights."""
    study = Study(NAME, store, seeds, partial(work, blocks=blocks))
    largest = SMALL_BATCH * max(FACTORS)
    shared = {
        "samples": max(2, round(SAMPLES * scale / largest)) * largest,
        "layers": LAYERS,
        "evaluations": EVALUATIONS,
    }
    found = {}
    for factor in (1, *FACTORS):
        size = factor * SMALL_BATCH
        plain = {"micro_batch": size, "num_micro_batches": 1}
        found[f"batch {size}"] = study.search(
            {"label": f"batch {size}", **shared, **plain}, RATES[factor]
        )
        for step in STEP_LENGTHS if factor > 1 else ():
            label = f"batch {size}, step {step:g}"
            ahead = {"micro_batch": SMALL_BATCH, "num_micro_batches": factor, "step": step}
            found[label] = study.search({"label": label, **shared, **ahead}, RATES[factor])
    methods = {label: _figures(each, found[label.split(",")[0]]) for label, each in found.items()}
    return {"settings": shared, "methods": methods}


def _figures(found: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """Figures of a method, given the runs of its batch without extrapolation."""
    losses = [run["score"] for run in found["runs"]]
    plain_losses = [run["score"] for run in plain["runs"]]
    ahead = [without - loss for without, loss in zip(plain_losses, losses, strict=True)]
    return {
        **{key: value for key, value in found.items() if key != "runs"},
        "steps": found["runs"][0]["rows"][-1]["step"],
        "val_loss": over_seeds(losses),
        "ahead_of_plain": over_seeds(ahead),
    }


def show(result: dict[str, Any]) -> None:
    """Print a row a batch and step length."""
    rows = [
        [label, rate_text(m), str(m["steps"]), as_text(m["val_loss"]), as_text(m["ahead_of_plain"])]
        for label, m in result["methods"].items()
    ]
    print_table(["", "lr", "steps", "val loss", "ahead of plain"], rows)
