"""SaRA (arXiv 2409.06633): the smallest weights of a model, trained as vectors in its own tensors.

The shape is `adapters.interface`'s; peft is not needed. docs/sara.md says what of it is published,
what is in the authors' code, and what is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from ...core.checks import check_choice, check_count, check_flag, check_number
from ...core.patterns import check_pattern_settings
from .files import export_values, load_sum
from .selection import candidates, forget_ties, select
from .small_weights import SmallWeights, all_sites, remove, sites
from .steps import SmallWeightsHook

__all__ = [
    "Config",
    "SaRAConfig",
    "SmallWeights",
    "SmallWeightsHook",
    "apply",
    "candidates",
    "export",
    "load",
    "load_sum",
    "merge",
    "num_selected",
    "param_groups",
    "step_hook",
    "suggested_lr",
    "threshold_of",
]


@dataclass(kw_only=True)
class SaRAConfig:
    """Settings of SaRA.

    Attributes:
        threshold: θ; weights with |p| < θ are trained. None takes it from ``quantile``.
        quantile: share of all candidate weights to train, in (0, 1).
        include: regular expressions searched in parameter names; None takes every trainable
            parameter, biases and norms too, as published.
        exclude: regular expressions; matching parameters stay frozen.
        train_fully: regular expressions of parameters to train as a whole, such as a new head.
        rank_loss_weight: λ of λ ‖P ⊙ M‖_*; 0 leaves the term, and its decompositions, out.
            Embeddings have no such term (ours).
        rank_loss_scope: one ``"random"`` matrix a step, as the authors' code, or ``"all"``.
        rank_loss_min_side: matrices whose shorter side is not above it are left out of the term.
        reselect_at: share of the run's steps after which only entries that are still below the
            threshold are trained, in (0, 1); None keeps all.
        restart_optimizer: drop the optimizer's state of the values at that point.
        seed: of the random matrices.

    Raises:
        ValueError: if a setting is out of range, or no pattern.
    """

    threshold: float | None = None
    quantile: float = 0.05
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] = ()
    train_fully: str | Sequence[str] = ()
    rank_loss_weight: float = 5e-4
    rank_loss_scope: Literal["random", "all"] = "random"
    rank_loss_min_side: int = 64
    reselect_at: float | None = 0.5
    restart_optimizer: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_number("threshold", self.threshold, low=0.0, is_low_allowed=False)
        for name in ("quantile", "reselect_at"):
            value = getattr(self, name)
            if value is None and name == "reselect_at":
                continue
            check_number(
                name, value, low=0.0, high=1.0, is_low_allowed=False, is_high_allowed=False
            )
        check_number("rank_loss_weight", self.rank_loss_weight, low=0.0)
        check_choice("rank_loss_scope", self.rank_loss_scope, ("random", "all"))
        check_count("rank_loss_min_side", self.rank_loss_min_side, low=0)
        check_flag("restart_optimizer", self.restart_optimizer)
        check_pattern_settings(self, ("include", "exclude", "train_fully"))
        check_count("seed", self.seed, low=0)


Config = SaRAConfig


def apply(model: nn.Module, config: SaRAConfig) -> nn.Module:
    """Freeze a model and train its small weights, in any module.

    The model stays what it is, with parametrized tensors; its outputs do not change by a bit.

    Memory: for each selected weight a value, its gradient, its position (int32 for tensors below
    2**31 entries) and a byte, besides the optimizer's state; for each layer's backward pass one
    full gradient.

    Raises:
        ValueError: if nothing or everything is selected, or a pattern matches nothing.
    """
    select(model, config)
    return model


def param_groups(
    model: nn.Module, config: SaRAConfig, *, lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return one group: the values, whose decay is the weights', and what is trained in full.

    Raises:
        ValueError: if the model carries no SaRA.
    """
    sites(model)
    params = [param for param in model.parameters() if param.requires_grad]
    return [{"params": params, "lr": lr, "weight_decay": weight_decay}]


def step_hook(
    model: nn.Module,
    config: SaRAConfig,
    *,
    num_steps: int,
    optimizer: Optimizer | None = None,
) -> SmallWeightsHook:
    """Return the hook with the low-rank term and the second selection.

    Raises:
        ValueError: if the model carries no SaRA, or ``num_steps`` is not at least 1.
    """
    check_count("num_steps", num_steps, low=1)
    return SmallWeightsHook(model, config, num_steps=num_steps, optimizer=optimizer)


def export(model: nn.Module, folder: str | PathLike[str]) -> None:
    """Write positions and values of the selected weights, and what was trained in full.

    Raises:
        ValueError: if the model carries no SaRA.
    """
    export_values(model, folder)


def load(
    base_model: nn.Module,
    folder: str | PathLike[str],
    *,
    scale: float = 1.0,
    check_base: bool = True,
) -> nn.Module:
    """Write an adapter into the model it was trained from, scaled: P₀ + scale · ΔP.

    See `load_sum`.

    Raises:
        ValueError: if the folder holds no SaRA adapter, a damaged one, or one of another base
            model, or the model carries SaRA already.
    """
    return load_sum(base_model, {folder: scale}, check_base=check_base)


def merge(model: nn.Module) -> nn.Module:
    """Return the model with plain tensors again, which hold the trained weights, frozen."""
    for site in list(all_sites(model)):
        remove(site)
    forget_ties(model)
    return model


def num_selected(model: nn.Module) -> dict[str, int]:
    """Return the number of weights that are trained at present, by tensor.

    Raises:
        ValueError: if the model carries no SaRA.
    """
    return {site.name: int(site.small.trained.sum()) for site in sites(model)}


def threshold_of(model: nn.Module) -> float:
    """Return θ, given or from the quantile.

    Raises:
        ValueError: if the model carries no SaRA.
    """
    return sites(model)[0].small.threshold


def suggested_lr(threshold: float) -> float:
    """Return the published rate for a threshold, 1e-3 · exp(−350 θ)."""
    return 1e-3 * math.exp(-350.0 * threshold)
