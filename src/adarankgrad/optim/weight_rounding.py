"""How new weights get into bfloat16: to the nearest, at random, or with a correction beside them.

A bfloat16 weight that is not rounded to the nearest is computed in float32, a bounded number of
entries at a time, so that no full-size float32 copy of a large matrix exists.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..core.generators import generator_for
from ..core.projection import Layout
from ..core.rounding import join_correction, round_stochastically, split_correction

State = dict[str, Any]
Options = dict[str, Any]
WeightRounding = Literal["nearest", "stochastic", "corrected"]
WEIGHT_ROUNDINGS: tuple[str, ...] = get_args(WeightRounding)

CHUNK = 2**20
"""Weights that are computed in float32 at a time: 4 MiB, and as much for each temporary."""


def is_rounded(weight: Tensor, options: Options) -> bool:
    """Whether a weight is computed in float32 and rounded otherwise than to the nearest."""
    return options["weight_rounding"] != "nearest" and weight.dtype is torch.bfloat16


def check_can_be_rounded(weight: Tensor, options: Options) -> None:
    """Refuse float16 weights where they should not be rounded to the nearest.

    Raises:
        ValueError: naming the option, the weight's shape and what to do.
    """
    rounding = options["weight_rounding"]
    if rounding != "nearest" and weight.dtype is torch.float16:
        raise ValueError(
            f"weight_rounding={rounding!r} is for bfloat16 weights, and one of shape "
            f"{tuple(weight.shape)} is float16; use bfloat16 or float32 weights, or "
            "weight_rounding='nearest'"
        )


def warn_if_nothing_is_rounded(groups: Iterable[Options]) -> None:
    """Warn if groups ask for another rounding than the nearest, but hold no bfloat16 weight.

    One float32 weight among others is trained as it always is; it needs no warning.
    """
    asking = [group for group in groups if group["weight_rounding"] != "nearest"]
    weights = [(weight, group) for group in asking for weight in group["params"]]
    if weights and not any(is_rounded(weight, group) for weight, group in weights):
        dtypes = sorted({str(weight.dtype) for weight, _ in weights})
        warnings.warn(
            f"weight_rounding={asking[0]['weight_rounding']!r} has no effect: it is for bfloat16 "
            f"weights, and these are {', '.join(dtypes)}; train in bfloat16, or leave it out",
            stacklevel=4,
        )


def new_correction(weight: Tensor, options: Options) -> State:
    """The state that rounding needs: an int8 ``correction`` of the weight's shape, or none."""
    if not is_rounded(weight, options) or options["weight_rounding"] != "corrected":
        return {}
    return {"correction": torch.zeros(weight.shape, dtype=torch.int8, device=weight.device)}


def fits_correction(state: State, weight: Tensor, options: Options) -> bool:
    """Tell whether a saved state has the correction that this weight needs, or none."""
    expected = new_correction(weight.to("meta"), options).get("correction")
    found = state.get("correction")
    if expected is None or found is None:
        return expected is found
    return bool(found.shape == expected.shape and found.dtype is torch.int8)


def master_weights(model: nn.Module, states: Mapping[Tensor, State]) -> dict[str, Tensor]:
    """A model's state dict, weights that have a correction in float32; tied ones stay tied."""
    whole: dict[Tensor, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        correction = states.get(weight, {}).get("correction")
        if correction is not None and weight not in whole:
            whole[weight] = join_correction(weight.detach(), correction)
        weights[name] = whole.get(weight, weight.detach())
    return weights


class Part(NamedTuple):
    """A part of a weight.

    Attributes:
        weight: a view of it.
        correction: the same of its correction; None without one.
        generator: to round with; None unless at random.
    """

    weight: Tensor
    correction: Tensor | None
    generator: torch.Generator | None

    def read(self) -> Tensor:
        """The weights in float32 or wider, newly allocated where they are not kept in it."""
        if self.correction is not None:
            return join_correction(self.weight, self.correction)
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))

    def write(self, values: Tensor) -> None:
        """Round values from `read` into the weight."""
        if self.correction is not None:
            weight, correction = split_correction(values)
            self.weight.copy_(weight)
            self.correction.copy_(correction)
        elif self.generator is not None:
            self.weight.copy_(round_stochastically(values, self.generator))
        elif values is not self.weight:
            self.weight.copy_(values)


def rounding_generator(
    weight: Tensor, options: Options, name: str, count: int
) -> torch.Generator | None:
    """The generator for one change of a weight; None where chance has no part in it."""
    if not is_rounded(weight, options) or options["weight_rounding"] != "stochastic":
        return None
    return generator_for(weight.device, options["seed"], f"{name}/weight", count)


def change_matrix(
    weight: Tensor,
    layout: Layout,
    state: State,
    options: Options,
    draw: tuple[str, int],
    change: Callable[[Tensor, slice], None],
) -> None:
    """Change a projected weight in place.

    Args:
        weight: any shape with two axes or more.
        layout: where its matrix lies.
        state: of the weight, whose correction is changed as well.
        options: the parameter group.
        draw: name and count that identify this change to the random generator.
        change: receives rows of the matrix (*batch, rows, n), to be changed in place, and which
            rows they are: all of them, in the weight's dtype, or some at a time in float32.
    """
    matrix = layout.view(weight)
    if not is_rounded(weight, options):
        change(matrix, slice(None))
    else:
        correction = state.get("correction")
        corrections = None if correction is None else layout.view(correction)
        generator = rounding_generator(weight, options, *draw)
        for rows in _slices_of_rows(matrix):
            part = Part(
                matrix[..., rows, :],
                None if corrections is None else corrections[..., rows, :],
                generator,
            )
            values = part.read()
            change(values, rows)
            part.write(values)
    if matrix.data_ptr() != weight.data_ptr():  # strides forbade a view (channels_last)
        weight.copy_((matrix.mT if layout.is_transposed else matrix).reshape(weight.shape))


def _slices_of_rows(matrix: Tensor) -> list[slice]:
    num_rows = matrix.shape[-2]
    size = max(1, CHUNK * num_rows // max(1, matrix.numel()))
    return [slice(start, start + size) for start in range(0, num_rows, size)]
