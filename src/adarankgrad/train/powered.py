"""``--powerprop``: from the setting to a model trained by powers, and back to a plain one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from adarankgrad.reparam import PowerpropConfig, PowerUpdates, powerpropagate, split_groups
from adarankgrad.train.method_settings import errors_of, read_method

if TYPE_CHECKING:
    from adarankgrad.train.run_config import RunConfig

_Model = TypeVar("_Model", bound=nn.Module)
_FLAG = "--powerprop"


def powerprop_settings(config: RunConfig) -> PowerpropConfig | None:
    """Return how to train by powers, or None where the run does not.

    Raises:
        UserError: A setting is unknown, missing or out of range.
    """
    return read_method(
        PowerpropConfig,
        config.powerprop,
        _FLAG,
        needs="alpha",
        advice="the power, such as --powerprop alpha=2",
    )


def power_model(model: _Model, config: RunConfig) -> _Model:
    """Train a model's weights by powers, in place, where the settings ask for it; return it.

    Raises:
        UserError: They cannot be.
    """
    settings = powerprop_settings(config)
    if settings is not None:
        with errors_of(_FLAG):
            powerpropagate(model, settings)
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
