"""Where a weight's matrix lies, and which of its sides is projected: decided here and nowhere else.

A weight of any shape is seen as a matrix, or as a stack of matrices, with the projected side first.
Everything downstream then has one case: the basis stands on the left.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Side = Literal["short", "long", "left", "right"]
SIDES: tuple[str, ...] = get_args(Side)


class Layout(NamedTuple):
    """How a weight is seen as ``matrix (*batch, m, n)`` with the basis on its left.

    Attributes:
        is_stacked: the first axis of a weight with three or more counts matrices, as in stacked
            experts; otherwise axes after the first are flattened, as in a convolution.
        is_transposed: the basis spans the columns' space of the stored matrix.
        num_rows: m, length of the projected side.
        num_cols: n, length of the other side.
        num_matrices: matrices in the stack, 1 without one.
    """

    is_stacked: bool
    is_transposed: bool
    num_rows: int
    num_cols: int
    num_matrices: int

    def view(self, tensor: Tensor) -> Tensor:
        """See a weight or gradient as (*batch, m, n); shares memory where strides allow it."""
        matrix = tensor.flatten(2 if self.is_stacked else 1) if tensor.dim() > 2 else tensor
        return matrix.mT if self.is_transposed else matrix

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading dimensions of basis and coordinates."""
        return (self.num_matrices,) if self.is_stacked else ()


def layout_of(shape: torch.Size, side: Side = "short", *, is_stacked: bool = False) -> Layout:
    """Decide how a weight of this shape is projected.

    Sides: ``short`` puts the basis on the shorter side, as GaLore and the published AdaRankGrad do:
    the least work, and state min·r + 2·max·r. ``long`` puts it on the longer side and holds less,
    max·r + 2·min·r. ``left`` and ``right`` name the rows and the columns of the stored matrix.
    A square matrix counts as tall: ``short`` is its right side, ``long`` its left (as GaLore).

    Args:
        shape: the weight's shape, at least two axes.
        side: one of the above.
        is_stacked: see `Layout`; ignored for two axes.

    Raises:
        ValueError: if the side is unknown or the shape has fewer than two axes.
    """
    if side not in SIDES:
        raise ValueError(f"side must be one of {', '.join(SIDES)}, got {side!r}")
    if len(shape) < 2:
        raise ValueError(f"a projected weight needs at least two axes, got shape {tuple(shape)}")
    is_stacked = is_stacked and len(shape) > 2
    first_row_axis = 1 if is_stacked else 0
    rows = shape[first_row_axis]
    cols = shape[first_row_axis + 1 :].numel()
    is_tall = rows >= cols
    is_transposed = {"left": False, "right": True, "short": is_tall, "long": not is_tall}[side]
    return Layout(
        is_stacked=is_stacked,
        is_transposed=is_transposed,
        num_rows=cols if is_transposed else rows,
        num_cols=rows if is_transposed else cols,
        num_matrices=shape[0] if is_stacked else 1,
    )


def project(matrix: Tensor, basis: Tensor) -> Tensor:
    """Return the coordinates ``basis.mT @ matrix`` (*batch, r, n), in the basis's dtype.

    The product runs in the matrix's dtype, so that no full-size copy of a bfloat16 gradient is made
    (a float16 one is copied to float32, since its products overflow at 65504). It runs as tall
    times thin, which is up to twice as fast as thin times wide: the result is a transposed view.

    Args:
        matrix: (*batch, m, n), any floating dtype.
        basis: (*batch, m, r), float32 or float64.
    """
    if matrix.dtype is torch.float16:
        matrix = matrix.to(basis.dtype)
    return (matrix.mT @ basis.to(matrix.dtype)).mT.to(basis.dtype)


def lift_into_(weight: Tensor, basis: Tensor, coords: Tensor, *, decay: float, step: float) -> None:
    """In place: ``weight ← decay · weight − step · basis @ coords``.

    Decay, lift and step are one matrix product with no full-size temporary.

    Args:
        weight: (*batch, m, n), a view of the weight; modified in place.
        basis: (*batch, m, r).
        coords: (*batch, r, n).
        decay: factor on the weight, 1 − lr · weight_decay.
        step: factor on the update, lr · scale.
    """
    basis, coords = basis.to(weight.dtype), coords.to(weight.dtype)
    if weight.dim() == 2:
        weight.addmm_(basis, coords, beta=decay, alpha=-step)
    else:
        weight.baddbmm_(basis, coords, beta=decay, alpha=-step)


def norm_of(
    tensor: Tensor, *, dim: int | tuple[int, int] | None = None, keepdim: bool = False
) -> Tensor:
    """Return the Euclidean norm, over all axes or some, in float32 where float16 is too narrow.

    Of bfloat16 it stays in bfloat16, since another dtype costs a full-size copy on a CPU.
    """
    dtype = torch.float32 if tensor.dtype is torch.float16 else None
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dim, keepdim=keepdim, dtype=dtype)
    return norm
