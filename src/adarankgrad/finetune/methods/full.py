"""Every weight is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from adarankgrad.finetune.methods.interface import Method, Prepared
from adarankgrad.reparam import export_plain
from adarankgrad.train.loop import check_trains, prepare_model, prepare_optimizer
from adarankgrad.train.optimizers import group_parameters, widen_corrected_weights


class Full(Method):
    """Every weight is trained."""

    def check(self, empty_model: Any) -> None:
        """See that optimizer and methods take the model."""
        check_trains(empty_model, self.config)

    def apply(self, model: Any, new_weights: list[str]) -> Any:
        """Train by powers and compute activations again, where the settings ask for it."""
        return prepare_model(model, self.config)

    def prepare(self, model: Any) -> Prepared:
        """Build the optimizer, hooks included."""
        optimizer, projected = prepare_optimizer(model, self.config)
        return Prepared(model, optimizer, projected, group_parameters(model, self.config))

    def save(self, model: Any, optimizer: Optimizer, folder: Path) -> None:
        """Write a plain model."""
        widen_corrected_weights(model, optimizer)
        export_plain(model)
        model.save_pretrained(folder)
