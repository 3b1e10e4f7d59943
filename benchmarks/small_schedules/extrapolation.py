"""Extrapolation: the loss with 8 and 32 times the small batch, at equal samples.

The small batch is 4, its rate tuned; the size itself was not. The past local gradient is that of
one micro-batch of this size. Without extrapolation a batch is one pass, which is the same but for
rounding. The length of extrapolation is chosen on the first seed, at the rate that was best without
it; then the rate is searched again.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from adarankgrad.schedules.extrapolation import Extrapolation, ExtrapolationConfig
from harness import print_table
from small_schedules.language_model import Blocks, Plain, train
from small_schedules.study import (
    Result,
    Run,
    Store,
    Study,
    as_text,
    finite,
    over_seeds,
    rate_text,
)

NAME = "extrapolation"
SMALL_BATCH, FACTORS, STEP_LENGTHS = 4, (8, 32), (0.02, 0.1, 0.5, 2.0)
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
        label = f"batch {size}"
        plain = {**shared, "label": label, "micro_batch": size, "num_micro_batches": 1}
        found[label] = study.search(plain, RATES[factor])
        if factor > 1:
            label += ", ahead"
            ahead = {"label": label, "micro_batch": SMALL_BATCH, "num_micro_batches": factor}
            found[label] = _search_ahead(study, {**shared, **ahead}, found[f"batch {size}"]["lr"])
    methods = {label: _figures(each, found[label.split(",")[0]]) for label, each in found.items()}
    return {"settings": shared, "methods": methods}


def _search_ahead(study: Study, run: Run, lr: float) -> dict[str, Any]:
    """Choose the length of extrapolation at a rate, then the rate."""
    scores = {
        step: study.result({**run, "step": step}, lr, study.seeds[0])["score"]
        for step in STEP_LENGTHS
    }
    best = min(scores, key=lambda step: finite(scores[step]))
    return {
        "step": best,
        "step_lengths": [
            {"step": step, "score": score if math.isfinite(score) else None}
            for step, score in scores.items()
        ],
        **study.search({**run, "step": best}, (lr / 2, lr, 2 * lr)),
    }


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
    """Print a row a batch, with and without."""
    rows = [
        [
            label,
            f"{m.get('step', 0):g}",
            rate_text(m),
            str(m["steps"]),
            *(as_text(m[key]) for key in ("val_loss", "ahead_of_plain")),
        ]
        for label, m in result["methods"].items()
    ]
    print_table(["", "length", "lr", "steps", "val loss", "ahead of plain"], rows)
