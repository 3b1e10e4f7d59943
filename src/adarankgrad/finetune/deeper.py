"""``--progressive-depth`` on a pretrained model: it starts as it is, and grows beyond its depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adarankgrad.schedules.depth import find_layers
from adarankgrad.train.errors import UserError
from adarankgrad.train.growing_depth import depth_settings
from adarankgrad.train.method_settings import errors_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from adarankgrad.finetune.config import FinetuneConfig


def deepen(config: FinetuneConfig, model_config: PretrainedConfig) -> int | None:
    """Give a model's configuration the layers of the last stage, in place.

    Returns:
        The layers that are pretrained, or None where the model does not grow.

    Raises:
        UserError: The first stage has fewer or more layers.
    """
    settings = depth_settings(config)
    if settings is None:
        return None
    text_config: Any = model_config.get_text_config()
    num_layers: int = text_config.num_hidden_layers
    if settings.layers[0] != num_layers:
        raise UserError(
            f"--progressive-depth starts with {settings.layers[0]} layers, and the pretrained "
            f"{config.model} has {num_layers}: give layers=({num_layers},...), so that none of "
            "them is lost."
        )
    for name, value in vars(text_config).items():
        if "layer" in name and isinstance(value, list) and len(value) == num_layers:
            setattr(text_config, name, value + value[-1:] * (settings.max_depth - num_layers))
    text_config.num_hidden_layers = settings.max_depth
    return num_layers


def without_waiting_layers(
    config: FinetuneConfig, model: Any, names: list[str], num_layers: int | None
) -> list[str]:
    """Leave out the weights of layers that copies will replace before the model is used.

    Args:
        config: The settings.
        model: With all layers.
        names: Of weights that the pretrained model lacks.
        num_layers: Layers that it has, where it is to grow.

    Raises:
        UserError: The model has no list of layers.
    """
    settings = depth_settings(config)
    if settings is None or num_layers is None:
        return names
    with errors_of("--progressive-depth"):
        layers = find_layers(model, settings.layer_list).name
    waiting = tuple(f"{layers}.{number}." for number in range(num_layers, settings.max_depth))
    return [name for name in names if not name.startswith(waiting)]
