"""SGD on orthogonalised gradients: Muon without momentum, hence without state."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.memory import StateDtype
from .engine import SubspaceOptimizer
from .gradient_checks import Nonfinite
from .weight_rounding import WeightRounding


class OrthogonalizedSGD(SubspaceOptimizer):
    """Steps along each matrix's gradient with all its singular values raised to one.

    Muon's step (Jordan et al. 2024) without its momentum, the limit of AdaRankGrad at rank 0: what
    remains of it when the basis holds nothing. It is the control for every method that claims to
    need state, and holds none for matrices; everything else is trained by AdamW. Steps are scaled
    to the size of Adam's, so rates are comparable (`core.residual.orthogonalized`).

    Args:
        params: parameters, named parameters or groups; `param_groups` builds groups from a model.
            Every option below may also be set per group.
        lr: step size, at least 0.
        betas: decay rates of AdamW's moments, each in [0, 1); matrices have none.
        eps: of AdamW, at least 0.
        weight_decay: decoupled, multiplied by ``lr``, at least 0.
        project: False trains the group by AdamW.
        stacked: the group's weights stack matrices along their first axis.
        scale: factor on the step, at least 0.
        state_dtype: ``float32``, ``bfloat16`` or ``int8``, the form of AdamW's moments
            (`AdaRankGrad`); matrices have none, so it changes nothing where all are projected.
        weight_rounding: of bfloat16 weights: ``nearest``, ``stochastic``, ``corrected`` (likewise).
        max_grad_norm: clip all gradients together to this norm at every step, at least 0, or None.
        nonfinite: when that norm is not finite, ``skip`` the step and count it (`report`),
            ``raise`` FloatingPointError, or ``ignore`` it, as torch's AdamW does. Skipping and
            raising read every gradient once more, and wait for the device.

    Raises:
        ValueError: if an option is out of range, or at a step if a gradient is sparse.

    Memory: no state for matrices, but temporaries of three times the largest; two moments for
    everything else.

    Example:
        >>> import torch
        >>> from adarankgrad import OrthogonalizedSGD
        >>> weight = torch.nn.Parameter(torch.randn(16, 32))
        >>> weight.grad = torch.randn(16, 32)
        >>> OrthogonalizedSGD([weight], lr=0.01).step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 8e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        project: bool = True,
        stacked: bool = False,
        scale: float = 1.0,
        state_dtype: StateDtype = "float32",
        weight_rounding: WeightRounding = "nearest",
        max_grad_norm: float | None = None,
        nonfinite: Nonfinite = "skip",
    ) -> None:
        super().__init__(params, self.chosen_options(locals()))

    @staticmethod
    def engine_options(options: dict[str, Any]) -> dict[str, Any]:
        """Express the method in the engine's choices."""
        options = {**options, "basis": "none", "residual": "orthogonalized"}
        if "scale" in options:
            options["residual_scale"] = options["scale"]
        return options
