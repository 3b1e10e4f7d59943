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

EXPIRED = (
    "a gradient held in projection was measured for a step that has been taken, or for a state "
    "that load_state_dict replaced; call optimizer.zero_grad() before the next backward pass"
)


class ProjectedGrad(Tensor):
    """Linear measurements of a gradient, or of a sum of gradients.

    Its norm is the gradient's: exact inside the basis, estimated outside
    (`core.measurement.Measured.squared_norm`).

    What is measured depends on the optimizer's state, so it belongs to one step, after which it
    has expired: only zero can follow, and starts anew.

    Attributes:
        matrix_layout: where the weight's matrix lies.
        on_dense: called with this and every gradient that is added.
        on_measured: called with what is measured of every gradient that is added.
        num_added: dense gradients added since it was zero.
        has_expired: whether the step that it was measured for has been taken.
    """

    matrix_layout: Layout
    on_dense: Callable[[ProjectedGrad, Tensor], None] | None
    on_measured: Callable[[Measured], None] | None
    num_added: int
    has_expired: bool
    _plan: Callable[[], Measurement]
    _held: tuple[Measurement, Measured] | None

    def __new__(
        cls, like: Tensor, layout: Layout, plan: Callable[[], Measurement]
    ) -> ProjectedGrad:
        """Make a gradient of zero.

        Args:
            like: a dense gradient of the weight; its values are not read.
            layout: where the weight's matrix lies.
            plan: decides what to measure, when the first gradient arrives.
        """
        held: ProjectedGrad = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        held.matrix_layout, held._plan = layout, plan
        held.on_dense = held.on_measured = None
        held.set_to_zero()
        return held

    @property
    def measurement(self) -> Measurement:
        """What is measured."""
        return self._parts()[0]

    @property
    def measured(self) -> Measured:
        """What was measured so far, float32 (float64 under float64 weights)."""
        return self._parts()[1]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All tensors that are held: what was measured, and what is measured."""
        return () if self._held is None else (*self._held[1], *self._held[0])

    def set_to_zero(self) -> None:
        """Forget all gradients; what to measure of the next one is decided when it arrives."""
        self._held, self.num_added, self.has_expired = None, 0, False

    def expire(self) -> None:
        """Note that the state it was measured for has gone."""
        self.has_expired = True

    def add_dense(self, grad: Tensor, alpha: float = 1.0) -> None:
        """Add the measurements of a gradient, and tell ``on_dense`` of it.

        Raises:
            RuntimeError: if this has expired.
        """
        if self.has_expired:
            raise RuntimeError(EXPIRED)
        added = measure(self.matrix_layout.view(grad), self.measurement)
        for part, more in zip(self.measured, added, strict=True):
            part.add_(more, alpha=alpha)
        self.num_added += 1
        if self.on_measured is not None:
            self.on_measured(added)
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
        num_directions = 0 if self._held is None else self._held[0].basis.shape[-1]
        return f"ProjectedGrad(shape={tuple(self.shape)}, directions={num_directions})"

    def _parts(self) -> tuple[Measurement, Measured]:
        if self._held is None:
            measurement = self._plan()
            self._held = measurement, nothing_measured(measurement)
        return self._held

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
    held.set_to_zero()
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
