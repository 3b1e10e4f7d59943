"""``--powerprop``: from the setting to a model trained by powers, and back to a plain one."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from adarankgrad.reparam import PowerpropConfig, PowerUpdates, powerpropagate, split_groups
from adarankgrad.train.errors import UserError, unknown_name

if TYPE_CHECKING:
    from adarankgrad.train.run_config import RunConfig

_Model = TypeVar("_Model", bound=nn.Module)
_NAMES = tuple(spec.name for spec in fields(PowerpropConfig))


def powerprop_settings(config: RunConfig) -> PowerpropConfig | None:
    """Return how to train by powers, or None where the run does not.

    Raises:
        UserError: A setting is unknown, missing or out of range.
    """
    given = config.powerprop
    if not given:
        return None
    for name in given:
        if name not in _NAMES:
            raise unknown_name("setting of --powerprop", name, list(_NAMES))
    if "alpha" not in given:
        raise UserError("--powerprop has no alpha: give the power, such as --powerprop alpha=2.")
    try:
        return PowerpropConfig(**given)
    except ValueError as error:
        raise UserError(f"--powerprop: {error}.") from error


def power_model(model: _Model, config: RunConfig) -> _Model:
    """Train a model's weights by powers, in place, where the settings ask for it; return it.

    Raises:
        UserError: They cannot be.
    """
    settings = powerprop_settings(config)
    if settings is not None:
        try:
            powerpropagate(model, settings)
        except ValueError as error:
            raise UserError(f"--powerprop: {error}.") from error
    return model


def powered_groups(
    groups: list[dict[str, Any]], model: nn.Module, config: RunConfig
) -> list[dict[str, Any]]:
    """Divide groups so that powered weights can be updated and decayed in their own way."""
    settings = powerprop_settings(config)
    if settings is None or not settings.changes_updates:
        return groups
    return split_groups(groups, model)


def power_updates(optimizer: Optimizer, model: nn.Module, config: RunConfig) -> None:
    """Hook preconditioned updates and decay of the weights into an optimizer, where asked for."""
    settings = powerprop_settings(config)
    if settings is not None and settings.changes_updates:
        PowerUpdates(optimizer, model, settings)
