"""The gates of a model: shrunk after every step, counted at any time."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...core.threshold import dead_zone_threshold, soft_threshold
from ..interface import AdapterError, StepHook
from ..lora import factor_a, lora_layers
from .layer import GatedLinear, SoraLinear

if TYPE_CHECKING:
    from . import SoRAConfig
    from .phases import SparsitySchedule

THRESHOLDS = {"soft": soft_threshold, "official": dead_zone_threshold}


class GateHook(StepHook):
    """Adds the L1 term's gradient, if any, and shrinks the gates after each step.

    Gates that are frozen stay as they are. Everything follows from the step's number, so nothing
    is kept between steps.

    Raises:
        ValueError: if the model has no gates.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SoRAConfig,
        schedule: SparsitySchedule,
        optimizer: Optimizer | None,
    ) -> None:
        self.model = model
        self.config = config
        self.schedule = schedule
        self.optimizer = optimizer
        gates_of(model)

    @torch.no_grad()
    def before_optimizer_step(self, step: int) -> None:
        """Add the gradient of ``l1_weight`` times the mean of |g| over all gates."""
        if self.config.l1_weight == 0.0:
            return
        gates = self._gates()
        num_gates = sum(gate.numel() for gate in gates)
        for gate in gates:
            push = gate.sign() * (self.config.l1_weight / num_gates)
            gate.grad = push if gate.grad is None else gate.grad.add_(push)

    @torch.no_grad()
    def on_optimizer_step(self, step: int) -> None:
        """Shrink the gates by the schedule's amount.

        Raises:
            AdapterError: if every gate of the model is zero now: A and B get no gradient any more.
            ValueError: if ``shrinkage_unit="lr"`` has no optimizer that trains the gates.
        """
        apply_threshold = THRESHOLDS[self.config.threshold]
        amount = self.schedule.shrinkage_at(step)
        for gate in self._gates():
            factor = self._lr(gate) if self.config.shrinkage_unit == "lr" else 1.0
            gate.copy_(apply_threshold(gate, amount * factor))
        if not any(gate.any() for gate in gates_of(self.model).values()):
            raise AdapterError(
                f"every gate of SoRA is zero after step {step}, so that A and B get no gradient "
                f"any more: give a smaller shrinkage (now {amount:g} a step"
                f"{' times the rate' if self.config.shrinkage_unit == 'lr' else ''})"
            )

    def warn_if_no_gate_can_hold(self) -> None:
        """Warn if the gates' rate is below the shrinkage, so that where they began decides."""
        gates = self._gates()
        group = self._group(gates[0]) if gates else None
        if group is None:
            return
        rate = float(group.get("initial_lr", group["lr"]))
        amount = max(self.schedule.shrinkages)
        shrinkage = amount * rate if self.config.shrinkage_unit == "lr" else amount
        if shrinkage > rate:
            warnings.warn(
                f"SoRA's shrinkage of {shrinkage:.3g} a step is above the gates' rate of "
                f"{rate:.3g}, which Adam's steps hardly exceed: which gates die is decided by "
                "where they began; give a gate_lr above the shrinkage, or a smaller shrinkage",
                UserWarning,
                stacklevel=3,
            )

    def _gates(self) -> list[nn.Parameter]:
        return [gate for gate in gates_of(self.model).values() if gate.requires_grad]

    def _lr(self, gate: nn.Parameter) -> float:
        if self.optimizer is None:
            raise ValueError("shrinkage_unit 'lr' needs the optimizer: step_hook(optimizer=...)")
        group = self._group(gate)
        if group is None:
            raise ValueError("the optimizer does not train the gates; use sora.param_groups")
        return float(group["lr"])

    def _group(self, gate: nn.Parameter) -> dict[str, Any] | None:
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return next((group for group in groups if any(p is gate for p in group["params"])), None)


def gated_layers(model: nn.Module) -> dict[str, SoraLinear]:
    """Return the layers with gates by their names in the base model.

    Raises:
        ValueError: if there is none.
    """
    layers = {
        name: layer
        for name, layer in lora_layers(model).items()
        if isinstance(layer, SoraLinear) and isinstance(factor_a(layer), GatedLinear)
    }
    if not layers:
        raise ValueError("the model's LoRA layers have no gates; call sora.apply on the base model")
    return layers


def gates_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the gates by the names of their layers in the base model.

    Raises:
        ValueError: if there is none.
    """
    return {name: factor_a(layer).lora_gate for name, layer in gated_layers(model).items()}


def surviving_ranks(model: nn.Module) -> dict[str, int]:
    """Return the number of gates that are not zero, by layer.

    Raises:
        ValueError: if the model has no gates.
    """
    return {name: int(torch.count_nonzero(gate)) for name, gate in gates_of(model).items()}


def num_surviving_parameters(model: nn.Module) -> int:
    """Return the number of parameters of A and B that `export` would write.

    Differs from the authors' counter, which takes every layer for a square one.

    Raises:
        ValueError: if the model has no gates.
    """
    layers: dict[str, Any] = dict(gated_layers(model))
    return sum(
        rank * (layers[name].in_features + layers[name].out_features)
        for name, rank in surviving_ranks(model).items()
    )
