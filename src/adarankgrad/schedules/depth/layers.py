"""Where a model keeps its layers, and whether one can stand in for another."""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

from torch import nn

# Attributes that do not change what a layer computes, caches apart.
_NOT_FUNCTION = {"training", "layer_idx", "layer_id", "layer_index", "layer_number"}


class LayerList(NamedTuple):
    """The list of a model's layers.

    Attributes:
        name: of the list, such as ``model.layers``.
        parent: the module that holds it.
        attribute: under which.
        modules: the list, bottom layer first.
    """

    name: str
    parent: nn.Module
    attribute: str
    modules: nn.ModuleList


def find_layers(model: nn.Module, name: str | None = None) -> LayerList:
    """Find the list of a model's layers.

    Args:
        model: with a transformers configuration, unless the list is named.
        name: of an ``nn.ModuleList`` of the model; None finds the only one as long as the
            configuration's ``num_hidden_layers`` (or ``n_layer``).

    Raises:
        ValueError: there is no such list, or there are several.
    """
    if name is None:
        name = _only_list(model)
    parent_name, _, attribute = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        found = parent.get_submodule(attribute)
    except AttributeError:
        found = None
    if not isinstance(found, nn.ModuleList) or not len(found):
        lists = [
            each for each, module in model.named_modules() if isinstance(module, nn.ModuleList)
        ]
        raise ValueError(
            f"layer_list {name!r} is no list of layers of {type(model).__name__}, which has "
            f"{', '.join(lists) or 'none'}"
        )
    return LayerList(name, parent, attribute, found)


def check_interchangeable(model: nn.Module, found: LayerList) -> None:
    """See that any layer could run in any place.

    Raises:
        ValueError: layers share weights, differ in structure or in a plain attribute, or the
            configuration says something else for each of them.
    """
    layers = list(found.modules)
    weights = [id(weight) for layer in layers for weight in layer.parameters()]
    if len(set(weights)) < len(weights):
        raise ValueError(f"layers of {found.name} share weights already")
    first = _description(layers[0])
    for index, layer in enumerate(layers[1:], 1):
        other = _description(layer)
        for place in {**first, **other}:
            if first.get(place) != other.get(place):
                raise ValueError(
                    f"layers of {found.name} cannot stand in for one another: {place} is "
                    f"{first.get(place)} in layer 0 and {other.get(place)} in layer {index}"
                )
    _check_config(text_config(model), len(layers))


def _only_list(model: nn.Module) -> str:
    num_layers = _configured_layers(model)
    kind = type(model).__name__
    if num_layers is None:
        raise ValueError(
            f"{kind} does not say how many layers it has; name their list with layer_list"
        )
    names: list[str] = []
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in names)
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and not is_inside:
            names.append(name)
    if len(names) != 1:
        what = f"several lists of {num_layers} layers ({', '.join(names)})" if names else "none"
        raise ValueError(
            f"{kind} should have one list of its {num_layers} layers, and has {what}; name it "
            "with layer_list"
        )
    return names[0]


def _configured_layers(model: nn.Module) -> int | None:
    config = text_config(model)
    for name in ("num_hidden_layers", "n_layer"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def text_config(model: nn.Module) -> Any:
    """Return a model's configuration, of its text part where it has several; None without one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _description(layer: nn.Module) -> dict[str, Any]:
    """What decides a layer's function besides the values of its weights, by name."""
    described: dict[str, Any] = {}
    for module_name, module in layer.named_modules():
        prefix = f"{module_name}." if module_name else ""
        described[f"the class of {module_name or 'a layer'}"] = type(module).__name__
        for name, value in vars(module).items():
            if _is_plain(value) and not name.startswith("_") and name not in _NOT_FUNCTION:
                described[f"{prefix}{name}"] = value
    for name, tensor in chain(layer.named_parameters(), layer.named_buffers()):
        described[f"the shape of {name}"] = tuple(tensor.shape)
    return described


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int | float | str)


def _check_config(config: Any, num_layers: int) -> None:
    """Refuse what a model's own forward pass decides by a layer's position."""
    if config is None:
        return
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ValueError("scale_attn_by_inverse_layer_idx scales attention by a layer's position")
    for name, value in vars(config).items():
        is_list = isinstance(value, list | tuple) and "layer" in name
        if is_list and len(value) == num_layers and any(each != value[0] for each in value):
            raise ValueError(f"{name} of the configuration tells layers apart: {value}")
