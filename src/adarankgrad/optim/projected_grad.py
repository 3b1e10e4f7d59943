"""A gradient that is held in measurements only, in the place of a weight's ``.grad``.

To whatever handles gradients between backward and step (accumulation, clipping, loss scaling) it is
a tensor of the weight's shape and dtype that can be added to, scaled and asked for its norm. All of
that is linear, or needs but the norm; what needs single entries is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.measurement import Measured, Measurement, measure, nothing_measured
from ..core.projection import Layout

_aten = torch.ops.aten


class ProjectedGrad(Tensor):
    """Linear measurements of a gradient, or of a sum of gradients.

    Its norm is the gradient's: exact inside the basis, estimated outside
    (`core.measurement.Measured.squared_norm`).

    Attributes:
        matrix_layout: where the weight's matrix lies.
        measurement: what is measured.
        measured: what was measured so far, float32 (float64 under float64 weights).
        num_added: gradients that were added.
        on_dense: called with this and every gradient that is added.
    """

    matrix_layout: Layout
    measurement: Measurement
    measured: Measured
    num_added: int
    on_dense: Callable[[ProjectedGrad, Tensor], None] | None

    def __new__(cls, like: Tensor, layout: Layout, measurement: Measurement) -> ProjectedGrad:
        """Make a gradient of zero, measured.

        Args:
            like: a dense gradient of the weight; its values are not read.
            layout: where the weight's matrix lies.
            measurement: what to measure.
        """
        held: ProjectedGrad = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        held.matrix_layout, held.measurement, held.on_dense = layout, measurement, None
        held.measured, held.num_added = nothing_measured(measurement), 0
        return held

    def add_dense(self, grad: Tensor, alpha: float = 1.0) -> None:
        """Add the measurements of a gradient, and tell ``on_dense`` of it."""
        added = measure(self.matrix_layout.view(grad), self.measurement)
        for part, more in zip(self.measured, added, strict=True):
            part.add_(more, alpha=alpha)
        self.num_added += 1
        if self.on_dense is not None:
            self.on_dense(self, grad)

    def scale(self, factor: Any) -> None:
        """Multiply by a number or a tensor of one element."""
        for part in self.measured:
            part.mul_(factor)

    def norm_of_gradient(self) -> Tensor:
        """Return ‖G‖_F, no axes; NaN or infinite where the gradient was."""
        return self.measured.squared_norm().sum().sqrt()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Say what is held."""
        rank = self.measurement.basis.shape[-1]
        return f"ProjectedGrad(shape={tuple(self.shape)}, directions={rank})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run what is linear, or the 2-norm; refuse the rest."""
        handler = _HANDLERS.get(func)
        if handler is None:
            raise NotImplementedError(
                f"{func} needs a whole gradient, but accumulate_in_backward keeps it in projection "
                "only; do without it, or remove the handle that accumulate_in_backward returned"
            )
        return handler(func, *args, **(kwargs or {}))


def _add(func: Any, held: Any, other: Any, *, alpha: float = 1.0) -> Any:
    if not isinstance(held, ProjectedGrad) or isinstance(other, ProjectedGrad):
        raise NotImplementedError("only a dense gradient can be added to one held in projection")
    held.add_dense(other, alpha)
    return held


def _multiply(func: Any, held: ProjectedGrad, factor: Any) -> ProjectedGrad:
    held.scale(factor)
    return held


def _divide(func: Any, held: ProjectedGrad, divisor: Any) -> ProjectedGrad:
    held.scale(1.0 / divisor)
    return held


def _zero(func: Any, held: ProjectedGrad) -> ProjectedGrad:
    for part in held.measured:
        part.zero_()
    return held


def _norm(
    func: Any, held: ProjectedGrad, order: float = 2, dim: Any = None, *_: Any, **__: Any
) -> Tensor:
    if order != 2 or dim is not None:
        raise NotImplementedError(
            f"a gradient held in projection has a 2-norm over all entries, not one of order {order}"
        )
    return held.norm_of_gradient()


def _one_by_one(single: Callable[..., Any]) -> Callable[..., Any]:
    """A `torch._foreach_*` function from what it does to one tensor."""

    def handler(func: Any, tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> list[Any]:
        return [single(tensor, *args, **kwargs) for tensor in tensors]

    return handler


def _unscale(
    func: Any, tensors: Sequence[Tensor], found_inf: Tensor, inverse_scale: Tensor
) -> None:
    """`torch.amp.GradScaler`'s check and division, on what is really held."""
    dense = [tensor for tensor in tensors if not isinstance(tensor, ProjectedGrad)]
    held = [part for t in tensors if isinstance(t, ProjectedGrad) for part in t.measured]
    for parts in (dense, held):
        if parts:
            func(parts, found_inf, inverse_scale)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.add_.Tensor: _add,
    _aten.mul_.Tensor: _multiply,
    _aten.mul_.Scalar: _multiply,
    _aten.div_.Tensor: _divide,
    _aten.div_.Scalar: _divide,
    _aten.zero_.default: _zero,
    _aten.detach.default: lambda func, held: held,
    _aten.linalg_vector_norm.default: _norm,
    _aten._foreach_norm.Scalar: _one_by_one(torch.linalg.vector_norm),
    _aten._foreach_mul_.Tensor: _one_by_one(Tensor.mul_),
    _aten._foreach_mul_.Scalar: _one_by_one(Tensor.mul_),
    _aten._foreach_zero_.default: _one_by_one(Tensor.zero_),
    _aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
}
