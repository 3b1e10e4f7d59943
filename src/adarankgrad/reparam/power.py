"""The parametrization w = sign(theta) |theta|^alpha of one weight.

Autograd's own derivative of theta |theta|^(alpha-1) is NaN at 0 for 1 < alpha < 2, and that of
sign(theta) |theta|^alpha is 0 at 0 for alpha = 1, where a weight that starts at zero would stay
there. Hence a derivative in closed form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from ..core.signed_power import signed_power, signed_power_slope, signed_root


class _Power(torch.autograd.Function):
    """theta to w, in a form that `torch.func` takes; the gradient goes to theta, or on as it is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(theta: Tensor, alpha: float, passes_gradient: bool) -> Tensor:
        return signed_power(theta, alpha).to(theta.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, bool], output: Tensor) -> None:
        theta, ctx.alpha, ctx.passes_gradient = inputs
        ctx.save_for_backward(theta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.passes_gradient:
            return grad, None, None
        (theta,) = ctx.saved_tensors
        # Not in place: under vmap the gradient has an axis of samples, and theta none.
        return (signed_power_slope(theta, ctx.alpha) * grad).to(grad.dtype), None, None


class Power(nn.Module):
    """One weight's parametrization: w = sign(theta) |theta|^alpha.

    Attributes:
        alpha: at least 1; at 1 the weight is the parameter itself.
        passes_gradient: whether the parameter's gradient is the loss's by w, not by theta;
            `PowerUpdates` sets it.
        is_entrywise: for `adarankgrad.param_groups`, which treats the parameter as the weight.
    """

    is_entrywise = True

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.passes_gradient = False

    def forward(self, theta: Tensor) -> Tensor:
        """Return the weight: the parameter's shape and dtype."""
        if self.alpha == 1:
            return theta
        return _Power.apply(theta, self.alpha, self.passes_gradient)  # type: ignore[no-any-return, no-untyped-call]

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the parameter that gives this weight."""
        return weight if self.alpha == 1 else signed_root(weight, self.alpha).to(weight.dtype)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        return f"alpha={self.alpha:g}"


class PoweredWeight(NamedTuple):
    """A weight trained by its power: its name in the plain model and where it lives."""

    name: str
    module: nn.Module
    tensor_name: str
    power: Power
    theta: Tensor

    def weight(self) -> Tensor:
        """Return the present weight, without gradient, in float32 or wider."""
        return signed_power(self.theta, self.power.alpha)


def powered_weights(model: nn.Module) -> list[PoweredWeight]:
    """Return the weights of a model that are trained by their power, in model order."""
    return list(_powered_weights(model))


def _powered_weights(model: nn.Module) -> Iterator[PoweredWeight]:
    for module_name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        parametrizations: Any = module.parametrizations
        for tensor_name, stages in parametrizations.items():
            if isinstance(stages[0], Power):
                name = f"{module_name}.{tensor_name}" if module_name else tensor_name
                yield PoweredWeight(name, module, tensor_name, stages[0], stages.original)
