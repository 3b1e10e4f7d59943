"""Ranks that rise linearly over depth, as patterns of peft."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction

_NUMBERED = re.compile(r"(?P<stack>(?:.*?\.)?)(?P<index>\d+)(?:\.|$)")
"""A module's name up to its first number: that of its layer, not that of an expert in it."""


def linear_ranks(first: int, last: int, num_layers: int) -> list[int]:
    """Return round(first + (last - first) * l / (num_layers - 1)) for every layer l.

    Halves go to the even neighbour, so that the sum does not drift. A single layer gets the mean.
    """
    if num_layers == 1:
        return [round(Fraction(first + last, 2))]
    return [
        round(first + Fraction((last - first) * layer, num_layers - 1))
        for layer in range(num_layers)
    ]


def layer_position(module_name: str) -> tuple[str, int] | None:
    """Return the stack of layers that a module belongs to and its layer's index in it.

    ``"model.layers.3.mlp.up_proj"`` gives ``("model.layers.", 3)``; None where no part of the name
    is a number.
    """
    match = _NUMBERED.match(module_name)
    return None if match is None else (match["stack"], int(match["index"]))


def depth_ranks(
    module_names: Iterable[str], targeted: Sequence[str], *, first: int, last: int
) -> dict[str, int]:
    """Give every layer with targeted modules its rank.

    Depth is that of the model, whichever layers are targeted; stacks, such as encoder and decoder,
    rise each by itself.

    Args:
        module_names: of the whole model.
        targeted: modules to adapt.
        first: rank of the first layer.
        last: rank of the last.

    Returns:
        Rank by pattern; a pattern matches the names of one layer's modules and no others.

    Raises:
        ValueError: if a targeted module lies in no numbered layer.
    """
    depths: dict[str, int] = {}
    for stack, index in filter(None, map(layer_position, module_names)):
        depths[stack] = max(depths.get(stack, 0), index + 1)
    ranks: dict[str, int] = {}
    for name in targeted:
        position = layer_position(name)
        if position is None:
            raise ValueError(
                f"PRILoRA's ranks follow depth, but {name!r} lies in no numbered layer (such as "
                "model.layers.3); leave it out of target_modules, or name it in exclude_modules"
            )
        stack, index = position
        pattern = rf"^{re.escape(f'{stack}{index}')}(\..*)?"
        ranks[pattern] = linear_ranks(first, last, depths[stack])[index]
    return ranks
