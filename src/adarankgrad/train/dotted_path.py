"""Optimizers of other packages, named by dotted path such as ``torch.optim.Muon``.

The class trains the weights that low-rank methods project, and torch's AdamW the rest, so that
every method is compared on the same weights. Muon is meant to be used like that.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adarankgrad.train.errors import UserError
from adarankgrad.train.paired import PairedOptimizer

GROUP_ARGUMENT = "group"
"""The argument whose names and values go into the parameter group, as APOLLO's rank does."""


def load_optimizer_class(path: str) -> type[Optimizer]:
    """Import an optimizer class of an installed package.

    Args:
        path: Module and class, such as ``torch.optim.Muon``.

    Raises:
        UserError: The module or the class is not there, or the class is no optimizer, or its step
            evaluates the loss itself.
    """
    module_name, _, class_name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # an installed package may fail in its own ways
        raise UserError(
            f"cannot import {module_name} for optimizer {path!r} ({type(error).__name__}: "
            f"{error}): install its package, or check the spelling."
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        raise UserError(
            f"optimizer {path!r} is not there: {module_name} has no {class_name}. Check the "
            "spelling and the package's version."
        )
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise UserError(f"{path} is no optimizer: give a subclass of torch.optim.Optimizer.")
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(
            f"{path} evaluates the loss several times a step, which training here does not offer: "
            "choose another optimizer."
        )
    return found


def own_default_lr(optimizer_class: type[Optimizer]) -> float | None:
    """Return the default learning rate of a class, or None where it has no usable one."""
    parameter = inspect.signature(optimizer_class).parameters.get("lr")
    default = None if parameter is None else parameter.default
    return float(default) if isinstance(default, int | float) else None


def build_paired(
    optimizer_class: type[Optimizer],
    groups: list[dict[str, Any]],
    *,
    lr: float,
    weight_decay: float = 0.0,
    group: dict[str, Any] | None = None,
    **options: Any,
) -> PairedOptimizer:
    """Build an optimizer of another package for the projected weights, AdamW for the others.

    Args:
        optimizer_class: From `load_optimizer_class`.
        groups: From `group_parameters`.
        lr: Peak rate of both, where a group has none of its own.
        weight_decay: Decay of both, where a group has none of its own.
        group: More entries of the projected parameter groups.
        options: More arguments of the class.

    Raises:
        ValueError: No weight is projected, or ``group`` is no dict.
    """
    if group is not None and not isinstance(group, dict):
        raise ValueError(f"{GROUP_ARGUMENT} = {group!r} must be a table of names and values")
    takes_decay = "weight_decay" in inspect.signature(optimizer_class).parameters
    shared: dict[str, Any] = {"lr": lr, **({"weight_decay": weight_decay} if takes_decay else {})}
    projected = [
        {"params": _tensors(entry), **_own(entry, shared), **(group or {})}
        for entry in groups
        if entry["project"]
    ]
    if not projected:
        raise ValueError("the model has no weight worth projecting, which is what it would train")
    plain = [
        {"params": _tensors(entry), **_own(entry, {"lr": lr, "weight_decay": weight_decay})}
        for entry in groups
        if not entry["project"]
    ]
    parts = [optimizer_class(projected, **shared, **options)]
    if plain:
        parts.append(torch.optim.AdamW(plain, lr=lr, weight_decay=weight_decay))
    return PairedOptimizer(parts)


def _tensors(group: dict[str, Any]) -> list[Tensor]:
    return [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]


def _own(group: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    return {name: group.get(name, value) for name, value in shared.items()}
