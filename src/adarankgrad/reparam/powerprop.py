"""Powerpropagation (Schwarz et al. 2021): weights trained by a power of parameters.

w = sign(theta) |theta|^alpha. A gradient step moves w by alpha^2 |w|^(2 - 2/alpha) times as much as
without it, so that small weights stay small and large ones grow: the trained model can be pruned
further. `docs/powerprop.md` says what of this was read, run and remembered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn
from torch.nn.utils import parametrize

from ..core.checks import check_choice, check_number
from ..core.layers import is_transposed_linear, unshare_class
from ..core.patterns import check_pattern_settings, matching_names
from .power import Power, powered_weights

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
AdamMode = Literal["theta", "preconditioned"]
DecayOn = Literal["theta", "weight"]


@dataclass(frozen=True)
class PowerpropConfig:
    """How a model is trained by powers.

    Attributes:
        alpha: the power, at least 1; 1 changes nothing.
        adam_mode: what the optimizer sees: ``"theta"``, the gradient by theta; or
            ``"preconditioned"``, the gradient by w, with the step it makes multiplied by the slope
            alpha |theta|^(alpha-1) (unverified: from memory of the paper).
        decay_on: what decoupled weight decay shrinks: ``"theta"``, as the optimizer does by
            itself, which is about alpha times as strong on w; or ``"weight"``.
        include: regular expressions searched in names; None: every weight of a linear or
            convolution layer.
        exclude: regular expressions of weights to leave plain.

    Raises:
        ValueError: alpha is below 1 or not finite, or a choice is unknown.
    """

    alpha: float = 2.0
    adam_mode: AdamMode = "theta"
    decay_on: DecayOn = "theta"
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, low=1.0)
        check_choice("adam_mode", self.adam_mode, get_args(AdamMode))
        check_choice("decay_on", self.decay_on, get_args(DecayOn))
        check_pattern_settings(self, ("include", "exclude"))

    @property
    def changes_updates(self) -> bool:
        """Whether the optimizer needs `PowerUpdates`; at alpha 1, w is theta."""
        return self.alpha != 1 and (self.adam_mode != "theta" or self.decay_on != "theta")


def powerpropagate(model: nn.Module, config: PowerpropConfig | None = None) -> nn.Module:
    """Train a model's weights by a power from now on; its function stays as it is.

    The parameters stay the same objects, holding theta, so that an optimizer may be built before
    or after. Wrap the model for several devices afterwards. Where a weight is used several times in
    a forward pass, ``torch.nn.utils.parametrize.cached()`` computes its power once.

    Args:
        model: changed in place.
        config: see there.

    Returns:
        The same model.

    Raises:
        ValueError: there is no weight to train by a power, a pattern matches none, one is
            parametrized already, or one is tied to another parameter's place.

    Memory: the weights themselves, while they are used in a forward and backward pass.

    Example:
        >>> from torch import nn
        >>> model = powerpropagate(nn.Linear(4, 4), PowerpropConfig(alpha=3))
        >>> [weight.name for weight in powered_weights(model)]
        ['weight']
    """
    config = config or PowerpropConfig()
    layers = _chosen_layers(model, config)
    if not layers:
        raise ValueError(
            "the model has no weight of a linear or convolution layer left to train by its power; "
            "widen include or exclude less"
        )
    _refuse_tied(model, layers)
    for name, module in layers.items():
        if parametrize.is_parametrized(module, "weight"):
            raise ValueError(f"{name} is parametrized already; leave it out with exclude")
    for module in layers.values():
        parametrize.register_parametrization(module, "weight", Power(float(config.alpha)))
    return model


def export_plain(model: nn.Module) -> nn.Module:
    """Make every powered weight a plain parameter again, holding w; the function stays as it is.

    In place: keys, classes and ``save_pretrained`` are those of the plain model. Copies of the
    model stay as they are.

    Returns:
        The same model.
    """
    for powered in powered_weights(model):
        unshare_class(powered.module)
        parametrize.remove_parametrizations(powered.module, powered.tensor_name)
    return model


def layer_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear and convolution layers of a model by the plain names of their weights."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS) or is_transposed_linear(module):
            layers[f"{name}.weight" if name else "weight"] = module
    return layers


def _chosen_layers(model: nn.Module, config: PowerpropConfig) -> dict[str, nn.Module]:
    layers = layer_weights(model)
    chosen = set(layers)
    if config.include is not None:
        chosen = matching_names(config.include, layers.items(), "include")
    chosen -= matching_names(config.exclude, layers.items(), "exclude")
    return {name: module for name, module in layers.items() if name in chosen}


def _refuse_tied(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Refuse a weight that another module holds too: it would find theta there instead of w."""
    places: dict[int, list[str]] = defaultdict(list)
    for module_name, module in model.named_modules():
        for short_name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            places[id(param)].append(f"{module_name}.{short_name}" if module_name else short_name)
    for name, module in layers.items():
        others = [other for other in places[id(module.weight)] if other != name]
        if others:
            raise ValueError(
                f"{name} is tied to {', '.join(others)}, which would hold theta instead of the "
                f"weight; leave it out with exclude={name.removesuffix('.weight')!r}"
            )
