"""SaRA: a model's own small weights, which are chosen by their values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from adarankgrad.core.patterns import matching_names
from adarankgrad.finetune.methods.adapted import Adapted, divide
from adarankgrad.train.folder import ADAPTER_FOLDER
from adarankgrad.train.loop import run_methods
from adarankgrad.train.method_settings import errors_of
from adarankgrad.train.optimizers import build_optimizer
from adarankgrad.train.presets import checkpoint_activations


class SaRA(Adapted):
    """Small weights are trained, with the head if that is new."""

    whole_setting = "train_fully"

    def check(self, empty_model: Any) -> None:
        """See that patterns, optimizer and methods fit, as far as names and shapes tell."""
        if self.config.activation_checkpointing:
            checkpoint_activations(empty_model)
        named = list(empty_model.named_parameters())
        with errors_of(f"--method {self.config.method}"):
            dense = matching_names(self.settings.train_fully, named, "train_fully")
            self.adapter.candidates(named, self.settings, dense)
        # No values to choose by yet: the optimizer is that of all weights.
        groups = divide([{"params": list(empty_model.parameters())}], empty_model)
        run_methods(self.config, empty_model, build_optimizer(groups, self.config))

    def save(self, model: Any, optimizer: Optimizer, folder: Path) -> None:
        """Write the whole model, with what was trained in its weights."""
        self.adapter.merge(model).save_pretrained(folder)

    def save_beside(self, model: Any, run_dir: Path) -> None:
        """Write the trained values by themselves too."""
        self.adapter.export(model, run_dir / ADAPTER_FOLDER)

    def implied_settings(self) -> dict[str, Any]:
        """Return the run's seed."""
        return {"seed": self.config.seed}

    def names_of(self, model: Any, new_weights: list[str]) -> list[str]:
        """Return a pattern for each."""
        return [f"^{re.escape(weight)}$" for weight in new_weights]
