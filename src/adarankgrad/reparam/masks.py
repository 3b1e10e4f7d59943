"""Masks of the largest weights, and a model with only these left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..core.checks import check_choice, check_number
from ..core.patterns import matching_names
from .power import powered_weights
from .powerprop import layer_weights

Scope = Literal["layer", "global"]
DENSITIES = tuple(float(f"{0.01 ** (step / 19):.4g}") for step in range(20))
"""20 densities from 1 to 0.01, geometrically, as in the authors' notebook."""


def magnitude_masks(
    model: nn.Module,
    density: float,
    *,
    scope: Scope = "layer",
    output_layer: str | None = None,
    exclude: str | Sequence[str] = (),
) -> dict[str, Tensor]:
    """Choose the weights of linear and convolution layers that are largest in magnitude.

    Masks of a lower density lie inside those of a higher one: equal magnitudes are taken in the
    order of their positions. A weight that several layers share counts once, under the first
    one's name. Works on a plain model and on one from `powerpropagate`, whose powers
    are compared, not their parameters.

    Args:
        model: not changed.
        density: share of weights to keep, in (0, 1].
        scope: ``"layer"``: of every layer this share; ``"global"``: of all layers together.
        output_layer: name of a layer, such as ``"lm_head"``, that keeps min(1, 2 density) by
            itself, as in the authors' notebook.
        exclude: regular expressions of weights that are no part of this, such as tied ones.

    Returns:
        By the plain name of each weight, a bool mask of its shape; round(density * n) of n entries
        are True, halves rounded up.

    Raises:
        ValueError: density is outside (0, 1], scope is unknown, output_layer names no layer or one
            whose weight stands under another name, or exclude matches nothing or everything.

    Memory: 12 bytes for each entry that is ordered together.
    """
    check_number("density", density, low=0.0, high=1.0, is_low_allowed=False)
    check_choice("scope", scope, get_args(Scope))
    weights = prunable_weights(model)
    for name in matching_names(exclude, list(weights.items()), "exclude"):
        del weights[name]
    if not weights:
        raise ValueError("the model has no weight of a linear or convolution layer to choose from")
    output_name = None if output_layer is None else f"{output_layer}.weight"
    if output_name is not None and output_name not in weights:
        _refuse_tied_output(model, output_name)
        raise ValueError(
            f"output_layer {output_layer!r} is no linear or convolution layer of the model; its "
            f"last one is {list(weights)[-1].removesuffix('.weight')!r}"
        )
    rest = [name for name in weights if name != output_name]
    blocks = [rest] if scope == "global" else [[name] for name in rest]
    masks: dict[str, Tensor] = {}
    for names in blocks:
        masks.update(_largest({name: weights[name] for name in names}, density))
    if output_name is not None:
        masks.update(_largest({output_name: weights[output_name]}, min(1.0, 2 * density)))
    return {name: masks[name] for name in weights}


@torch.no_grad()
def sparsify(
    model: nn.Module,
    density: float,
    *,
    scope: Scope = "layer",
    output_layer: str | None = None,
    exclude: str | Sequence[str] = (),
) -> dict[str, Tensor]:
    """Set all but the largest weights to zero, in place, without training again.

    Arguments and errors: those of `magnitude_masks`.

    Returns:
        The masks, True where a weight was kept; training on needs them, since an optimizer with
        momentum moves zeros too.
    """
    masks = magnitude_masks(model, density, scope=scope, output_layer=output_layer, exclude=exclude)
    stored = stored_weights(model)
    for name, mask in masks.items():
        stored[name].mul_(mask)
    return masks


def prunable_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of linear and convolution layers by plain name; powers in float32."""
    powered = {each.name: each.weight() for each in powered_weights(model)}
    stored = stored_weights(model)
    return {name: powered.get(name, weight.detach()) for name, weight in stored.items()}


def stored_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what holds these weights: theta of a powered one, else the parameter itself.

    A weight that several layers share stands here once, under the first one's name.
    """
    powered = {each.name: each.theta for each in powered_weights(model)}
    stored: dict[Tensor, str] = {}
    for name, module in layer_weights(model).items():
        weight = powered[name] if name in powered else module.get_parameter("weight")
        stored.setdefault(weight, name)
    return {name: weight for weight, name in stored.items()}


def num_kept(density: float, size: int) -> int:
    """Return how many of a number of weights a density keeps, halves rounded up."""
    return math.floor(density * size + 0.5)


def largest_entries(magnitudes: Tensor, count: int) -> Tensor:
    """Mark the largest of a vector's entries; of equal ones those that come first."""
    order = magnitudes.argsort(descending=True, stable=True)
    marks = torch.zeros_like(magnitudes, dtype=torch.bool)
    marks[order[:count]] = True
    return marks


def _refuse_tied_output(model: nn.Module, output_name: str) -> None:
    """Say under which name a shared weight stands."""
    layer = layer_weights(model).get(output_name)
    for name, weight in stored_weights(model).items():
        if layer is not None and name != output_name and weight is layer.weight:
            raise ValueError(
                f"output_layer {output_name.removesuffix('.weight')!r} shares its weight with "
                f"{name.removesuffix('.weight')!r}, which cannot keep another share: leave it out"
            )


def _largest(weights: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    flat = [weight.abs().float().flatten() for weight in weights.values()]
    together = torch.cat([each.to(flat[0].device) for each in flat])
    marks = largest_entries(together, num_kept(density, together.numel()))
    parts = torch.split(marks, [each.numel() for each in flat])
    return {
        name: part.view(weight.shape).to(weight.device)
        for (name, weight), part in zip(weights.items(), parts, strict=True)
    }
