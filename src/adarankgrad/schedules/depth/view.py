"""A model run at a virtual depth: some of its layers, each as often as a list says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .layers import check_interchangeable, find_layers, text_config


class DepthView:
    """Lets a model's forward pass run its layers as a list of their numbers says.

    The module list is exchanged while the model's forward pass runs and put back after it, also
    when it fails: names, weights and ``state_dict`` are always those of the whole model. A layer
    that runs several times gets the sum of their gradients, one that does not run gets none. A
    key-value cache would mix up the uses of a layer and is switched off meanwhile; gradient
    checkpointing works, and has to be the non-reentrant one wherever something waits for final
    gradients.

    Nothing is changed before the first `use`.

    Args:
        model: the module that is called; keeps its layers in an ``nn.ModuleList``.
        layer_list: name of that list; None finds it (`find_layers`).

    Raises:
        ValueError: there is no such list, or its layers cannot stand in for one another.
    """

    def __init__(self, model: nn.Module, layer_list: str | None = None) -> None:
        found = find_layers(model, layer_list)
        check_interchangeable(model, found)
        self.model = model
        self.layers = list(found.modules)
        self._found = found
        self._of_training: nn.ModuleList | None = None
        self._of_evaluation: nn.ModuleList | None = None
        self._handles: tuple[RemovableHandle, ...] = ()
        self._has_switched_cache = False

    def use(self, training: Sequence[int], evaluation: Sequence[int] | None = None) -> None:
        """Run these layers from now on.

        Args:
            training: numbers of layers, bottom first, of forward passes in training mode.
            evaluation: of those in evaluation mode; None for the same.
        """
        self._of_training = self._chosen(training)
        self._of_evaluation = self._chosen(training if evaluation is None else evaluation)
        if not self._handles:
            self._handles = (
                self.model.register_forward_pre_hook(self._enter, with_kwargs=True),
                self.model.register_forward_hook(self._leave, always_call=True),
            )

    def remove(self) -> None:
        """Leave the model alone from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    def _chosen(self, numbers: Sequence[int]) -> nn.ModuleList | None:
        """The list to run; None for every layer in its place."""
        if list(numbers) == list(range(len(self.layers))):
            return None
        return nn.ModuleList(self.layers[number] for number in numbers)

    def _enter(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        chosen = self._of_training if model.training else self._of_evaluation
        if chosen is None:
            return None
        if kwargs.get("past_key_values") is not None:
            raise ValueError(
                "past_key_values hold one entry a layer, and this model runs at a virtual depth; "
                "call it without"
            )
        if kwargs.get("use_cache"):
            kwargs["use_cache"] = False
        config = text_config(model)
        if getattr(config, "use_cache", False):
            config.use_cache = False
            self._has_switched_cache = True
        setattr(self._found.parent, self._found.attribute, chosen)
        return args, kwargs

    def _leave(self, *_: Any) -> None:
        setattr(self._found.parent, self._found.attribute, self._found.modules)
        if self._has_switched_cache:
            text_config(self.model).use_cache = True
            self._has_switched_cache = False
