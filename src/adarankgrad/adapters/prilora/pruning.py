"""Ongoing pruning of LoRA's A by weight times input norm.

S_ij = |A_ij| x̄_j, with x̄_j the running L2 norm of input feature j (`input_norms`). Every
``prune_every`` steps the entries with the smallest S are set to zero. They stay trainable, so they
may grow again until the next event.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...core.pruning import least_important
from ..interface import StepHook
from ..lora import factor_a, lora_layers
from .input_norms import InputNorms

if TYPE_CHECKING:
    from torch import nn

    from . import PRILoRAConfig


class PruningHook(StepHook):
    """Follows the norms of the inputs, and prunes A at every ``prune_every``-th step.

    Norms move in training mode only. Nothing is drawn at random, and with data-parallel processes
    the norms are those of the global batch, so that all processes prune the same entries.
    Adam's moments of pruned entries stay: momentum moves them on at the next step.

    Raises:
        ValueError: if the model has no LoRA layers.
    """

    def __init__(self, model: nn.Module, config: PRILoRAConfig) -> None:
        self.config = config
        self.layers = lora_layers(model)
        watched = {name: (layer, layer.in_features) for name, layer in self.layers.items()}
        self.norms = InputNorms(_inner_model(model), watched, decay=config.norm_decay)

    def on_optimizer_step(self, step: int) -> None:
        """Move the norms; at an event, prune."""
        self.norms.update()
        if step % self.config.prune_every == 0:
            self.prune()

    @torch.no_grad()
    def prune(self) -> None:
        """Set the least important share of every A to zero, now.

        Called after the last step, it makes the share of zeros exact in what is exported. Layers
        whose inputs were not seen yet are left alone.
        """
        for name, layer in self.layers.items():
            weight = factor_a(layer).weight
            norms = self.norms.means[name].to(weight.device)
            if not norms.any():
                continue
            importance = weight.abs() * norms
            if self.config.compare == "matrix":
                importance = importance.reshape(1, -1)
            marks = least_important(importance, self.config.prune_share)
            weight.masked_fill_(marks.reshape(weight.shape), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the running norms, by layer."""
        return {"norms": {name: mean.clone() for name, mean in self.norms.means.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with saved norms.

        Raises:
            ValueError: if they belong to other layers.
        """
        shapes = {name: mean.shape for name, mean in self.norms.means.items()}
        if {name: mean.shape for name, mean in state["norms"].items()} != shapes:
            raise ValueError(
                "the saved norms belong to other layers than the model's; apply PRILoRA with the "
                "configuration of the saved run to the same base model"
            )
        self.norms.means = {name: mean.clone() for name, mean in state["norms"].items()}

    def remove(self) -> None:
        """Stop watching the inputs."""
        self.norms.remove()


def _inner_model(model: nn.Module) -> nn.Module:
    """The base model inside peft's, whose own signature names its arguments."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model
