"""Which weights of a model are small enough to be trained."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from ...core.magnitude import count_below, is_below, magnitude_threshold
from ...core.patterns import matching_names
from .small_weights import EMBEDDINGS, SmallWeights, all_sites

if TYPE_CHECKING:
    from . import SaRAConfig

_MOST_OF_QUANTILE = 1.5
"""Ties may add this much unsaid: of bfloat16 weights below 1 %, of biases of zero somewhat more."""

_TIES = "_tied_weights_keys"
"""Where a model of transformers names the tensors that its checkpoints leave out, by patterns."""


class Place(NamedTuple):
    """Where a parameter lives."""

    module_name: str
    module: nn.Module
    tensor_name: str

    @property
    def pattern(self) -> str:
        """Regular expression of the names in a state dict once it is parametrized."""
        prefix = re.escape(f"{self.module_name}.") if self.module_name else ""
        return rf"(^|\.){prefix}parametrizations\.{self.tensor_name}\."


def select(model: nn.Module, config: SaRAConfig) -> None:
    """Freeze a model and make its small weights trainable.

    Raises:
        ValueError: if a pattern matches nothing, nothing or everything is selected, or the model
            carries SaRA already or a module that cannot be parametrized.
    """
    if next(all_sites(model), None) is not None:
        raise ValueError("the model carries SaRA already; merge it first")
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    dense = matching_names(config.train_fully, named, "train_fully")
    found = candidates(named, config, dense)
    threshold = config.threshold
    if threshold is None:
        threshold = magnitude_threshold(list(found.values()), config.quantile)
    _check_share(found, threshold)
    if config.threshold is None:
        _warn_of_ties(found, threshold, config.quantile)
    places = _places(model)
    for name, param in found.items():
        _check_modules(name, places[id(param)])
    model.requires_grad_(False)
    for name, param in named:
        if name in dense:
            param.requires_grad_(True)
        elif name in found:
            _train_small(param, places[id(param)], threshold)
    _keep_positions_local(model)
    _declare_ties(model, [places[id(param)] for param in found.values()])


def candidates(
    named: Sequence[tuple[str, Tensor]], config: SaRAConfig, dense: set[str]
) -> dict[str, Tensor]:
    """Return the parameters to select from, by name; their values do not matter.

    Args:
        named: parameters that may be trained.
        config: the settings, of which the patterns are read.
        dense: names of those that are trained as a whole.

    Raises:
        ValueError: if a pattern matches nothing, or no parameter is left.
    """
    names = {name for name, _ in named}
    if config.include is not None:
        names = matching_names(config.include, named, "include")
    names -= matching_names(config.exclude, named, "exclude") | dense
    found = {name: param for name, param in named if name in names}
    if not found:
        raise ValueError(
            "no trainable parameter is left to select from; unfreeze the model, or change include, "
            "exclude and train_fully"
        )
    return found


def forget_ties(model: nn.Module) -> None:
    """Take back what `select` told transformers about tied tensors."""
    if _TIES in vars(model):
        declared = getattr(model, _TIES)
        kept = {name: source for name, source in declared.items() if "parametrizations" not in name}
        setattr(model, _TIES, kept)


def _check_share(candidates: dict[str, Tensor], threshold: float) -> None:
    tensors = list(candidates.values())
    num_below, num_all = count_below(tensors, threshold), sum(each.numel() for each in tensors)
    if num_below == 0:
        smallest = min(float(each.detach().abs().min()) for each in tensors if each.numel())
        raise ValueError(
            f"threshold {threshold:g} selects none of {num_all:,} weights, whose smallest "
            f"magnitude is {smallest:g}; raise it, or give a quantile"
        )
    if num_below == num_all:
        raise ValueError(
            f"threshold {threshold:g} selects all {num_all:,} weights, which is full fine-tuning; "
            "lower it, or give a quantile"
        )


def _warn_of_ties(candidates: dict[str, Tensor], threshold: float, quantile: float) -> None:
    tensors = list(candidates.values())
    num_below, num_all = count_below(tensors, threshold), sum(each.numel() for each in tensors)
    if num_below > _MOST_OF_QUANTILE * quantile * num_all + 1:
        warnings.warn(
            f"quantile {quantile:g} selects {num_below:,} of {num_all:,} weights, which is "
            f"{num_below / num_all:.1%}: so many are equally small, such as zeros; give a "
            "threshold, or name their tensors in exclude",
            UserWarning,
            stacklevel=4,
        )


def _check_modules(name: str, places: Sequence[Place]) -> None:
    for place in places:
        kind = type(place.module).__name__
        if isinstance(place.module, nn.RNNBase):
            raise ValueError(
                f"SaRA cannot train {name!r}: a {kind} keeps a list of its weights of its own; "
                "name it in exclude"
            )
        if isinstance(place.module, EMBEDDINGS) and place.module.sparse:
            raise ValueError(
                f"SaRA cannot train {name!r}: this {kind} gives sparse gradients; set its sparse "
                "to False, or name it in exclude"
            )


def _places(model: nn.Module) -> dict[int, list[Place]]:
    """Where each parameter lives; a tied one in several modules."""
    places: dict[int, list[Place]] = {}
    for module_name, module in model.named_modules():
        for tensor_name, param in module.named_parameters(recurse=False):
            place = Place(module_name, module, tensor_name)
            places.setdefault(id(param), []).append(place)
    return places


def _train_small(param: Tensor, places: Sequence[Place], threshold: float) -> None:
    is_selected = is_below(param, threshold)
    if not is_selected.any():
        return
    small = SmallWeights(param, is_selected, threshold)
    for place in places:
        parametrize.register_parametrization(place.module, place.tensor_name, small)


def _keep_positions_local(model: nn.Module) -> None:
    """Spare data-parallel training the broadcast of all positions at every forward pass.

    Every process computes the same ones from the same weights.
    """
    names = [
        name
        for name, _ in model.named_buffers()
        if name.endswith((".0.indices", ".0.trained")) and ".parametrizations." in f".{name}"
    ]
    data_parallel: Any = DistributedDataParallel
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    data_parallel._set_params_and_buffers_to_ignore_for_model(model, [*ignored, *names])


def _declare_ties(model: nn.Module, places_of_each: Sequence[Sequence[Place]]) -> None:
    """Tell transformers which names of a tied tensor to leave out when it saves a checkpoint."""
    ties = {place.pattern: first.pattern for first, *others in places_of_each for place in others}
    if ties and hasattr(model, _TIES):
        setattr(model, _TIES, {**(getattr(model, _TIES) or {}), **ties})
