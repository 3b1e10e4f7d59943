"""When a model grows, and how deep its steps are meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch

from ...core.checks import check_choice, check_count
from ...core.depth import DEPTH_RULES, LAYER_MAPS
from ...core.generators import generator_for

Unit = Literal["steps", "tokens"]
OptimizerState = Literal["copied", "kept", "fresh"]


@dataclass(frozen=True)
class DepthConfig:
    """The stages of a training, each with more layers than the one before.

    Attributes:
        layers: real layers of each stage; never falling, the last is the model's depth.
        starts: where each stage begins, in ``unit``; the first is 0, rising.
        unit: ``"steps"`` taken, or ``"tokens"`` seen before a step.
        layer_map: which layer stands in for, and is copied to, which position: ``"interpolate"``
            (each in its place) or ``"stack"`` (block by block).
        sampling: how deep a step is: ``"low_value"`` (seldom deep), ``"uniform"``,
            ``"constant_high"`` (always the full depth) or ``"constant_low"`` (never deeper than the
            stage).
        optimizer_state: of layers that are replaced when a stage begins: ``"copied"`` with the
            weights, ``"kept"`` (a place keeps what it has, as in the published code), or
            ``"fresh"`` (none).
        layer_list: name of the module list that holds the layers; None finds it.

    Raises:
        ValueError: a value is out of range, or lists fall, do not rise, or differ in length.

    Example:
        >>> config = DepthConfig(layers=(1, 3, 6, 12), starts=(0, 500, 1000, 2500))
        >>> config.layers_at(700)
        3
    """

    layers: Sequence[int]
    starts: Sequence[int] = (0,)
    unit: Unit = "steps"
    layer_map: str = "interpolate"
    sampling: str = "low_value"
    optimizer_state: OptimizerState = "copied"
    layer_list: str | None = None

    def __post_init__(self) -> None:
        _check_counts("layers", self.layers, low=1, example="(3, 6, 12)")
        _check_counts("starts", self.starts, low=0, example="(0, 500, 1000)")
        if len(self.layers) != len(self.starts):
            raise ValueError(
                f"layers and starts must have one entry a stage, got {len(self.layers)} and "
                f"{len(self.starts)}"
            )
        if any(after < before for before, after in pairwise(self.layers)):
            raise ValueError(f"layers must not fall from stage to stage, got {_text(self.layers)}")
        if any(after <= before for before, after in pairwise(self.starts)):
            raise ValueError(f"starts must rise from stage to stage, got {_text(self.starts)}")
        if self.starts[0] != 0:
            raise ValueError(f"starts must begin with 0, got {_text(self.starts)}")
        check_choice("unit", self.unit, get_args(Unit))
        if self.layer_list is not None and not isinstance(self.layer_list, str):
            raise ValueError(f"layer_list must be a module's name, got {self.layer_list!r}")
        check_choice("layer_map", self.layer_map, tuple(LAYER_MAPS))
        check_choice("sampling", self.sampling, tuple(DEPTH_RULES))
        check_choice("optimizer_state", self.optimizer_state, get_args(OptimizerState))

    @property
    def max_depth(self) -> int:
        """Layers of the whole model."""
        return self.layers[-1]

    def layers_at(self, position: int) -> int:
        """Return the real layers of a step before which so many steps or tokens passed."""
        return self.layers[sum(start <= position for start in self.starts) - 1]

    def map_layers(self, num_layers: int, depth: int) -> list[int]:
        """Return the real layer at each of ``depth`` positions."""
        return LAYER_MAPS[self.layer_map](num_layers, depth)

    def sample_depth(self, num_layers: int, seed: int, step: int) -> int:
        """Draw the depth of a step; equal arguments give equal depths, on every rank."""
        generator = generator_for(torch.device("cpu"), seed, "depth", step)
        draw = torch.rand((), dtype=torch.float64, generator=generator).item()
        return DEPTH_RULES[self.sampling](num_layers, self.max_depth, draw)


def _check_counts(name: str, values: Any, *, low: int, example: str) -> None:
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(
            f"{name} must be a list with an entry a stage, such as {example}, got {values!r}"
        )
    for value in values:
        check_count(name, value, low=low)


def _text(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
