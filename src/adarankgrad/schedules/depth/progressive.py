"""Training at a growing depth (Apollo): few layers play the part of many, and become them.

In a stage with N layers, each step runs a depth L >= N drawn anew, for which the N layers are
repeated; lower weights so practise what upper ones will do. A stage begins by copying layers to the
places that they stood in for. `docs/progressive-depth.md` says what of this was read, run and
remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .config import DepthConfig
from .growth import check_state_can_be_copied, copy_layers
from .view import DepthView


class ProgressiveDepth:
    """Sets a model's depth before each step, and lets it grow when a stage begins.

    The whole model exists from the start. Layers that wait for their stage get no gradients, and so
    neither optimizer state nor weight decay. In evaluation mode the layers of the present stage run
    once each. With as many layers in every stage as the model has, nothing is changed at all.

    Differs from the published code: depth is drawn once a step, not for each micro-batch, and from
    seed and step alone, so that resuming and several processes need nothing more; stages begin at
    exact steps or tokens; layer numbers are computed in integers.

    Args:
        model: the module that is called, before it is wrapped for several devices.
        config: see there.
        seed: of the depths.
        optimizers: of the model's weights, whose state changes with the layers; one or several.

    Attributes:
        num_layers: layers of the present stage.
        depth: of the present step in training.

    Raises:
        ValueError: the model keeps no list of layers, they cannot stand in for one another, it has
            more or fewer of them than the last stage, or state that is to be copied has a budget.

    Memory: none. A step's activations are those of its depth; gradients and optimizer state those
    of the layers of its stage.

    Example:
        >>> depth = ProgressiveDepth(model, config, optimizers=optimizer)  # doctest: +SKIP
        >>> for step in range(num_steps):  # doctest: +SKIP
        ...     depth.begin_step(step)
        ...     loss_of(model, step).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        config: DepthConfig,
        *,
        seed: int = 0,
        optimizers: Optimizer | Sequence[Optimizer] = (),
    ) -> None:
        self._view = DepthView(model, config.layer_list)
        if len(self._view.layers) != config.max_depth:
            raise ValueError(
                f"layers must end with the {len(self._view.layers)} layers of the model, got "
                f"{config.max_depth} in the last stage"
            )
        self.config = config
        self.seed = seed
        self._optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        if config.optimizer_state == "copied" and config.layers[0] < config.max_depth:
            for optimizer in self._optimizers:
                check_state_can_be_copied(optimizer)
        self.num_layers = self.depth = config.layers[0]

    def begin_step(self, step: int, num_tokens: int | None = None) -> None:
        """Set the depth of a step, after growing where a stage begins with it.

        Args:
            step: steps taken before it.
            num_tokens: tokens seen before it, where stages start by them.

        Raises:
            ValueError: the tokens are missing, or the step is of an earlier stage.
        """
        num_layers = self.config.layers_at(self._position(step, num_tokens))
        if num_layers < self.num_layers:
            raise ValueError(
                f"step {step} is of a stage with {num_layers} layers, and the model has grown to "
                f"{self.num_layers}; load weights and state of that stage first"
            )
        if num_layers > self.num_layers:
            sources = self.config.map_layers(self.num_layers, num_layers)
            copy_layers(self._view.layers, sources, self._optimizers, self.config.optimizer_state)
            self.num_layers = num_layers
        self.depth = self.config.sample_depth(num_layers, self.seed, step)
        self._view.use(self.config.map_layers(num_layers, self.depth), range(num_layers))

    def remove(self) -> None:
        """Run every layer in its place from now on."""
        self._view.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs beside seed and step, as plain numbers."""
        return {"num_layers": self.num_layers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, with the weights of the same moment.

        Raises:
            ValueError: no stage has so many layers.
        """
        num_layers = state["num_layers"]
        if num_layers not in self.config.layers:
            raise ValueError(
                f"the saved model had grown to {num_layers} layers, and the stages have "
                f"{', '.join(map(str, self.config.layers))}"
            )
        self.num_layers = self.depth = num_layers
        self._view.use(range(num_layers))

    def _position(self, step: int, num_tokens: int | None) -> int:
        if self.config.unit == "steps":
            return step
        if num_tokens is None:
            raise ValueError("stages start by tokens; say how many were seen with num_tokens")
        return num_tokens
